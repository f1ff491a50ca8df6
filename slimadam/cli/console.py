"""Where the commands say what: our own words go to stderr, and under ``torchrun`` only from rank 0."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Final

import click
from rich.console import Console


def is_main_rank() -> bool:
    """Whether this process may write files and speak: alone, or rank 0 of a ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def status_console() -> Console:
    """A console on the present stderr, silent on the other ranks."""
    return Console(
        file=sys.stderr, quiet=not is_main_rank(), markup=False, highlight=False, emoji=False, soft_wrap=True
    )


def output_path(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Callback of options naming a file to write: refuses what cannot be written, before anything runs."""
    if value is None:
        return None
    path = Path(value).absolute()
    if not is_main_rank():  # perhaps on another machine, and it writes nothing
        return path
    if path.is_dir():
        raise click.BadParameter(f"{value!r} is a folder; name a file", ctx, parameter)
    if not path.parent.is_dir():
        raise click.BadParameter(f"the folder {str(path.parent)!r} does not exist; create it", ctx, parameter)
    # A file is replaced in one move, for which its folder must be writable; a device is written to.
    needed = [path.resolve().parent] if path.is_file() or not path.exists() else []
    if not all(os.access(place, os.W_OK) for place in [*needed, *([path] if path.exists() else [])]):
        raise click.BadParameter(f"{value!r} is not writable", ctx, parameter)
    return path


def finite(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    """Callback of options that take a number: refuses NaN and infinity."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number", ctx, parameter)
    return value


def finite_or_none(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """As :func:`finite`, for options that may be left out."""
    return None if value is None else finite(ctx, parameter, value)


def percent(share: float) -> str:
    """``0.9943`` as ``99.4%``."""
    return f"{100 * share:.1f}%"


DONE: Final = 0


SCRIPT_FAILED: Final = 1


NOTHING_DONE: Final = 3
