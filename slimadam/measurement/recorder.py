"""Measuring the SNR of an optimizer's second moments on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slimadam.layers.names import NamedParameters
from slimadam.layers.splits import Split, key_of
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.snr import check_count
from slimadam.state.rule import full_rule
from slimadam.utils.torch_private import disable_dynamo

Schedule = Callable[[int], bool]


def paper_schedule(step: int) -> bool:
    """Return whether the authors of the paper measure at optimizer step ``step`` (from 1)."""
    return step == 1 or step % (100 if step <= 1000 else 1000) == 0


def every(interval: int) -> Schedule:
    """Return a schedule that measures at step 1 and at each multiple of ``interval``.

    Raises:
        ValueError: ``interval`` is not a positive integer.
    """
    check_count("interval", interval, 1)
    return lambda step: step == 1 or step % interval == 0


class SNRRecorder:
    """Records the SNR of an optimizer's second moments on a schedule, through a hook after ``step()``.

    Works with any optimizer whose state holds ``exp_avg_sq`` of the parameter's shape. Gradients and state are only
    read. A measurement of NaN or infinite second moments is recorded as NaN and left out of the averages.

    Args:
        optimizer: The optimizer to measure.
        model: The module that owns the parameters; without it names come from the optimizer or from the
            modules alive in the process.
        schedule: Says for a step (from 1) whether to measure. Default: :func:`paper_schedule`.
        attach: Register the hook. With False, call :meth:`after_step` yourself.
        parts: Parts of fused parameters, by pattern of their names, where their modules do not say.

    Attributes:
        history: The measurements so far.
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
        parts: Mapping[str, Split] | None = None,
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

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])

    def _record(self, parameter: Tensor, second_moment: Tensor | None) -> None:
        name = self._names.name(parameter)
        if name is None:
            self._names = NamedParameters.of_optimizer(self._optimizer, parts=self._parts)
            name = self._names.name(parameter)
            assert name is not None
        names = self._names.all_names(parameter)
        for piece in self._names.pieces(parameter):
            self.history.measure(self.steps, key_of(name, piece.part), full_rule(piece, ""), second_moment, names)
