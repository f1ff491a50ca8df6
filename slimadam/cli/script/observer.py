"""Watching the optimizers of a running script: measures, scales the learning rate, ends the script."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from slimadam.cli.script.lr_scale import LearningRateScale
from slimadam.cli.script.names import prefix_of, prefixed
from slimadam.cli.script.runner import StopScript, Terminated
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import Schedule, SNRRecorder
from slimadam.utils.torch_private import disable_dynamo


def is_adam_like(optimizer: Optimizer) -> bool:
    """Whether an optimizer that has stepped keeps Adam's second moments."""
    return any(str(key).startswith("exp_avg_sq") for state in optimizer.state.values() for key in state)


@dataclass(frozen=True)
class _Watched:
    recorder: SNRRecorder
    prefix: str


class Observer:
    """Watches every optimizer that steps while :meth:`watching` is active.

    Args:
        schedule: At which optimizer steps to measure.
        max_steps: End the script when one optimizer has done so many steps; None for never.
        lr_scale: Factor on the learning rate of Adam-like optimizers, during their steps only.
        on_step: Called with the largest number of steps that one optimizer has done, when it grows.

    Attributes:
        problems: What went wrong while measuring; the script was left to go on.
    """

    def __init__(
        self,
        schedule: Schedule,
        max_steps: int | None = None,
        lr_scale: float = 1.0,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.problems: list[str] = []
        self._schedule = schedule
        self._max_steps = max_steps
        self._on_step = on_step
        self._learning_rate = LearningRateScale(lr_scale)
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._most_steps = 0
        self._watched: dict[Optimizer, _Watched] = {}
        self._failed: set[Optimizer] = set()
        self._terminated = False
        self._process = os.getpid()

    @property
    def optimizers(self) -> int:
        """How many Adam-like optimizers have stepped."""
        return len(self._watched)

    @property
    def steps(self) -> int:
        """The most steps that one Adam-like optimizer has done."""
        return max((watched.recorder.steps for watched in self._watched.values()), default=0)

    def history(self) -> SNRHistory:
        """The measurements of all optimizers.

        A name that several optimizers use for different parameters gets the class of its outermost module in
        front, and a number where that is not enough either. A parameter that moved on to another optimizer
        has its steps counted on.
        """
        merged = SNRHistory()
        ambiguous = self._ambiguous_names()
        for watched in self._watched.values():
            for name, measured in watched.recorder.history.items():
                if name in ambiguous:
                    name = next(free for free in prefixed(watched.prefix, name) if free not in merged)
                merged.record(
                    0,
                    name,
                    measured.shape,
                    {},
                    measured.role,
                    measured.part,
                    measured.batch_dims,
                    measured.fan_in,
                    measured.all_names,
                )
                done = max(merged[name].values, default=0)
                for step, values in measured.values.items():
                    merged.record(done + step, name, measured.shape, values)
        return merged

    def _ambiguous_names(self) -> set[str]:
        owners: dict[str, set[int]] = {}
        for watched in self._watched.values():
            for name, parameter in watched.recorder.parameters.items():
                owners.setdefault(name, set()).add(id(parameter))
        return {name for name, parameters in owners.items() if len(parameters) > 1}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the optimizer steps of this process, and turn SIGTERM into :class:`Terminated`."""
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        try:
            with self._sigterm_raises():
                yield
        finally:
            before.remove()
            after.remove()
            self._learning_rate.restore_all()

    @disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._process:  # a forked child has inherited the hooks
            return
        # Before its first step an optimizer has no state yet to tell what it is by.
        if is_adam_like(optimizer) or (not optimizer.state and "betas" in optimizer.defaults):
            self._learning_rate.apply(optimizer)

    @disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._process:
            return
        self._learning_rate.restore(optimizer)
        steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if optimizer not in self._failed:
            self._measure(optimizer)
        if steps > self._most_steps:
            self._most_steps = steps
            self._on_step(steps)
        if self._terminated:
            raise Terminated
        if self._max_steps is not None and steps >= self._max_steps:
            raise StopScript

    def _measure(self, optimizer: Optimizer) -> None:
        try:
            if optimizer not in self._watched and is_adam_like(optimizer):
                self._watch(optimizer)
            if optimizer in self._watched:
                self._watched[optimizer].recorder.after_step()
        except Exception as error:  # the script must not notice that it is being measured
            self._failed.add(optimizer)
            self.problems.append(f"stopped measuring {type(optimizer).__name__}: {error}")

    def _watch(self, optimizer: Optimizer) -> None:
        recorder = SNRRecorder(optimizer, schedule=self._schedule, attach=False)
        self._watched[optimizer] = _Watched(recorder, prefix_of(recorder.parameters.values()))

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
                raise Terminated

        signal.signal(signal.SIGTERM, handle)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGTERM) is handle:
                signal.signal(signal.SIGTERM, signal.SIG_IGN if self._terminated else signal.SIG_DFL)
