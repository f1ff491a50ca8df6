"""``slimadam calibrate``: measure the second moments of an unmodified training script."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from slimadam.cli.children import Children
from slimadam.cli.console import (
    DONE,
    NOTHING_DONE,
    SCRIPT_FAILED,
    finite,
    finite_or_none,
    is_main_rank,
    output_path,
    percent,
    status_console,
)
from slimadam.cli.script.observer import Observer
from slimadam.cli.script.runner import SCRIPT_SETTINGS, SIGTERM_EXIT, Outcome, Script, script_arguments
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import every, paper_schedule
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms, idle_patterns

_REDRAW_SECONDS = 0.1
_REMEDY = (
    "Let torchrun start them (torchrun -m slimadam calibrate ...), or use slimadam.SNRRecorder(optimizer) in the script"
)


@dataclass(frozen=True)
class _Files:
    plan: Path
    report: Path | None
    history: Path | None

    def write(self, plan: CompressionPlan, history: SNRHistory, facts: dict[str, str]) -> dict[str, str]:
        """Write what was asked for; returns the path of each kind of file."""
        for path in (self.plan, self.report, self.history):
            if path is not None:  # the script may have removed the folder
                path.parent.mkdir(parents=True, exist_ok=True)
        plan.save(self.plan)
        written = {"plan": str(self.plan)}
        if self.history is not None:
            history.save_csv(self.history)
            written["history"] = str(self.history)
        if self.report is not None:
            from slimadam.report import write_report

            write_report(self.report, plan, history, facts=facts)
            written["report"] = str(self.report)
        return written


@click.command(context_settings=SCRIPT_SETTINGS)
@click.option("--steps", type=click.IntRange(min=1), help="End the script after so many optimizer steps.")
@click.option(
    "--cutoff", type=click.FloatRange(min=0), default=1.0, show_default=True, callback=finite,
    help="SNR that averaging must exceed to be chosen.",
)  # fmt: skip
@click.option(
    "--budget", type=click.FloatRange(0, 1), callback=finite_or_none,
    help="Instead of a cutoff: save at least this share of second moments and lose the least SNR.",
)  # fmt: skip
@click.option(
    "--forms", type=click.Choice(["mean", "best"]), default="best", show_default=True,
    help="mean: averages only, as in the paper. best: row and column averages compete too.",
)  # fmt: skip
@click.option("--keep", multiple=True, metavar="PATTERN", help="Names or roles to keep in full; may be repeated.")
@click.option(
    "--every", "interval", type=click.IntRange(min=1),
    help="Measure at step 1 and every so many steps. Default: every 100, after step 1000 every 1000.",
)  # fmt: skip
@click.option(
    "--lr-scale", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
    callback=finite,
    help="Factor on the learning rate of Adam-like optimizers; 0.1 is recommended.",
)  # fmt: skip
@click.option("--out", default="plan.json", show_default=True, callback=output_path, help="The plan to write.")
@click.option("--report", callback=output_path, help="An HTML page with the numbers and plots to write.")
@click.option("--history", callback=output_path, help="A CSV file with every measurement to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON on stdout.")
@script_arguments
@click.pass_context
def calibrate(
    ctx: click.Context,
    steps: int | None,
    cutoff: float,
    budget: float | None,
    forms: Forms,
    keep: tuple[str, ...],
    interval: int | None,
    lr_scale: float,
    out: Path,
    report: Path | None,
    history: Path | None,
    as_json: bool,
    is_module: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run a training script unmodified, measure its second moments and write a compression plan.

    The script's optimizer is torch.optim.Adam, AdamW or any that keeps exp_avg_sq. Everything after SCRIPT
    goes to the script. Exit codes: 0 done, 1 the script failed (what was measured is still written), 2 usage,
    3 nothing to calibrate.
    """
    if budget is not None and ctx.get_parameter_source("cutoff") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--cutoff and --budget exclude each other; choose one")
    outputs = [path for path in (out, report, history) if path is not None]
    if len(set(outputs)) != len(outputs):
        raise click.UsageError("--out, --report and --history name the same file; give each its own")
    console, stdout = status_console(), sys.stdout
    children = Children(console, _REMEDY)
    with _progress(console, steps) as on_step:
        schedule = paper_schedule if interval is None else every(interval)
        observer = Observer(schedule, steps, lr_scale, on_step)
        with observer.watching(), children.noticed():
            outcome = Script(script, arguments, is_module).run()
    outcome.show_error()
    for problem in observer.problems:
        console.print(f"slimadam: {problem}")
    result = _empty_result(observer, outcome)
    if observer.optimizers:
        measured = observer.history()
        plan = _plan(console, measured, cutoff, budget, forms, keep)
        result |= _result_of(plan)
        if is_main_rank():
            facts = {"script": script, "learning rate": f"the script's, times {lr_scale:g}"}
            result["files"] = _Files(out, report, history).write(plan, measured, facts)
        if plan.expectation is not None:
            console.print(f"slimadam: {plan.expectation}")
        _summarize(console, result, measured, lr_scale)
        _warn_of_idle_patterns(console, keep, measured)
    if as_json and is_main_rank():
        click.echo(json.dumps(result), file=stdout)
    ctx.exit(_exit_code(console, observer, outcome, children))


def _plan(
    console: Console,
    measured: SNRHistory,
    cutoff: float,
    budget: float | None,
    forms: Forms,
    keep: tuple[str, ...],
) -> CompressionPlan:
    """The plan; where the budget is out of reach, the one by cutoff, so that no measurement is lost."""
    idle = idle_patterns(keep, measured)
    fitting = [pattern for pattern in keep if pattern not in idle]
    try:
        return CompressionPlan.from_snr(measured, cutoff, budget=budget, forms=forms, keep=fitting)
    except ValueError as error:
        console.print(f"slimadam: {error}; the plan is by the cutoff {cutoff:g} instead")
        return CompressionPlan.from_snr(measured, cutoff, forms=forms, keep=fitting)


@contextmanager
def _progress(console: Console, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, redrawn from the training loop itself: no thread, and no stream is redirected."""
    if console.quiet or not console.is_terminal:
        yield lambda step: None  # a bar that is switched off still ends a line in some releases of rich
        return
    bar = Progress(
        TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    task = bar.add_task("calibrating", total=total)
    drawn = 0.0

    def on_step(step: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        due = now - drawn >= _REDRAW_SECONDS
        bar.update(task, completed=step, refresh=due)
        drawn = now if due else drawn

    with bar:
        yield on_step


def _empty_result(observer: Observer, outcome: Outcome) -> dict[str, Any]:
    return {
        "steps": observer.steps,
        "optimizers": observer.optimizers,
        "parameters": 0,
        "compressed": 0,
        "second_moments_saved": 0.0,
        "files": {},
        "script_exit": outcome.exit_code,
    }


def _result_of(plan: CompressionPlan) -> dict[str, Any]:
    return {
        "parameters": len(plan),
        "compressed": sum(rule.form != "full" for rule in plan.values()),
        "second_moments_saved": plan.second_moments_saved,
        "averaged_away": None if plan.expectation is None else plan.expectation.averaged_away,
    }


def _summarize(console: Console, result: dict[str, Any], history: SNRHistory, lr_scale: float) -> None:
    measured = len(history.steps)
    console.print(
        f"slimadam: {result['steps']} steps, measured at {measured}; {result['compressed']} of "
        f"{result['parameters']} parameters compressed, {percent(result['second_moments_saved'])} of second "
        "moments saved"
    )
    for kind, path in result["files"].items():
        console.print(f"slimadam: {kind} written to {path}")
    if measured == 1 and result["steps"] > 1:
        console.print("slimadam: only one step was measured; train longer or pass a smaller --every")
    if lr_scale == 1.0:
        console.print(
            "slimadam: measured at the script's own learning rate; about a tenth of the training rate is "
            "recommended: --lr-scale 0.1"
        )


def _warn_of_idle_patterns(console: Console, keep: tuple[str, ...], measured: SNRHistory) -> None:
    for pattern in idle_patterns(keep, measured):
        console.print(f"slimadam: --keep {pattern}: no parameter has such a name or role")


def _exit_code(console: Console, observer: Observer, outcome: Outcome, children: Children) -> int:
    if outcome.exit_code:
        how = "was terminated" if outcome.exit_code == SIGTERM_EXIT else f"failed (exit code {outcome.exit_code})"
        console.print(f"slimadam: the script {how}")
        return SCRIPT_FAILED
    if not observer.optimizers:
        console.print(
            "slimadam: nothing to calibrate: no optimizer that keeps exp_avg_sq (Adam, AdamW) stepped"
            f"{children.elsewhere}"
        )
        return NOTHING_DONE
    return DONE
