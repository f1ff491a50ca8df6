"""``slimadam plan``: show, compare and check plan files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from slimadam.cli.console import OutputPath, call
from slimadam.layers.roles import names_of
from slimadam.plans.plan import CompressionPlan, rule_to_dict
from slimadam.state.rule import FACTORED, Candidate, Rule, Source, fit_rules
from slimadam.utils.errors import PlanError

_PLAN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_UNBOUNDED_WIDTH = 100_000


@click.group("plan")
def _plan() -> None:
    """Show, compare, carry over and check plan files."""


@_plan.command("show")
@click.argument("file", metavar="PLAN", type=_PLAN_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the plan with its totals.")
def _show(file: Path, as_json: bool) -> None:
    """Print each parameter's rule, the SNR it was chosen by, and the reason."""
    loaded = CompressionPlan.load(file)
    kept, full = loaded.second_moments
    if as_json:
        saved = loaded.second_moments_saved
        totals = {"second_moments": full, "second_moments_kept": kept, "second_moments_saved": saved}
        click.echo(json.dumps(loaded.to_dict() | {"totals": totals}))
        return
    table = Table("parameter", "role", "shape", "SNR", "decision", "reason")
    for name, rule in loaded.items():
        shape = "" if rule.shape is None else "x".join(map(str, rule.shape)) or "scalar"
        snrs = "  ".join(f"{_candidate(candidate)}: {value:.3g}" for candidate, value in rule.snr.items())
        row = (name, rule.role, shape, snrs, _decision(rule), rule.reason)
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED_WIDTH).print(table)
    compressed = sum(not rule.is_full for rule in loaded.values())
    click.echo(
        f"{compressed} of {len(loaded)} parameters compressed; {kept:,} of {full:,} second moments kept, "
        f"{loaded.second_moments_saved:.1%} saved"
    )
    if loaded.expectation is not None:
        click.echo(str(loaded.expectation))


@_plan.command("diff")
@click.argument("a", type=_PLAN_FILE)
@click.argument("b", type=_PLAN_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _diff(a: Path, b: Path, as_json: bool) -> None:
    """Compare how two plans store each parameter. Exit codes: 0 the same, 1 different, 2 trouble."""
    first, second = CompressionPlan.load(a), CompressionPlan.load(b)
    pairs = {name: second.match(name) for name in first}
    both = {name: (first[name], second[other]) for name, other in pairs.items() if other is not None}
    changed = {
        name: (old, new)
        for name, (old, new) in both.items()
        if old.storage != new.storage or (old.shape is not None and new.shape not in (None, old.shape))
    }
    only_a = [name for name, other in pairs.items() if other is None]
    only_b = [name for name in second if name not in set(pairs.values())]
    if as_json:
        details = {name: {"a": _storage(old), "b": _storage(new)} for name, (old, new) in changed.items()}
        click.echo(json.dumps({"changed": details, "only_in_a": only_a, "only_in_b": only_b}))
    else:
        for name, (old, new) in changed.items():
            click.echo(f"{name}: {_describe(old, new)} -> {_describe(new, old)}")
        for path, names in ((a, only_a), (b, only_b)):
            for name in names:
                click.echo(f"{name}: only in {path}")
    sys.exit(1 if changed or only_a or only_b else 0)


@_plan.command("transfer")
@click.argument("file", metavar="PLAN", type=_PLAN_FILE)
@click.option("--model", "builder", metavar="MODULE:CALLABLE", required=True,
              help="Carry it to the model that this builds.")  # fmt: skip
@click.option("--out", required=True, type=OutputPath(), help="The plan to write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def _transfer(file: Path, builder: str, out: Path, as_json: bool) -> None:
    """Carry a plan to another depth or width of its model, by layer role, averaged over depth.

    Exit codes: 0 done, 1 nothing of the plan carries over, 2 trouble.
    """
    model = _build(builder)
    try:
        carried = CompressionPlan.load(file).for_model(model)
    except PlanError as error:
        click.echo(f"slimadam: {error}", err=True)
        sys.exit(1)
    carried.save(out)
    without = [
        key for key, rule in carried.items() if rule.source == Source.NO_COUNTERPART and len(rule.shape or ()) > 1
    ]
    saved = carried.second_moments_saved
    if as_json:
        totals = {"parameters": len(carried), "second_moments_saved": saved, "no_counterpart": without}
        click.echo(json.dumps(totals | {"plan": str(out)}))
        return
    click.echo(f"{out}: {len(carried)} parameters, {saved:.1%} of second moments saved")
    for key in without:
        click.echo(f"{key}: {carried[key].reason}, stays in full")


@_plan.command("check")
@click.argument("file", metavar="PLAN", type=_PLAN_FILE)
@click.option("--model", "builder", metavar="MODULE:CALLABLE", help="Check it against the model that this builds.")
def _check(file: Path, builder: str | None) -> None:
    """Validate a plan file, by itself or against a model. Exit codes: 0 valid, 1 not, 2 trouble."""
    model = None if builder is None else _build(builder)
    try:
        loaded = CompressionPlan.load(file)
        covered = len(loaded) if model is None else _check_fit(loaded, model)
    except PlanError as error:
        click.echo(f"slimadam: {error}", err=True)
        sys.exit(1)
    click.echo(f"{file}: valid, {len(loaded)} entries, {loaded.second_moments_saved:.1%} of second moments saved")
    if model is not None:
        click.echo(f"{covered} of the model's {len(list(model.parameters()))} parameters have a rule")


def _candidate(candidate: Candidate) -> str:
    return candidate if candidate == FACTORED else ",".join(map(str, candidate))


def _decision(rule: Rule) -> str:
    return f"mean over {_candidate(rule.dims)}" if rule.form == "mean" else rule.form


def _describe(rule: Rule, other: Rule) -> str:
    told = _decision(rule)
    if rule.shape is not None and rule.shape != other.shape:
        told += f" of shape {rule.shape}"
    if rule.batch_dims != other.batch_dims:
        told += f" with {rule.batch_dims} batch dimensions"
    if rule.part is not None and rule.part != other.part:
        told += f", from {rule.part.start} along dimension {rule.part.dim} of {rule.part.view}"
    return told


def _storage(rule: Rule) -> dict[str, Any]:
    places = {key: value for key, value in rule_to_dict(rule).items() if key in ("part", "batch_dims")}
    return {"form": rule.form, "dims": rule.dims, "shape": rule.shape, **places}


def _build(builder: str) -> nn.Module:
    model = call(builder, "--model")
    if not isinstance(model, nn.Module):
        raise click.BadParameter(f"{builder!r} returned {type(model).__name__}, not an nn.Module", param_hint="--model")
    return model


def _check_fit(checked: CompressionPlan, model: nn.Module) -> int:
    """Return how many of the model's parameters have a rule, after checking that every rule fits one."""
    found = {}
    for parameter, names in names_of(model).items():
        for name in names:
            keys = checked.keys_of(name)
            if keys:
                fit_rules(name, [checked[key] for key in keys], tuple(parameter.shape))
                found.update(dict.fromkeys(keys, parameter))
    unknown = [name for name in checked if name not in found]
    if unknown:
        raise PlanError(
            f"{unknown[0]!r}: the model has no such parameter ({len(unknown)} of the plan's "
            f"{len(checked)} names are unknown to it); calibrate this model, or remove the entry"
        )
    return len(set(found.values()))
