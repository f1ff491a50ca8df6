"""Shared by the commands: exit codes, messages on stderr, checks of options, and calls of the user's own code."""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

SCRIPT_FAILED, NOTHING_DONE = 1, 3
"""Exit codes of the commands that run a script; click itself exits with 2 for wrong usage."""


def is_main_rank() -> bool:
    """Return whether this process may write files and print messages: alone, or rank 0 of a ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def status_console() -> Console:
    """Return a console on the present stderr, silent on the other ranks."""
    return Console(
        file=sys.stderr, quiet=not is_main_rank(), markup=False, highlight=False, emoji=False, soft_wrap=True
    )


def output_path(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """Check, before anything runs, that a file named by an option can be written.

    Args:
        ctx: Context of the command.
        parameter: The option, whose callback this is.
        value: Path of the file; None where the option is left out.

    Raises:
        click.BadParameter: It cannot be written.
    """
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
    needed = [path] if path.exists() else []
    if path.is_file() or not path.exists():
        needed.append(path.resolve().parent)
    if not all(os.access(place, os.W_OK) for place in needed):
        raise click.BadParameter(f"{value!r} is not writable", ctx, parameter)
    return path


def finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Check that a number given as an option is neither NaN nor infinite.

    Args:
        ctx: Context of the command.
        parameter: The option, whose callback this is.
        value: The number; None where the option is left out.

    Raises:
        click.BadParameter: It is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number", ctx, parameter)
    return value


def call(builder: str, argument: str) -> Any:
    """Return what the user's ``MODULE:CALLABLE`` returns; modules of the working folder are found too.

    Args:
        builder: The function to call, without arguments.
        argument: The option or argument that named it, for messages.

    Raises:
        click.BadParameter: It cannot be imported, or fails.
    """
    module_name, _, attribute = builder.partition(":")
    if not module_name or not attribute:
        raise click.BadParameter(f"{builder!r} must read MODULE:CALLABLE", param_hint=argument)
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), attribute)()
    except Exception as error:
        message = f"{builder!r} failed: {type(error).__name__}: {error}"
        raise click.BadParameter(message, param_hint=argument) from error
    finally:
        sys.path.remove("")
