"""``slimadam run``: an unmodified training script with SlimAdam in place of Adam and AdamW."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import get_args

import click
from rich.console import Console

from slimadam.cli.children import Children
from slimadam.cli.console import DONE, NOTHING_DONE, SCRIPT_FAILED, percent, status_console
from slimadam.cli.script.runner import SCRIPT_SETTINGS, Script, script_arguments
from slimadam.cli.script.substitution import NamedPlan, ScriptPlan, Substitution
from slimadam.plans.auto import AutoPlan
from slimadam.plans.plan import CompressionPlan
from slimadam.utils.errors import PlanError

_SHOWN_NAMES = 5
_REMEDY = (
    "Let torchrun start them (torchrun -m slimadam run ...), or build slimadam.SlimAdam in the script instead of AdamW"
)


@click.command(context_settings=SCRIPT_SETTINGS)
@click.option(
    "--plan", "plan_name", required=True, metavar="PLAN",
    help="A plan file; 'auto': measure for 200 steps, then decide; 'rules': the paper's table by layer role; "
    "'factored': row and column averages of each matrix; 'none': nothing compressed.",
)  # fmt: skip
@script_arguments
@click.pass_context
def run(ctx: click.Context, plan_name: str, is_module: bool, script: str, arguments: tuple[str, ...]) -> None:
    """Run a training script unmodified, with SlimAdam in place of torch.optim.Adam and AdamW.

    Everything after SCRIPT goes to the script. Exit codes: 0 done, 1 the script failed, 2 usage, or the plan does
    not fit, 3 the script built no Adam or AdamW.
    """
    console = status_console()
    substitution = Substitution(_read_plan(plan_name))
    children = Children(console, _REMEDY, follows_fork=True)
    with substitution.active(), children.noticed():
        outcome = Script(script, arguments, is_module).run()
    if isinstance(outcome.error, PlanError):
        raise outcome.error
    outcome.show_error()
    _summarize(console, substitution)
    if outcome.exit_code:
        console.print(f"slimadam: the script failed (exit code {outcome.exit_code})")
        ctx.exit(SCRIPT_FAILED)
    if not substitution.memory:
        console.print(f"slimadam: {_why_nothing(substitution, children)}")
        ctx.exit(DONE if substitution.built_anywhere else NOTHING_DONE)
    substitution.check_matched()
    ctx.exit(DONE)


def _why_nothing(substitution: Substitution, children: Children) -> str:
    if substitution.built_anywhere:
        return (
            "Adam and AdamW were replaced in processes that the script forked; what was saved there is not known here"
        )
    if children.unfollowed:
        return (
            "nothing was replaced in this process, and in those that the script started all is torch's, as said above"
        )
    return "nothing was replaced: the script built no torch.optim.Adam or AdamW in this process"


def _read_plan(name: str) -> ScriptPlan:
    known = get_args(NamedPlan)
    if name in known:
        return name  # type: ignore[return-value]
    if not Path(name).exists():
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PlanError(f"--plan {name!r} is neither a file nor one of {', '.join(known)}{hint}")
    return CompressionPlan.load(name)


def _summarize(console: Console, substitution: Substitution) -> None:
    reports = substitution.memory.values()
    if not reports:
        return
    kept = sum(report.exp_avg_sq for report in reports)
    full = sum(report.adamw_exp_avg_sq for report in reports)
    saved = 1 - kept / full if full else 0.0
    console.print(
        f"slimadam: second moments of {len(reports)} optimizer(s) take {kept:,} bytes instead of {full:,}, "
        f"{percent(saved)} saved"
    )
    if substitution.undecided:
        console.print(
            f"slimadam: {len(substitution.undecided)} optimizer(s) had not decided yet: plan 'auto' runs as AdamW for "
            f"its first {AutoPlan().calibration_steps} steps; train longer, or calibrate first"
        )
    _list_names(console, "entries of the plan matched no parameter", substitution.unused)
    _list_names(console, "parameters are not in the plan and stay in full", substitution.uncovered)


def _list_names(console: Console, what: str, names: list[str]) -> None:
    if names:
        more = ", ..." if len(names) > _SHOWN_NAMES else ""
        console.print(f"slimadam: {len(names)} {what}: {', '.join(names[:_SHOWN_NAMES])}{more}")
