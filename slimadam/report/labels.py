"""How decisions, candidates and numbers are worded in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from slimadam.layers.roles import BIAS, NORM, UNKNOWN, role_from_name
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import FACTORED, Candidate, Rule

LEGEND: Mapping[str, str] = {
    "full": "full, as in AdamW",
    "dim1": "mean over dim 1 (fan_in of a Linear)",
    "dim0": "mean over dim 0 (fan_out of a Linear)",
    "other": "mean over other dims",
    "factored": "factored: row and column averages",
}
"""What each kind of decision is called; the kinds are also the names of the colours in ``style.css``."""

_ALL_CANDIDATES_OF_A_MATRIX = 4
_SHOWN_OF_LARGER_TENSORS = 3


def decision_kind(rule: Rule) -> str:
    """The key of :data:`LEGEND` under which a rule falls."""
    if rule.form != "mean":
        return rule.form
    return f"dim{rule.dims[0]}" if rule.dims in ((0,), (1,)) else "other"


def decision_label(rule: Rule) -> str:
    """A rule in words."""
    candidate = chosen_candidate(rule)
    return "full" if candidate is None else candidate_label(candidate)


def candidate_label(candidate: Candidate) -> str:
    """A candidate in words."""
    return FACTORED if candidate == FACTORED else f"mean over {dims_label(candidate)}"


def dims_label(candidate: Candidate) -> str:
    """A candidate as a short column heading."""
    if candidate == FACTORED:
        return FACTORED
    return ("dim " if len(candidate) == 1 else "dims ") + ", ".join(map(str, candidate))


def chosen_candidate(rule: Rule) -> Candidate | None:
    """The candidate that a rule applies, None for a full second moment."""
    if rule.form == "full":
        return None
    return FACTORED if rule.form == FACTORED else rule.dims


def shown_candidates(snr: Mapping[Candidate, float], chosen: Iterable[Candidate] = ()) -> list[Candidate]:
    """The candidates worth showing: all of a matrix; of larger tensors the three highest and the chosen."""
    if len(snr) <= _ALL_CANDIDATES_OF_A_MATRIX:
        return list(snr)
    ranked = sorted(snr, key=lambda candidate: _nan_last(snr[candidate]), reverse=True)
    shown = {*ranked[:_SHOWN_OF_LARGER_TENSORS], *chosen}
    return [candidate for candidate in snr if candidate in shown]


def mean_snr(values: Iterable[float]) -> float:
    """The mean of the finite values; infinity if only infinite ones remain after dropping NaN, else NaN."""
    known = [value for value in values if not math.isnan(value)]
    finite = [value for value in known if math.isfinite(value)]
    if finite:
        return math.fsum(finite) / len(finite)
    return math.inf if known else math.nan


def average_over_layers(snrs: Iterable[Mapping[Candidate, float]]) -> dict[Candidate, float]:
    """Each candidate's SNR averaged over several parameters."""
    collected: dict[Candidate, list[float]] = {}
    for snr in snrs:
        for candidate, value in snr.items():
            collected.setdefault(candidate, []).append(value)
    return {candidate: mean_snr(values) for candidate, values in collected.items()}


def names_by_role(plan: CompressionPlan) -> dict[str, list[str]]:
    """Parameter names in model order under their role, roles of nothing but vectors last.

    Parameters without a known role are put together by their name with the layer numbers left out.
    """
    grouped: dict[str, list[str]] = {}
    for name, rule in plan.items():
        grouped.setdefault(role_label(name, rule), []).append(name)
    return dict(sorted(grouped.items(), key=lambda item: all(_is_vector(plan[name]) for name in item[1])))


def role_label(name: str, rule: Rule) -> str:
    """The role of a parameter, or its name without layer numbers where the role is unknown."""
    return known_role(name, rule) or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def known_role(name: str, rule: Rule) -> str:
    """The role of a parameter in words, empty where it is unknown."""
    role = rule.role or _role_from_name(name, rule)
    return "" if role == UNKNOWN else role.replace("_", " ")


def format_snr(value: float) -> str:
    """An SNR with about three digits."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞"
    if value >= 1e5 or 0 < value < 1e-3:
        return f"{value:.0e}"
    decimals = 3 if 0 < value < 0.01 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"


def _nan_last(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _is_vector(rule: Rule) -> bool:
    return rule.role in (NORM, BIAS) or (rule.shape is not None and len(rule.shape) < 2)


def _role_from_name(name: str, rule: Rule) -> str:
    if rule.shape is not None:
        return role_from_name(name, len(rule.shape))
    as_vector = role_from_name(name, 1)
    return as_vector if as_vector != UNKNOWN else role_from_name(name, 2)
