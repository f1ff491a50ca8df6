"""``slimadam run``: an unmodified training script with SlimAdam in place of Adam and AdamW."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

from slimadam.cli.console import NOTHING_DONE, SCRIPT_FAILED, status_console
from slimadam.cli.script.runner import SCRIPT_SETTINGS, Children, run_script, script_arguments
from slimadam.cli.script.substitution import NamedPlan, ScriptPlan, Substitution
from slimadam.plans.auto import AutoPlan
from slimadam.plans.plan import CompressionPlan
from slimadam.utils.errors import PlanError, did_you_mean

_SHOWN_NAMES = 5
_REMEDY = (
    "Let torchrun start them (torchrun -m slimadam run ...), or build slimadam.SlimAdam in the script instead of AdamW"
)


@click.command("run", context_settings=SCRIPT_SETTINGS)
@click.option("--plan", "plan_name", required=True, metavar="PLAN",
              help="A plan file; 'auto': measure for 200 steps, then decide; 'rules': the paper's table by layer role; "
              "'factored': row and column averages of each matrix; 'none': nothing compressed.")  # fmt: skip
@script_arguments
def _run(plan_name: str, **command: Any) -> None:
    """Run a training script unmodified, with SlimAdam in place of torch.optim.Adam and AdamW.

    Everything after SCRIPT goes to the script. Exit codes: 0 done, 1 the script failed, 2 usage, or the plan does
    not fit, 3 the script built no Adam or AdamW.
    """
    say = partial(status_console().print, "slimadam:")
    substitution = Substitution(_read_plan(plan_name))
    children = Children(say, _REMEDY, follows_fork=True)
    with substitution.active(), children.noticed():
        outcome = run_script(**command)
    if isinstance(outcome.error, PlanError):
        raise outcome.error
    outcome.show_error()
    if substitution.memory:
        _summarize(say, substitution)
    if outcome.exit_code:
        say(f"the script failed (exit code {outcome.exit_code})")
        sys.exit(SCRIPT_FAILED)
    if substitution.memory:
        substitution.check_matched()
    elif substitution.built_anywhere:
        say("Adam and AdamW were replaced in processes that the script forked; what was saved there is not known here")
    else:
        say(
            "nothing was replaced in this process, and in those that the script started all is torch's, as said above"
            if children.unfollowed
            else "nothing was replaced: the script built no torch.optim.Adam or AdamW in this process"
        )
        sys.exit(NOTHING_DONE)


def _read_plan(name: str) -> ScriptPlan:
    known = get_args(NamedPlan)
    if name in known:
        return name  # type: ignore[return-value]
    if not Path(name).exists():
        hint = did_you_mean(name, known)
        raise PlanError(f"--plan {name!r} is neither a file nor one of {', '.join(known)}{'; ' if hint else ''}{hint}")
    return CompressionPlan.load(name)


def _summarize(say: Callable[[str], None], substitution: Substitution) -> None:
    reports = substitution.memory.values()
    kept = sum(report.exp_avg_sq for report in reports)
    full = sum(report.adamw_exp_avg_sq for report in reports)
    say(
        f"second moments of {len(reports)} optimizer(s) take {kept:,} bytes instead of {full:,}, "
        f"{1 - kept / full if full else 0:.1%} saved"
    )
    undecided = sum(substitution.undecided.values())
    if undecided:
        say(
            f"{undecided} optimizer(s) had not decided yet: plan 'auto' runs as AdamW for its first "
            f"{AutoPlan().calibration_steps} steps; train longer, or calibrate first"
        )
    for message, names in (
        ("entries of the plan matched no parameter", substitution.unused),
        ("parameters are not in the plan and stay in full", substitution.uncovered),
    ):
        if names:
            more = ", ..." if len(names) > _SHOWN_NAMES else ""
            say(f"{len(names)} {message}: {', '.join(names[:_SHOWN_NAMES])}{more}")
