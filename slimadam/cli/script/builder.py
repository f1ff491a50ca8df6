"""What the user's own code builds, named on the command line as ``MODULE:CALLABLE``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click


def call(builder: str, argument: str) -> Any:
    """The result of calling ``MODULE:CALLABLE``, modules of the working folder included.

    Args:
        builder: What to call, without arguments.
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
