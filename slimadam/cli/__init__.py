"""The command line: thin shells over the package's functions. Needs the extra ``slimadam[cli]``."""

from __future__ import annotations

import importlib
from typing import Any

import click

from slimadam.utils.errors import PlanError
from slimadam.utils.version import __version__

_COMMANDS = {
    "calibrate": "Run a training script, measure, write a plan.",
    "demo": "Calibrate and train a small model on embedded data.",
    "find-lr": "Find the critical learning rate of a training script.",
    "mix": "Advise how much of each domain to train on next.",
    "plan": "Show, compare, carry over and check plan files.",
    "run": "Run a training script with SlimAdam in place of Adam and AdamW.",
}
"""The function of ``find-lr`` is ``_find_lr`` in the module ``find_lr``, and so on."""


class _LazyGroup(click.Group):
    """Imports a command when it is used, and reports wrong input in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"slimadam.cli.{name}"), f"_{name}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly: whoever reads has read enough
        except (PlanError, OSError) as error:
            click.echo(f"slimadam: {error}", err=True)
            ctx.exit(2)


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="slimadam")
def cli() -> None:
    """Store Adam's second moments only as finely as a measurement says each layer needs."""
