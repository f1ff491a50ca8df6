"""``slimadam calibrate``: measure the second moments of an unmodified training script."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimadam.cli.console import NOTHING_DONE, SCRIPT_FAILED, FiniteRange, OutputPath, is_main_rank, status_console
from slimadam.cli.script.observer import Observer
from slimadam.cli.script.runner import SCRIPT_SETTINGS, SIGTERM_EXIT, Children, run_script, script_arguments
from slimadam.measurement.recorder import every, paper_schedule
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms, idle_patterns
from slimadam.report import write_report

_REDRAW_SECONDS = 0.1
_REMEDY = (
    "Let torchrun start them (torchrun -m slimadam calibrate ...), or use slimadam.SNRRecorder(optimizer) in the script"
)


@click.command("calibrate", context_settings=SCRIPT_SETTINGS)
@click.option("--steps", type=click.IntRange(1), help="End the script after so many optimizer steps.")
@click.option(
    "--cutoff",
    type=FiniteRange(0),
    default=1.0,
    help="SNR that averages must exceed; with --forms closest, three times it.",
)
@click.option("--budget", type=FiniteRange(0, 1), help="Instead of a cutoff: save at least this share of second "
              "moments by averages, at the least loss.")  # fmt: skip
@click.option("--forms", type=click.Choice(get_args(Forms)), default="closest",
              help="mean: averages only, as in the paper. best: row and column averages compete too. closest: "
              "these where their SNR is above three times the cutoff, else one byte for each element.")  # fmt: skip
@click.option("--keep", multiple=True, metavar="PATTERN", help="Names or roles to keep in full; may be repeated.")
@click.option("--every", "interval", type=click.IntRange(1), help="Measure at step 1 and every so many steps. "
              "Default: every 100, after step 1000 every 1000.")  # fmt: skip
@click.option("--lr-scale", type=FiniteRange(0, min_open=True), default=1.0,
              help="Factor on the learning rate of Adam-like optimizers; 0.1 is recommended.")  # fmt: skip
@click.option("--out", default="plan.json", type=OutputPath(), help="The plan to write.")
@click.option("--report", type=OutputPath(), help="An HTML page with the numbers and plots to write.")
@click.option("--history", type=OutputPath(), help="A CSV file with every measurement to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON on stdout.")
@script_arguments
def _calibrate(
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
    **command: Any,
) -> None:
    """Run a training script unmodified, measure its second moments and write a compression plan.

    The script's optimizer is torch.optim.Adam, AdamW or any that keeps exp_avg_sq. Everything after SCRIPT
    goes to the script. Exit codes: 0 done, 1 the script failed (what was measured is still written), 2 usage,
    3 nothing to calibrate.
    """
    if budget is not None and click.get_current_context().get_parameter_source("cutoff") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--cutoff and --budget exclude each other; choose one")
    named = {"plan": out, "history": history, "report": report}
    files = {kind: path for kind, path in named.items() if path is not None}
    if len(set(files.values())) != len(files):
        raise click.UsageError("--out, --report and --history name the same file; give each its own")
    console, stdout = status_console(), sys.stdout
    say = partial(console.print, "slimadam:")
    children = Children(say, _REMEDY)
    with _progress(console, steps) as on_step:
        observer = Observer(paper_schedule if interval is None else every(interval), steps, lr_scale, on_step)
        with observer.watching(), children.noticed():
            outcome = run_script(**command)
    outcome.show_error()
    for problem in observer.problems:
        say(problem)
    plan = CompressionPlan({})
    if observer.optimizers:
        measured = observer.history()
        idle = idle_patterns(keep, measured)
        kept = [pattern for pattern in keep if pattern not in idle]
        choose = partial(CompressionPlan.from_snr, measured, cutoff, forms=forms, keep=kept)
        try:
            plan = choose(budget=budget)
        except ValueError as error:  # out of reach, but what was measured is not to be lost
            say(f"{error}; the plan is by the cutoff {cutoff:g} instead")
            plan = choose()
    result: dict[str, Any] = {
        "steps": observer.steps,
        "optimizers": observer.optimizers,
        "parameters": len(plan),
        "compressed": sum(not rule.is_full for rule in plan.values()),
        "second_moments_saved": plan.second_moments_saved,
        "files": {},
        "script_exit": outcome.exit_code,
    }
    if observer.optimizers:
        result["averaged_away"] = None if plan.expectation is None else plan.expectation.averaged_away
        if is_main_rank():
            for path in files.values():  # the script may have removed the folder
                path.parent.mkdir(parents=True, exist_ok=True)
            plan.save(out)
            if history is not None:
                measured.save_csv(history)
            if report is not None:
                facts = {"script": command["script"], "learning rate": f"the script's, times {lr_scale:g}"}
                write_report(report, plan, measured, facts=facts)
            result["files"] = {kind: str(path) for kind, path in files.items()}
        if plan.expectation is not None:
            say(str(plan.expectation))
        _summarize(say, result, len(measured.steps), lr_scale)
        for pattern in idle:
            say(f"--keep {pattern}: no parameter has such a name or role")
    if as_json and is_main_rank():
        click.echo(json.dumps(result), file=stdout)
    if outcome.exit_code:
        how = "was terminated" if outcome.exit_code == SIGTERM_EXIT else f"failed (exit code {outcome.exit_code})"
        say(f"the script {how}")
        sys.exit(SCRIPT_FAILED)
    if not observer.optimizers:
        say(f"nothing to calibrate: no optimizer that keeps exp_avg_sq (Adam, AdamW) stepped{children.elsewhere}")
        sys.exit(NOTHING_DONE)


@contextmanager
def _progress(console: Console, total: int | None) -> Iterator[Callable[[int], None]]:
    """Draw a bar on a terminal, redrawn from the training loop itself: no thread, and no stream is redirected."""
    if console.quiet or not console.is_terminal:
        yield lambda step: None  # a bar that is switched off still ends a line in some releases of rich
        return
    bar = Progress(
        TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    task = bar.add_task("calibrating", total=total)
    drawn = 0.0

    def on_step(step: int) -> None:
        nonlocal drawn
        due = time.monotonic() - drawn >= _REDRAW_SECONDS
        bar.update(task, completed=step, refresh=due)
        if due:
            drawn = time.monotonic()

    with bar:
        yield on_step


def _summarize(say: Callable[[str], None], result: dict[str, Any], measured: int, lr_scale: float) -> None:
    say(
        f"{result['steps']} steps, {measured} of them measured; {result['compressed']} of {result['parameters']} "
        f"parameters compressed, {result['second_moments_saved']:.1%} of second moments saved"
    )
    for kind, path in result["files"].items():
        say(f"{kind} written to {path}")
    if measured == 1 and result["steps"] > 1:
        say("only one step was measured; train longer or pass a smaller --every")
    if lr_scale == 1.0:
        say(
            "measured at the script's own learning rate; about a tenth of the training rate is recommended: "
            "--lr-scale 0.1"
        )
