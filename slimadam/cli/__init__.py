"""The command line: thin shells over the package's functions. Needs the extra ``slimadam[cli]``."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import click

from slimadam.utils.errors import PlanError
from slimadam.utils.version import __version__


class _Entry(NamedTuple):
    module: str
    attribute: str
    summary: str


_COMMANDS = {
    "calibrate": _Entry("slimadam.cli.calibrate", "calibrate", "Run a training script, measure, write a plan."),
    "demo": _Entry("slimadam.cli.demo", "demo", "Calibrate and train a small model on embedded data."),
    "find-lr": _Entry("slimadam.cli.find_lr", "find_lr", "Find the critical learning rate of a training script."),
    "mix": _Entry("slimadam.cli.mix", "mix", "Advise how much of each domain to train on next."),
    "plan": _Entry("slimadam.cli.plan", "plan", "Show, compare, carry over and check plan files."),
    "run": _Entry("slimadam.cli.run", "run", "Run a training script with SlimAdam in place of Adam and AdamW."),
}


class _LazyGroup(click.Group):
    """Imports a command when it is used, and reports wrong input in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly: whoever reads has read enough
        except (PlanError, OSError) as error:
            click.echo(f"slimadam: {error}", err=True)
            ctx.exit(2)


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slimadam")
def cli() -> None:
    """Store Adam's second moments only as finely as a measurement says each layer needs."""
