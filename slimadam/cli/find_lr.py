"""``slimadam find-lr``: the critical learning rate of an unmodified training script."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import click
import torch
from rich.console import Console
from torch.optim import Optimizer

from slimadam.cli.console import NOTHING_DONE, SCRIPT_FAILED, FiniteRange, is_main_rank, status_console
from slimadam.cli.script.runner import SCRIPT_SETTINGS, Children, StopScript, run_script, script_arguments, step_hooks
from slimadam.curvature.critical import CriticalSharpness, SharpnessMeasurement
from slimadam.curvature.probe.line import LineProbe
from slimadam.curvature.probe.loss_recorder import LossRecorder, ReplayError

_START = 1e-6
_LARGEST = 1e9
_MAX_FORWARDS = 100
_REMEDY = "Train in one process, or call slimadam.critical_lr(optimizer, closure) in the script"


class _Finder:
    """Measures inside the optimizer step of a running script, and ends the script."""

    def __init__(self, step: int, max_lr: float) -> None:
        self.step = step
        self.max_lr = max_lr
        self.measured: SharpnessMeasurement | None = None
        self.optimizer = ""
        self.lr = 0.0
        self.micro_batches = 0
        self.problem = "no optimizer of torch stepped"
        self._recorder = LossRecorder()
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._recorder.recording = self.step == 1
        with step_hooks(self._before_step, self._after_step), self._recorder.watching():
            yield

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.measured is not None:  # a script that caught StopScript goes on
            raise StopScript
        steps = self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self.problem = f"no optimizer reached step {self.step}"
        if steps < self.step:
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args begins with the optimizer
        if closure is not None:
            with torch.enable_grad():
                closure()
        self._recorder.recording = False
        try:
            self._measure(optimizer)
        except (ReplayError, RuntimeError, TypeError, ValueError) as error:
            self.problem = str(error)
        raise StopScript

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._steps.get(optimizer, 0) == self.step - 1:
            self._recorder.recording = True

    def _measure(self, optimizer: Optimizer) -> None:
        loss = self._recorder.replay([param for group in optimizer.param_groups for param in group["params"]])
        with LineProbe(optimizer) as line:
            loss.check(line.loss(loss))
        probe = CriticalSharpness(
            optimizer, start=_START, max_lr=self.max_lr, max_forwards=_MAX_FORWARDS, rounding=loss.rounding
        )
        self.measured = probe.measure(loss)
        self.optimizer = type(optimizer).__name__
        self.micro_batches = loss.micro_batches
        self.lr = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


@click.command("find-lr", context_settings=SCRIPT_SETTINGS)
@click.option("--step", type=click.IntRange(1), default=1,
              help="Optimizer step at which to measure; the script ends there.")  # fmt: skip
@click.option("--max-lr", type=FiniteRange(0, min_open=True), default=_LARGEST, show_default=False,
              help="Largest learning rate to try, for instance the target of the warmup.")  # fmt: skip
@click.option("--warmup-steps", type=click.IntRange(1), default=1000,
              help="Length of the plain warmup, for the steps saved.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON on stdout.")
@script_arguments
def _find_lr(step: int, max_lr: float, warmup_steps: int, as_json: bool, **command: Any) -> None:
    """Run a training script unmodified up to an optimizer step and find that step's critical learning rate.

    It is the smallest rate at which the step raises the loss of its own batch: where a warmup may start. The script
    ends before the step is taken. It trains in one process, not under torchrun. Everything after SCRIPT goes to the
    script. Exit codes: 0 done, 1 the script failed, 2 usage, 3 nothing to measure: no optimizer stepped, or its loss
    cannot be computed again.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise click.UsageError(
            f"find-lr follows a script that trains in one process, and this is one of {processes} processes: run it "
            "without torchrun, or call slimadam.critical_lr(optimizer, closure) in the script, which measures over all "
            "of them"
        )
    console, stdout = status_console(), sys.stdout
    say = partial(console.print, "slimadam:")
    finder = _Finder(step, max_lr)
    children = Children(say, _REMEDY)
    with finder.watching(), children.noticed():
        outcome = run_script(**command)
    outcome.show_error()
    if outcome.exit_code:
        say(f"the script failed (exit code {outcome.exit_code})")
        sys.exit(SCRIPT_FAILED)
    measured = finder.measured
    if measured is None:
        say(f"nothing was measured: {finder.problem}{children.elsewhere}")
        sys.exit(NOTHING_DONE)
    _summarize(console, finder, measured, warmup_steps)
    if as_json and is_main_rank():
        click.echo(json.dumps(_result(finder, measured)), file=stdout)
    if measured.status not in ("found", "noisy", "no increase"):
        sys.exit(NOTHING_DONE)


def _result(finder: _Finder, measured: SharpnessMeasurement) -> dict[str, Any]:
    """Return the result as data; infinity and NaN, which JSON does not have, are null."""
    critical_lr, *bracket, loss = (
        value if math.isfinite(value) else None for value in (measured.critical_lr, *measured.bracket, measured.loss)
    )
    return {
        "critical_lr": critical_lr,
        "bracket": bracket,
        "forward_passes": measured.forward_passes,
        "loss": loss,
        "status": measured.status,
        "step": finder.step,
        "micro_batches": finder.micro_batches,
        "optimizer": finder.optimizer,
        "script_lr": finder.lr,
    }


def _summarize(console: Console, finder: _Finder, measured: SharpnessMeasurement, warmup_steps: int) -> None:
    say = partial(console.print, "slimadam:")
    where = f"step {finder.step} of {finder.optimizer}"
    if finder.micro_batches > 1:
        where += f", the sum of {finder.micro_batches} losses"
    if measured.status not in ("found", "noisy"):
        limit = f" of the loss up to {finder.max_lr:g}" if measured.status == "no increase" else ""
        say(f"no critical learning rate at {where}: {measured.status}{limit}")
        if measured.status == "too noisy":
            say("the script computes in 16 bits, whose rounding hides it: run it in float32")
        if measured.status == "no increase" and finder.lr <= finder.max_lr:
            say(f"the script's own learning rate {finder.lr:g} needs no warmup on this account")
        return
    lower, upper = measured.bracket
    say(
        f"critical learning rate {measured.critical_lr:.3g} at {where}, between {lower:.3g} and {upper:.3g} "
        f"({measured.forward_passes} forward passes)"
    )
    if not finder.lr:
        return
    share = measured.critical_lr / finder.lr
    say(f"the script's own learning rate is {finder.lr:g}, {1 / share:.3g} times that")
    if share >= 1:
        say("it needs no warmup on this account")
    else:
        say(f"{int(warmup_steps * share)} of {warmup_steps} steps of warmup are saved by starting there:")
        console.print(
            f"scheduler = slimadam.CatapultWarmup(optimizer, warmup_steps={warmup_steps}, "
            f"critical_lr={measured.critical_lr:.3g})"
        )
