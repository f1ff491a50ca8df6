"""Warmup that starts at the critical learning rate: the largest that does not raise the loss (arXiv 2406.09405)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from slimadam.curvature.critical import CriticalSharpness, is_number
from slimadam.curvature.probe.directions import unwrapped
from slimadam.curvature.probe.line import Closure
from slimadam.curvature.probe.snapshot import Sharding
from slimadam.layers.names import owning_modules
from slimadam.utils.errors import shown

_FRACTION_OF_A_STEP = 1e-9  # less is rounding of the rates' ratio
_MAX_FORWARDS = 100
_REASONS = {
    "no descent": "the loss {0.loss:.6g} does not fall at any rate along the pending update; is it the loss, and the "
    "batch, that the gradients come from?",
    "too noisy": "too noisy: computed in 16 bits, the loss {0.loss:.6g} changes along the pending update by no more "
    "than rounding does; compute it in float32 in the closure",
    "not finite": "the loss is {0.loss} at the parameters",
    "out of evaluations": "after {0.forward_passes} forward passes it lies in {0.bracket}; pass a better start",
}


def critical_lr(optimizer: Optimizer, closure: Closure, start: float = 1e-6, max_lr: float | None = None) -> float:
    """Return the critical learning rate: the smallest that raises the loss in the next step (arXiv 2406.09405).

    Call it after ``backward()`` and before ``step()``. It doubles the rate from ``start`` until the loss of the
    same batch is above the loss at the parameters, then narrows the bracket to a sixteenth and returns its middle.
    Everything is left as it was, see :class:`~slimadam.CriticalSharpness`, which says more about a measurement.

    Args:
        optimizer: With pending gradients: SlimAdam or any torch optimizer. With several groups the rate is that of
            the group with the largest one, the others in proportion.
        closure: Returns the loss of the batch that the gradients come from, forward only.
        start: Where the search begins; it halves where the loss already rises there.
        max_lr: Largest rate to try, for instance the target of the warmup.

    Returns:
        The rate; ``max_lr`` where nothing up to it raises the loss, infinity where nothing does.

    Raises:
        RuntimeError: No gradient is pending, or no rate could be found: the loss is not finite, or no rate along the
            pending update lowers it, or, in 16 bits, does so by more than rounding.
        TypeError: ``start`` or ``max_lr`` is no number.
        ValueError: One of them is not positive and finite.
    """
    _check_rate("start", start)
    if max_lr is not None:
        _check_rate("max_lr", max_lr)
    measured = CriticalSharpness(optimizer, start=start, max_lr=max_lr, max_forwards=_MAX_FORWARDS).measure(closure)
    if measured.status in ("found", "noisy"):
        return measured.critical_lr
    if measured.status == "no increase" or (measured.bracket[0] > 0 and math.isinf(measured.bracket[1])):
        return math.inf if max_lr is None else float(max_lr)
    raise RuntimeError(f"no critical learning rate: {_REASONS[measured.status].format(measured)}")


class CatapultWarmup(LRScheduler):
    """Linear warmup that starts at the critical learning rate instead of at zero, with the same slope.

    The groups' rates (``initial_lr``) are the target. With ``eta_target`` the largest of them, the rate of the group
    that has it is, ``k`` calls of :meth:`step` after the start::

        lr(k) = min(eta_target, critical_lr + k eta_target / warmup_steps)

    where plain linear warmup has ``k eta_target / warmup_steps`` (arXiv 2406.09405). So it reaches the target after
    ``steps`` instead of ``warmup_steps``, ``warmup_steps critical_lr / eta_target`` steps earlier, rounded down. Where
    ``critical_lr >= eta_target`` there is no warmup. Other groups keep their ratio to the largest rate.

    Another schedule follows with ``SequentialLR(optimizer, [warmup, other], [warmup.steps])``. In a
    ``ChainedScheduler``, and wherever else something changes the rates, those changes are kept and scaled.

    Args:
        optimizer: Its groups' rates are the target; tensor rates are changed in place.
        warmup_steps: Length of the plain warmup from zero, which fixes the slope.
        critical_lr: The critical learning rate at initialisation, see :func:`critical_lr`.
        last_epoch: As for every scheduler of torch; -1 starts.

    Attributes:
        steps: Calls of :meth:`step` until the target is reached.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``warmup_steps`` is below 1, ``critical_lr`` is not positive or not finite, or no group has a
            positive rate.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, critical_lr: float, last_epoch: int = -1) -> None:
        _check_count("warmup_steps", warmup_steps)
        _check_rate("critical_lr", critical_lr)
        self._targets = _target_rates(optimizer)
        self.warmup_steps = warmup_steps
        self.critical_lr = float(critical_lr)
        self._start = min(1.0, self.critical_lr / max(self._targets))
        self.steps = warmup_steps - math.floor(warmup_steps * (self._start + _FRACTION_OF_A_STEP))
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the groups at ``last_epoch``, as :meth:`step` computes them."""
        if self.last_epoch > 0 and not hasattr(self, "_last_lr"):  # built to go on where another one stopped
            return self._get_closed_form_lr()
        before = self._factor(self.last_epoch - 1) if self.last_epoch else 1.0
        after = self._factor(self.last_epoch)
        groups = zip(self.optimizer.param_groups, self._targets, strict=True)
        return [_moved(group["lr"], target, before, after) for group, target in groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """Return the rates at ``last_epoch``, whatever they are now; torch calls this by name."""
        return [target * self._factor(self.last_epoch) for target in self._targets]

    def _factor(self, step: int) -> float:
        return 1.0 if step >= self.steps else self._start + step / self.warmup_steps


class PersistentCatapultWarmup(LRScheduler):
    """Warmup without a fixed duration: the rate follows the critical learning rate until it reaches the target.

    Persistent catapult warmup (arXiv 2406.09405). The groups' rates (``initial_lr``) are the target, and keep their
    ratios. When ``optimizer.step()`` is called, and before it changes anything, the critical learning rate along the
    pending update is measured on the same batch; that very step is taken with it. The rate never falls, never exceeds
    the target, and grows by at most ``max_growth`` from one measurement to the next. At the target it is done: the
    closure is never called again, and the rates are left to whatever follows.

    The training loop is that of every scheduler; the closure reads the batch that the loop is at::

        warmup = PersistentCatapultWarmup(optimizer, lambda: loss_of(model, batch))
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            warmup.step()

    Without the call of :meth:`step` the rate stays where the last measurement put it. A schedule that follows is
    stepped in place of this one once ``warmup.finished``.

    Args:
        optimizer: Its groups' rates are the target; tensor rates are changed in place. With a GradScaler, call
            ``scaler.unscale_(optimizer)`` before ``scaler.step(optimizer)``.
        closure: Returns the loss of the batch whose gradient is pending, forward only.
        start: The rate before the first measurement, which also starts its search from there.
        interval: Measure at the first step and then each time so many calls of :meth:`step` have been made.
        max_growth: Largest factor between one measurement's rate and the next one's; the first has no limit.

    Attributes:
        rate: The rate of the group with the largest target.
        target: That target.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``start`` is not positive, ``interval`` below 1, ``max_growth`` not above 1, or no group has a
            positive rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        closure: Closure,
        *,
        start: float = 1e-6,
        interval: int = 1,
        max_growth: float = 2.0,
    ) -> None:
        if not callable(closure):
            raise TypeError(f"closure={shown(closure)} must be a function that returns the loss of the batch at hand")
        _check_rate("start", start)
        _check_count("interval", interval)
        if not is_number(max_growth) or not max_growth > 1:
            raise ValueError(f"max_growth={shown(max_growth)} must be a number above 1")
        self._targets = _target_rates(optimizer)
        self.target = max(self._targets)
        self.rate = min(float(start), self.target)
        self.interval = interval
        self.max_growth = float(max_growth)
        self._closure = closure
        self._modules: list[nn.Module] | None = None
        self._measured = False
        self._due = True
        self._warned = False
        self._hook = unwrapped(optimizer).register_step_pre_hook(self._before_step)
        super().__init__(optimizer)

    @property
    def finished(self) -> bool:
        """True once the target has been reached."""
        return self._measured and self.rate >= self.target

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the groups: those of the last measurement; once finished, the present ones."""
        if self.finished:
            return _rates(self.optimizer)
        self._due |= self.last_epoch % self.interval == 0
        return [target * (self.rate / self.target) for target in self._targets]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer and the closure."""
        left_out = ("optimizer", "_closure", "_hook", "_modules")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; a finished warmup stays finished."""
        self.__dict__.update(state_dict)
        self._hook.remove()
        if not self.finished:
            self._hook = unwrapped(self.optimizer).register_step_pre_hook(self._before_step)
            self._set_rates()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._due:
            return
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise RuntimeError(
                "optimizer.step(closure) makes the gradient inside the step, where nothing can be measured; "
                "call backward() first and step() without a closure"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "the pending gradient is scaled by a GradScaler; call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer)"
            )
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if all(param.grad is None for param in params):
            if not self._warned:
                self._warned = True
                warnings.warn("optimizer.step() was called without gradients: nothing to measure", stacklevel=3)
            return
        if self._modules is None:  # to look for them in each step would take longer than a small model's forward
            Sharding(params).reshard()  # full parameters are not the optimizer's
            self._modules = owning_modules(params)
        limit = min(self.target, self.rate * self.max_growth) if self._measured else self.target
        measured = CriticalSharpness(
            optimizer, start=self.rate, max_lr=limit, max_forwards=_MAX_FORWARDS, modules=self._modules
        ).measure(self._closure)
        # Otherwise the update of this batch does not lower its loss, or the loss is not finite: the rate stays.
        if measured.status in ("found", "noisy", "no increase"):
            critical = min(measured.critical_lr, limit)
            self.rate = max(self.rate, critical) if self._measured else critical
            self._measured = True
        self._due = False
        self._set_rates()
        if self.finished:
            self._hook.remove()

    def _set_rates(self) -> None:
        for group, target in zip(self.optimizer.param_groups, self._targets, strict=True):
            lr = target * (self.rate / self.target)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = _rates(self.optimizer)


def _rates(optimizer: Optimizer) -> list[float | Tensor]:
    rates = (group["lr"] for group in optimizer.param_groups)
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]


def _moved(lr: float | Tensor, target: float, before: float, after: float) -> float | Tensor:
    """Return ``target * after`` where ``lr`` still is ``target * before``, else ``lr`` scaled alike."""
    if isinstance(lr, Tensor):
        ours = torch.full_like(lr, target * before)
        return torch.where(lr == ours, torch.full_like(lr, target * after), lr * (after / before))
    return target * after if lr == target * before else lr * (after / before)


def _target_rates(optimizer: Optimizer) -> list[float]:
    targets = [float(group.get("initial_lr", group["lr"])) for group in unwrapped(optimizer).param_groups]
    if not max(targets) > 0:
        raise ValueError("every group's lr is 0: set the target of the warmup as the optimizer's lr")
    return targets


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)} must be a whole number of at least 1")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _check_rate(name: str, value: object) -> None:
    if not is_number(value):
        raise TypeError(f"{name}={shown(value)} must be a number above 0")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be a finite number above 0")
