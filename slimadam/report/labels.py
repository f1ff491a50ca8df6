"""The words for decisions, candidates, roles and numbers in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping

from slimadam.layers.roles import BIAS, NORM, UNKNOWN, role_from_name
from slimadam.measurement.snr import average_snr
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import FACTORED, Candidate, Rule

LEGEND: Mapping[str, str] = {
    "full": "full, as in AdamW",
    "dim1": "mean over dim 1 (fan_in of a Linear)",
    "dim0": "mean over dim 0 (fan_out of a Linear)",
    "other": "mean over other dims",
    "factored": "factored: row and column averages",
    "float8": "float8: each element in one byte",
}
"""The kinds of decision, which are also the names of the colours in ``style.css``, in words."""

_ALL_CANDIDATES_OF_A_MATRIX = 4
_SHOWN_OF_LARGER_TENSORS = 3


def decision_kind(rule: Rule) -> str:
    """Return the key of :data:`LEGEND` under which a rule falls."""
    if rule.form != "mean":
        return rule.form
    return f"dim{rule.dims[0]}" if rule.dims in ((0,), (1,)) else "other"


def decision_label(rule: Rule) -> str:
    """Return a rule in words."""
    return f"mean over {dims_label(rule.dims)}" if rule.form == "mean" else rule.form


def dims_label(candidate: Candidate) -> str:
    """Return a candidate as a short column heading."""
    if candidate == FACTORED:
        return FACTORED
    return ("dim " if len(candidate) == 1 else "dims ") + ", ".join(map(str, candidate))


def chosen_candidate(rule: Rule) -> Candidate | None:
    """Return the candidate that a rule applies, None for a full second moment."""
    return rule.stored_as.candidate or None


def shown_candidates(snr: Mapping[Candidate, float], chosen: Iterable[Candidate | None]) -> list[Candidate]:
    """Return the candidates worth showing: all of a matrix; of larger tensors the three highest and the chosen.

    Args:
        snr: SNR of each candidate.
        chosen: The candidates that were chosen.
    """
    if len(snr) <= _ALL_CANDIDATES_OF_A_MATRIX:
        return list(snr)
    ranked = sorted(snr, key=lambda candidate: -1.0 if math.isnan(snr[candidate]) else snr[candidate], reverse=True)
    shown = {*ranked[:_SHOWN_OF_LARGER_TENSORS], *chosen}
    return [candidate for candidate in snr if candidate in shown]


def average_over_layers(snrs: Collection[Mapping[Candidate, float]]) -> dict[Candidate, float]:
    """Return each candidate's SNR averaged over several parameters, NaN where none has a number."""
    candidates = (candidate for snr in snrs for candidate in snr)
    return dict.fromkeys(candidates, math.nan) | average_snr(snrs)


def names_by_role(plan: CompressionPlan) -> dict[str, list[str]]:
    """Return parameter names in model order under their role, roles of nothing but vectors last.

    Parameters without a known role are put together by their name with the layer numbers left out.
    """
    grouped: dict[str, list[str]] = {}
    with_matrices = set()
    for name, rule in plan.items():
        role = known_role(name, rule) or re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        grouped.setdefault(role, []).append(name)
        if rule.role not in (NORM, BIAS) and (rule.shape is None or len(rule.shape) > 1):
            with_matrices.add(role)
    return dict(sorted(grouped.items(), key=lambda item: item[0] not in with_matrices))


def known_role(name: str, rule: Rule) -> str:
    """Return the role of a parameter in words, empty where it is unknown.

    Args:
        name: Name of the parameter.
        rule: Its rule, which may tell the role itself, or the number of dimensions.
    """
    ndims = (1, 2) if rule.shape is None else (len(rule.shape),)
    guesses = [rule.role] if rule.role else [role_from_name(name, ndim) for ndim in ndims]
    return next((role.replace("_", " ") for role in guesses if role != UNKNOWN), "")


def format_snr(value: float) -> str:
    """Return an SNR with about three digits."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "∞"
    if value >= 1e5 or 0 < value < 1e-3:
        return f"{value:.0e}"
    decimals = 3 if 0 < value < 0.01 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{decimals}f}"
