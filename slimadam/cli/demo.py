"""``slimadam demo``: calibrate and train a small model with AdamW and with SlimAdam, and compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimadam.cli.console import FiniteRange, status_console
from slimadam.demo import training
from slimadam.demo.data import DataError, load
from slimadam.demo.plot import draw
from slimadam.demo.summary import facts, to_dict
from slimadam.demo.training import DemoResult, DemoSettings, DivergedError, Phase, run_demo
from slimadam.report import write_report
from slimadam.report.labels import dims_label
from slimadam.utils.formatting import format_bytes

_DEFAULTS = DemoSettings()


@click.command("demo")
@click.option("--steps", type=click.IntRange(1), default=_DEFAULTS.steps,
              help="Optimizer steps of the calibration and of each training run.")  # fmt: skip
@click.option("--width", type=click.IntRange(1), default=_DEFAULTS.width,
              help=f"Width of the model, a multiple of its {_DEFAULTS.heads} attention heads.")  # fmt: skip
@click.option("--layers", type=click.IntRange(1), default=_DEFAULTS.layers, help="Transformer blocks.")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=_DEFAULTS.lr, help="Learning rate of both runs.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=_DEFAULTS.seed,
              help="Of the initialisation and the batches.")  # fmt: skip
@click.option("--data", "data_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Train on this file, its last tenth held out.  [default: Python's standard library]")  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, writable=True, path_type=Path), metavar="DIR",
              default="slimadam-demo", help="Folder for what the demo writes.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the content of result.json, not tables.")
def _demo(data_file: Path | None, out: Path, as_json: bool, **options: Any) -> None:
    """Train a small byte-level GPT with AdamW and with SlimAdam, and compare loss, memory and time.

    Calibrates at a tenth of the learning rate first; then both optimizers train from the same
    initialisation on the same batches. Writes plan.json, plan-best.json, report.html, loss.png and
    result.json. Takes about two minutes on one CPU core.
    """
    try:
        settings = DemoSettings(**options)
        data = load(data_file, settings.context)
    except ValueError as error:
        raise click.UsageError(f"--data: {error}" if isinstance(error, DataError) else f"--{error}") from error
    out.mkdir(parents=True, exist_ok=True)
    # A model this small gains little from more threads, and loses much where other programs hold the cores.
    torch.set_num_threads(1)
    try:
        with _progress(settings.steps) as progress:
            result = run_demo(settings, data, progress)
    except DivergedError as error:
        raise click.ClickException(str(error)) from error
    summary = to_dict(result, data)
    _write(out, result, summary)
    if as_json:
        click.echo(json.dumps(summary))
        return
    console = Console()
    console.print(_comparison(summary))
    console.print(_layers(summary))
    click.echo(f"Wrote plan.json, plan-best.json, report.html, loss.png and result.json to {out}")


@contextmanager
def _progress(steps: int) -> Iterator[training.Progress]:
    """Draw one bar for each phase on stderr, with the loss of the latest batch; where that is no terminal, a line."""
    tasks: dict[Phase, TaskID] = {}
    columns = (
        TextColumn("{task.description:<19}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=status_console()) as bars:

        def progress(phase: Phase, step: int, loss: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=steps, loss=loss)
                if not bars.console.is_terminal:
                    click.echo(f"{phase}: {steps} steps", err=True)
            bars.update(tasks[phase], completed=step, loss=loss)

        yield progress


def _write(out: Path, result: DemoResult, summary: dict[str, Any]) -> None:
    result.plan.save(out / "plan.json")
    result.best_plan.save(out / "plan-best.json")
    caption = "Loss in nats per byte on batches and on held-out text, and bytes of optimizer state"
    write_report(
        out / "report.html",
        result.plan,
        result.history,
        title="SlimAdam demo: a small byte-level GPT",
        facts=facts(summary),
        figures=[(caption, draw(result, "svg").decode())],
    )
    (out / "loss.png").write_bytes(draw(result, "png"))
    (out / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _comparison(summary: dict[str, Any]) -> Table:
    table = Table(title="AdamW and SlimAdam: same initialisation, same batches", title_justify="left",
                  caption="averages: the paper's method, plan.json; best form: row and column averages compete too, "
                  "plan-best.json", caption_justify="left")  # fmt: skip
    for column in ("", "AdamW", "SlimAdam, averages", "SlimAdam, best form"):
        table.add_column(column, justify="right" if column else "left")
    adamw, *slims = runs = [summary[name] for name in ("adamw", "slimadam", "best")]
    gaps = (summary["loss_gap"], summary["best"]["loss_gap"])
    losses = [f"{run['held_out_loss']:.4f} ({gap:+.2%})" for run, gap in zip(slims, gaps, strict=True)]
    table.add_row("held-out loss (nats per byte)", f"{adamw['held_out_loss']:.4f}", *losses)
    for label, key in (("second moments", "second_moment_bytes"), ("optimizer state", "state_bytes")):
        kept = [f"{format_bytes(run[key])} ({1 - run[key] / adamw[key]:.1%} saved)" for run in slims]
        table.add_row(label, format_bytes(adamw[key]), *kept)
    for label, key in (("ms per optimizer step", "median_optimizer_ms"), ("ms per training step", "median_step_ms")):
        table.add_row(label, *(f"{run[key]:.2f}" for run in runs))
    return table


def _layers(summary: dict[str, Any]) -> Table:
    table = Table(title="What the calibration chose, by layer role (SNR averaged over layers and steps)",
                  title_justify="left")  # fmt: skip
    for column in ("role", "tensors", "averaged over", "SNR dim 0", "SNR dim 1", "SNR dims 0, 1"):
        table.add_column(column, justify="right" if column.startswith(("SNR", "tensors")) else "left")
    for row in summary["layers"]:
        chosen = ", ".join(
            (dims_label(choice["dims"]) if choice["dims"] else "full")
            + (f" ({choice['tensors']})" if len(row["chosen"]) > 1 else "")
            for choice in row["chosen"]
        )
        snr = {candidate["dims"]: f"{candidate['value']:.2f}" for candidate in row["snr"]}
        table.add_row(row["role"], str(row["tensors"]), chosen, *(snr.get(dims, "") for dims in ((0,), (1,), (0, 1))))
    return table
