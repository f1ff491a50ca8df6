"""Measuring the SNR of second moments while an Adam-like optimizer trains.

Source: arXiv 2503.01843; the schedule is the authors': the first step, then every 100, and every 1,000 after
the first 1,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slimadam.layers.names import NamedParameters
from slimadam.layers.splits import Parts, key_of
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import record
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms
from slimadam.state.rule import full_rule
from slimadam.utils.torch_private import disable_dynamo

Schedule = Callable[[int], bool]


def paper_schedule(step: int) -> bool:
    """Whether the authors measure at optimizer step ``step`` (from 1)."""
    return step == 1 or step % (100 if step <= 1000 else 1000) == 0


def every(interval: int) -> Schedule:
    """A schedule that measures at step 1 and at each multiple of ``interval``.

    Raises:
        ValueError: ``interval`` is not a positive integer.
    """
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"interval={interval!r} must be an integer >= 1")
    return lambda step: step == 1 or step % interval == 0


class SNRRecorder:
    """Records the SNR of an optimizer's second moments on a schedule, through a hook after ``step()``.

    Works with any optimizer whose state holds ``exp_avg_sq`` of the parameter's shape. Gradients and state are
    only read. A measurement that meets NaN or infinite second moments is recorded as NaN and left out of the
    averages.

    Args:
        optimizer: The optimizer to watch.
        model: The module that owns the parameters; without it names come from the optimizer or from the
            modules alive in the process.
        schedule: Given the step (from 1), whether to measure. Default: :func:`paper_schedule`.
        attach: Register the hook. With False, call :meth:`after_step` yourself.
        parts: What parameters are made of, by pattern of their names, where their modules do not say.

    Attributes:
        history: What was measured so far.
        steps: Optimizer steps seen so far.

    Raises:
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        schedule: Schedule = paper_schedule,
        *,
        attach: bool = True,
        parts: Mapping[str, Parts] | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        # Accelerate's wrapper is an Optimizer without hooks of its own; the one inside is what steps.
        inner = getattr(optimizer, "optimizer", None)
        optimizer = inner if isinstance(inner, Optimizer) else optimizer
        if not callable(schedule):
            raise TypeError(f"schedule={schedule!r} must be callable: step -> bool; see slimadam.every(interval)")
        self.history = SNRHistory()
        self.steps = 0
        self._optimizer = optimizer
        self._schedule = schedule
        self._parts = parts
        self._names = NamedParameters.of_optimizer(optimizer, model, parts)
        self._handle: RemovableHandle | None = None
        for parameter in self._parameters():
            self._record(parameter, None)
        if attach:
            self._handle = optimizer.register_step_post_hook(disable_dynamo(lambda *_: self.after_step()))

    def after_step(self) -> None:
        """Count one optimizer step and measure if the schedule says so."""
        self.steps += 1
        if self._schedule(self.steps):
            self.measure_now()

    @torch.no_grad()
    def measure_now(self) -> None:
        """Measure every parameter that has a full second moment, at the current step."""
        for parameter in self._parameters():
            second_moment = self._optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if isinstance(second_moment, Tensor) and second_moment.shape == parameter.shape:
                self._record(parameter, second_moment)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters measured so far, by the names they, or their parts, are recorded under."""
        return {
            key_of(name, piece.part): parameter
            for parameter in self._parameters()
            if (name := self._names.name(parameter)) is not None
            for piece in self._names.pieces(parameter)
        }

    def detach(self) -> None:
        """Remove the hook; the history stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def _record(self, parameter: Tensor, second_moment: Tensor | None) -> None:
        name = self._names.name(parameter)
        if name is None:
            self._names = NamedParameters.of_optimizer(self._optimizer, parts=self._parts)
            name = self._names.name(parameter)
            assert name is not None
        names = self._names.all_names(parameter)
        for piece in self._names.pieces(parameter):
            record(self.history, self.steps, key_of(name, piece.part), full_rule(piece, ""), second_moment, names)


def calibrate(
    model: nn.Module,
    train_step: Callable[[], Tensor],
    steps: int = 500,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    cutoff: float = 1.0,
    budget: float | None = None,
    forms: Forms = "best",
    keep: Iterable[str] = (),
    parts: Mapping[str, Parts] | None = None,
    schedule: Schedule = paper_schedule,
    on_step: Callable[[int], None] | None = None,
) -> CompressionPlan:
    """Train for a while with AdamW, measure, and choose a plan. The model comes back as it was.

    Args:
        model: The model to calibrate. Parameters, buffers, gradients and modes are restored at the end.
        train_step: Computes the loss of the next batch; called once a step, takes no arguments and returns a
            scalar tensor to call ``backward()`` on.
        steps: Optimizer steps to run.
        lr: Learning rate; about a tenth of the one you will train with, as arXiv 2503.01843 recommends: it finds that
            the SNR falls with the rate, and that rules found at a small rate hold at a large one.
        betas: As in AdamW.
        weight_decay: As in AdamW.
        cutoff: As in :meth:`CompressionPlan.from_snr`.
        budget: As in :meth:`CompressionPlan.from_snr`.
        forms: As in :meth:`CompressionPlan.from_snr`; ``"mean"`` is the paper exactly.
        keep: As in :meth:`CompressionPlan.from_snr`.
        parts: As in :class:`SNRRecorder`.
        schedule: As in :class:`SNRRecorder`.
        on_step: Called after each step with its number, for progress bars.

    Raises:
        ValueError: ``steps`` is not positive.
        TypeError: ``train_step`` did not return a scalar tensor.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer >= 1")
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
    )
    recorder = SNRRecorder(optimizer, model, schedule, parts=parts)
    restore = _snapshot(model)
    try:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = train_step()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"train_step must return the loss as a scalar tensor, not {loss!r}")
            torch.autograd.backward(loss)
            optimizer.step()
            if on_step is not None:
                on_step(step)
    finally:
        recorder.detach()
        restore()
    return CompressionPlan.from_snr(recorder.history, cutoff, budget=budget, forms=forms, keep=keep)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts parameters, buffers, gradients and modes back as they are now."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training

    return restore
