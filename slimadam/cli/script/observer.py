"""Measure the optimizers of a running script, scale their learning rate, and end the script."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from slimadam.cli.script.names import prefix_of, prefixed
from slimadam.cli.script.runner import SIGTERM_EXIT, StopScript, step_hooks
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import Schedule, SNRRecorder


class LearningRateScale:
    """Multiplies the learning rate of an optimizer's groups by a factor, and puts the very same object back."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._scaled: dict[int, tuple[Optimizer, dict[str, Any], Any, Any]] = {}

    def apply(self, optimizer: Optimizer) -> None:
        """Scale the rate of each group that is not scaled yet (wrapping optimizers share their groups)."""
        if self._factor == 1.0:
            return
        self.restore(optimizer)  # its last step may have raised
        for group in optimizer.param_groups:
            if id(group) not in self._scaled:
                original = group["lr"]
                group["lr"] = original * self._factor
                self._scaled[id(group)] = optimizer, group, original, group["lr"]

    def restore(self, optimizer: Optimizer | None = None) -> None:
        """Put back the rates scaled for one optimizer, or for all, but those set anew meanwhile."""
        for key, (owner, group, original, scaled) in list(self._scaled.items()):
            if optimizer is None or owner is optimizer:
                if group["lr"] is scaled:
                    group["lr"] = original
                del self._scaled[key]


@dataclass(eq=False)
class Observer:
    """Measures every Adam-like optimizer that steps while :meth:`watching` is active.

    Attributes:
        schedule: Says at which optimizer steps to measure.
        max_steps: End the script when one optimizer has done so many steps; None for never.
        lr_scale: Factor on the learning rate of Adam-like optimizers, during their steps only.
        on_step: Called with the largest number of steps that one optimizer has done, when it grows.
        problems: Messages of the errors met while measuring; the script goes on after them.
    """

    schedule: Schedule
    max_steps: int | None = None
    lr_scale: float = 1.0
    on_step: Callable[[int], None] | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._learning_rate = LearningRateScale(self.lr_scale)
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._most_steps = 0
        self._recorders: dict[Optimizer, tuple[SNRRecorder, str]] = {}
        self._failed: set[Optimizer] = set()
        self._terminated = False

    @property
    def optimizers(self) -> int:
        """Number of Adam-like optimizers that have stepped."""
        return len(self._recorders)

    @property
    def steps(self) -> int:
        """The most steps that one Adam-like optimizer has done."""
        return max((recorder.steps for recorder, _ in self._recorders.values()), default=0)

    def history(self) -> SNRHistory:
        """Return the measurements of all optimizers.

        A name that several optimizers use for different parameters gets the class of its outermost module in
        front, and a number where that is not enough either. A parameter that moved on to another optimizer
        has its steps counted on.
        """
        owners: dict[str, set[int]] = {}
        for recorder, _ in self._recorders.values():
            for name, parameter in recorder.parameters.items():
                owners.setdefault(name, set()).add(id(parameter))
        merged = SNRHistory()
        for recorder, prefix in self._recorders.values():
            for name, found in recorder.history.items():
                if len(owners.get(name, ())) > 1:
                    name = next(free for free in prefixed(prefix, name) if free not in merged)
                done = max(merged[name].values, default=0) if name in merged else 0
                layout = found.role, found.part, found.batch_dims, found.fan_in, found.all_names
                for step, values in {0: {}, **found.values}.items():
                    merged.record(done + step, name, found.shape, values, *layout)
        return merged

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the optimizer steps of this process; SIGTERM ends the script as an exit of its own would."""
        try:
            with step_hooks(self._before_step, self._after_step), self._sigterm_raises():
                yield
        finally:
            self._learning_rate.restore()

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Before its first step an optimizer has no state yet to tell what it is by.
        if _is_adam_like(optimizer) or (not optimizer.state and "betas" in optimizer.defaults):
            self._learning_rate.apply(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._learning_rate.restore(optimizer)
        steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if optimizer not in self._failed:
            self._measure(optimizer)
        if steps > self._most_steps:
            self._most_steps = steps
            if self.on_step is not None:
                self.on_step(steps)
        if self._terminated:
            raise SystemExit(SIGTERM_EXIT)
        if self.max_steps is not None and steps >= self.max_steps:
            raise StopScript

    def _measure(self, optimizer: Optimizer) -> None:
        try:
            if optimizer not in self._recorders and _is_adam_like(optimizer):
                recorder = SNRRecorder(optimizer, schedule=self.schedule, attach=False)
                self._recorders[optimizer] = recorder, prefix_of(recorder.parameters.values())
            if optimizer in self._recorders:
                self._recorders[optimizer][0].after_step()
        except Exception as error:  # the script must not notice that it is being measured
            self._failed.add(optimizer)
            self.problems.append(f"stopped measuring {type(optimizer).__name__}: {error}")

    @contextmanager
    def _sigterm_raises(self) -> Iterator[None]:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        process = os.getpid()

        def handle(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:  # a forked child has inherited this handler
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif not self._terminated:  # timeout and torchrun send it twice
                self._terminated = True
                raise SystemExit(SIGTERM_EXIT)

        signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is handle:
                signal.signal(signal.SIGTERM, signal.SIG_IGN if self._terminated else signal.SIG_DFL)


def _is_adam_like(optimizer: Optimizer) -> bool:
    return any(str(key).startswith("exp_avg_sq") for state in optimizer.state.values() for key in state)
