"""``slimadam mix``: relative critical sharpness over the mixing ratio at a checkpoint, and the ratio to train at."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.optim import Optimizer

from slimadam.cli.console import FiniteRange, OutputPath, call, status_console
from slimadam.curvature.mixing.advise import advise_mix
from slimadam.utils.atomic_write import write_whole

_NO_ADVICE = 1
_PICTURES = (".png", ".svg", ".pdf")


@click.command("mix")
@click.argument("builder", metavar="MODULE:CALLABLE")
@click.option("--ratios", metavar="R,R,...", help="Shares of the first of two domains to try.  [default: 0,0.1,...,1]")
@click.option("--batches", type=click.IntRange(1), default=8,
              help="How often all is measured, each time on other batches.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the resampling that the intervals come from.")
@click.option("--momentum", type=click.Choice(["settled", "kept"]), default="settled",
              help="First moments as they become under each mix, or as they are.")  # fmt: skip
@click.option("--max-grad-norm", type=FiniteRange(0, min_open=True),
              help="Clip the mixed gradients to this norm, as in training.")  # fmt: skip
@click.option("--tol", type=FiniteRange(0, 1, min_open=True, max_open=True), default=1 / 16,
              help="How closely each critical rate is found.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=OutputPath(), help="A picture of the curves to write, .png, .svg or .pdf.")
@click.option("--out", type=OutputPath(), help="A CSV file of the curves to write.")
def _mix(builder: str, ratios: str | None, as_json: bool, plot: Path | None, out: Path | None, **options: Any) -> None:
    """Advise how much of each domain to train on next, at a checkpoint, without training.

    MODULE:CALLABLE is a function of yours that takes nothing, loads the checkpoint, and returns (optimizer, losses):
    the optimizer with its state, and for each domain, by name, a function from the number of a batch to the model's
    mean loss on it. A third element, in the same form, names other tasks that must not get worse.

    Exit codes: 0 advised, 1 at each mix some task has no safe step, 2 trouble.
    """
    if plot is not None and plot.suffix not in _PICTURES:
        raise click.BadParameter(f"{str(plot)!r} must end in {', '.join(_PICTURES)}", param_hint="--plot")
    try:
        shares = None if ratios is None else [float(share) for share in ratios.split(",")]
    except ValueError as error:
        message = f"{ratios!r} must be numbers between commas, as 0,0.5,1"
        raise click.BadParameter(message, param_hint="--ratios") from error
    optimizer, losses, tasks = _built(builder)
    try:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=status_console()) as bar:
            task = bar.add_task("measuring", total=None)
            advice = advise_mix(
                optimizer, losses, tasks=tasks, ratios=shares, **options,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        if plot is not None:
            advice.plot(plot)
    except (TypeError, ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    except Exception as error:  # a loss of the user's may raise anything; exit code 1 means something else
        traceback.print_exc()
        raise click.UsageError(f"{builder}: {type(error).__name__}: {error}") from error
    if out is not None:
        rows = advice.rows()
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([rows[0].keys(), *(row.values() for row in rows)])
        write_whole(out, table.getvalue())
    if as_json:
        click.echo(json.dumps(advice.to_dict(), allow_nan=False))
    else:
        click.echo(advice.table())
        click.echo(str(advice))
    sys.exit(_NO_ADVICE if math.isnan(advice.ratio) else 0)


def _built(builder: str) -> tuple[Optimizer, Mapping[str, Any], Mapping[str, Any] | None]:
    built = call(builder, "MODULE:CALLABLE")
    if not isinstance(built, (tuple, list)) or len(built) not in (2, 3) or not isinstance(built[0], Optimizer):
        raise click.BadParameter(
            f"{builder!r} returned {built!r:.80}, not (optimizer, losses) or (optimizer, losses, tasks)",
            param_hint="MODULE:CALLABLE",
        )
    return built[0], built[1], built[2] if len(built) == 3 else None
