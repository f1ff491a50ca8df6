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
from typing_extensions import override

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


class FiniteRange(click.FloatRange):
    """A number in a range that is neither NaN nor infinite."""

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number


class OutputPath(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click
    """A file that can be written, which is checked before anything runs."""

    name = "text"

    @override
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value).absolute()
        if not is_main_rank():  # perhaps on another machine, and it writes nothing
            return path
        if path.is_dir():
            self.fail(f"{value!r} is a folder; name a file", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"the folder {str(path.parent)!r} does not exist; create it", param, ctx)
        # A file is replaced in one move, for which its folder must be writable; a device is written to.
        needed = [path] if path.exists() else []
        if path.is_file() or not path.exists():
            needed.append(path.resolve().parent)
        if not all(os.access(place, os.W_OK) for place in needed):
            self.fail(f"{value!r} is not writable", param, ctx)
        return path


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
