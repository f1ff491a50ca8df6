"""Critical sharpness: two over the learning rate at which the pending update would first raise the loss.

Source: arXiv 2601.16979, section 2.
"""

from __future__ import annotations

import math
import numbers
import statistics
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from torch import nn
from torch.optim import Optimizer

from slimadam.curvature.probe.bracketing import Crossing, RoughSearch, Search, Status
from slimadam.curvature.probe.directions import reference_lr
from slimadam.curvature.probe.displacement import Memory
from slimadam.curvature.probe.line import Closure, LineProbe
from slimadam.curvature.probe.snapshot import ROUGHNESS
from slimadam.curvature.stability import edge_of_stability
from slimadam.utils.errors import shown

_CHECKS_NOISE_EVERY = 16  # measurements, of which one evaluates the loss twice to see whether it repeats itself
_NOISE_SAMPLES = 4
_NOISE_WIDTH = 3.0
# Of a loss, where something is computed in 16 bits: a larger change is none of rounding, nor one of so many times it.
_CERTAIN = 1e-2
_CERTAIN_TIMES = 4.0
_FINEST = 1e-12
_FEWEST_FORWARDS = _NOISE_SAMPLES + 1


@dataclass(frozen=True)
class SharpnessMeasurement:
    """Result of one measurement.

    Attributes:
        sharpness: ``2 / critical_lr``; NaN where none was found, 0 where the loss never rose.
        critical_lr: The smallest learning rate of the pending update that raises the loss, the middle of
            ``bracket``: NaN where none was found, infinite where the loss never rose. It is that of the group with
            the largest rate, the others in proportion.
        bracket: ``(lower, upper)``: the loss does not rise at ``lower``, and rises at ``upper``.
        forward_passes: Calls of the closure.
        loss: At the parameters.
        threshold: Where the edge of stability lies for the Hessian's sharpness at the present learning rate, see
            :func:`~slimadam.edge_of_stability`; None: no formula for this optimizer. ``sharpness`` itself compares with
            ``2 / lr``: above it the next step raises the loss.
        lr: The present learning rate, the largest of all groups.
        status: ``"found"``. ``"noisy"``: found as closely as a closure that does not repeat itself allows.
            ``"no increase"``: up to the largest rate that was allowed, or can be expressed. ``"no descent"``: the
            loss rises, or stays, at every rate whose effect can be told from rounding: the update is no descent
            direction for it. ``"too noisy"``: in 16 bits, it falls at none by more than rounding does. ``"not
            finite"``: the loss is, at the parameters. ``"out of evaluations"``: ``bracket`` holds what is known.
        noise: Standard deviation of repeated evaluations at the same parameters; 0 for a closure that repeats itself.
        task: As passed to :meth:`CriticalSharpness.measure`.
    """

    sharpness: float
    critical_lr: float
    bracket: tuple[float, float]
    forward_passes: int
    loss: float
    threshold: float | None
    lr: float
    status: Status
    noise: float = 0.0
    task: str = ""


class CriticalSharpness:
    """Measures how far the optimizer's pending update may go before the loss rises (arXiv 2601.16979).

    ``critical_lr = min {eta > 0: loss(parameter - eta D) > loss(parameter)}`` for the update direction ``D``, weight
    decay included; ``sharpness = 2 / critical_lr`` equals the directional sharpness ``D^T H D / D^T g`` where the
    loss is quadratic. With another task's closure it is the relative critical sharpness. Starts at the last result;
    doubles or halves to a bracket and narrows it: 5 forward passes when little has changed.

    Parameters, gradients, optimizer state, buffers and random-number generators are left as they were. Gradients must
    be what the optimizer steps on: unscale those of a GradScaler, and clip, before measuring.

    Args:
        optimizer: SlimAdam, or any torch optimizer whose step needs no closure.
        tol: The bracket is narrow enough when ``1 - lower / upper <= tol``.
        memory: ``"copy"``, ``"lean"`` or ``"offload"``, see :class:`~slimadam.curvature.probe.line.LineProbe`.
        start: Where the first search begins; None: at the optimizer's learning rate.
        max_lr: No larger rate is tried.
        max_forwards: The most forward passes of one measurement.
        modules: Modules whose buffers the closure may change; None: those alive that own a parameter.
        rounding: Changes of the loss up to this share of it are not told from rounding. None: 4.8e-7, or 1e-4 where
            parameters have 16 bits or the closure enters autocast, and more where the loss itself has 16 bits. Under
            ``torch.compile`` autocast is not seen. From 1e-4 on nothing is made of small changes: a crossing counts
            where the loss falls before it, and rises after it, by more than rounding would.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tol: float = 1 / 16,
        *,
        memory: Memory = "copy",
        start: float | None = None,
        max_lr: float | None = None,
        max_forwards: int = 40,
        modules: Iterable[nn.Module] | None = None,
        rounding: float | None = None,
    ) -> None:
        self._line = LineProbe(optimizer, memory, modules)
        if not is_number(tol) or not _FINEST <= tol < 1:
            raise ValueError(f"tol={shown(tol)} must be a number from {_FINEST:g} to 1, which is excluded")
        for name, value in (("start", start), ("max_lr", max_lr)):
            if value is not None and not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}={shown(value)} must be a positive, finite number, or None")
        if rounding is not None and not (is_number(rounding) and 0 <= rounding < 1):
            raise ValueError(f"rounding={shown(rounding)} must be a number from 0 to 1, which is excluded, or None")
        if not isinstance(max_forwards, int) or max_forwards < _FEWEST_FORWARDS:
            raise ValueError(f"max_forwards={shown(max_forwards)} must be an integer >= {_FEWEST_FORWARDS}")
        self.optimizer = self._line.optimizer
        self._tol = tol
        self._start = start
        self._max_lr = math.inf if max_lr is None else max_lr
        self._max_forwards = max_forwards
        self._rounding = rounding
        self._last: dict[str, float] = {}
        self._measured: dict[str, int] = {}
        self._noisy: set[str] = set()

    def measure(self, closure: Closure, *, task: str = "") -> SharpnessMeasurement:
        """Measure once, after ``backward()`` and before ``step()``.

        Args:
            closure: Computes the loss on the batch of the pending gradient or of another task, forward only.
            task: Which loss it is. The next measurement of the same task starts where this one ended.

        Returns:
            What was found; where nothing was, ``status`` says why.

        Raises:
            RuntimeError: No gradient is pending.
            TypeError: The closure does not return a number; whatever else it raises is passed on.
            ValueError: A parameter group has no learning rate, or groups differ in ``maximize``.
        """
        if not callable(closure):
            raise TypeError(f"closure={closure!r} must be callable and return the loss")
        flags = {bool(group.get("maximize", False)) for group in self.optimizer.param_groups}
        if len(flags) > 1:
            raise ValueError("maximize differs between parameter groups: there is no one direction of improvement")
        lr = reference_lr(self.optimizer)
        repeats = 2 if self._measured.get(task, 0) % _CHECKS_NOISE_EVERY == 0 else 1
        if task in self._noisy:
            repeats = _NOISE_SAMPLES
        with self._line as line:
            losses = _Losses(line, closure, -1 if flags == {True} else 1, repeats, self._rounding)
            is_noisy = losses.noise > losses.rounding
            if is_noisy and task not in self._noisy:
                self._noisy.add(task)
                warnings.warn(
                    f"the closure{f' of task {task!r}' if task else ''} does not repeat itself: at the same parameters "
                    f"and random seeds its losses differ, with standard deviation {losses.noise:.2g} around "
                    f"{losses.base:.6g}. It should use one batch, and no generator of its own. Until then each "
                    "measurement is as narrow as that allows, and says status='noisy'",
                    stacklevel=2,
                )
            if not math.isfinite(losses.base):
                lower, upper, status = Crossing(0.0, math.inf, "not finite")
            else:
                kind = partial(RoughSearch, certain=losses.certain) if losses.is_rough else Search
                left = self._max_forwards - losses.count
                search = kind(losses.rise, self._tol, losses.resolution, left, self._max_lr, stops_at_noise=is_noisy)
                lower, upper, status = search.run(self._last.get(task) or self._start or lr or 1e-3)
        self._measured[task] = self._measured.get(task, 0) + 1
        critical_lr = math.inf if status == "no increase" else math.nan
        if status in ("found", "noisy"):
            critical_lr = self._last[task] = (lower + upper) / 2
        return SharpnessMeasurement(
            sharpness=2 / critical_lr,
            critical_lr=critical_lr,
            bracket=(lower, upper),
            forward_passes=losses.count,
            loss=losses.base,
            threshold=edge_of_stability(self.optimizer),
            lr=lr,
            status=status,
            noise=losses.noise,
            task=task,
        )

    @property
    def extra_bytes(self) -> int:
        """While measuring, seen from the closure: bytes held beside the model and its optimizer."""
        return self._line.extra_bytes

    def state_dict(self) -> dict[str, Any]:
        """Return where the next search of each task begins, and whether its loss is noisy; numbers and strings only."""
        return {"last": dict(self._last), "measured": dict(self._measured), "noisy": sorted(self._noisy)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`.

        Raises:
            KeyError: It is no state dict of this class.
        """
        last, measured, noisy = (state_dict[key] for key in ("last", "measured", "noisy"))
        self._last, self._measured, self._noisy = dict(last), dict(measured), set(noisy)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class _Losses:
    """The closure's losses on the line, counted, relative to that at the parameters."""

    def __init__(self, line: LineProbe, closure: Closure, sign: int, repeats: int, rounding: float | None) -> None:
        self._line, self._closure, self._sign = line, closure, sign
        self.count = 0
        losses = [self._loss(0.0) for _ in range(repeats)]
        self.base = statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.nan
        if rounding is None:
            rounding = line.rounding
        self.is_rough = rounding >= ROUGHNESS
        self.rounding = rounding * abs(self.base)
        if repeats == 2 and math.isfinite(self.base) and abs(losses[0] - losses[1]) > self.rounding:
            losses += [self._loss(0.0) for _ in range(_NOISE_SAMPLES - repeats)]
            self.base = statistics.fmean(losses)
        self.noise = statistics.stdev(losses) if len(losses) > 1 and math.isfinite(self.base) else 0.0
        self.resolution = max(self.rounding, _NOISE_WIDTH * self.noise)
        self.certain = max(_CERTAIN * abs(self.base), _CERTAIN_TIMES * self.resolution)

    def rise(self, eta: float) -> float:
        """Return by how much the loss at ``eta`` is worse than at the parameters."""
        return self._sign * (self._loss(eta) - self.base)

    def _loss(self, eta: float) -> float:
        self.count += 1
        return self._line.loss(self._closure, eta)
