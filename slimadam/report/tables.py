"""The numbers of the report: headline, table by role, table of parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels
from slimadam.state.rule import FACTORED, Candidate, Rule
from slimadam.utils.formatting import format_shape

_BYTES_PER_ELEMENT = 4
_COLUMNS: tuple[Candidate, ...] = ((0,), (1,), (0, 1), FACTORED)


class Quantity(NamedTuple):
    """One headline number in bytes, before (AdamW) and after."""

    label: str
    before: int
    after: int

    @property
    def saved(self) -> float:
        """Share saved, in 0..1."""
        return 1 - self.after / self.before if self.before else 0.0


class Measured(NamedTuple):
    """One SNR in a table; ``kind`` colours it if the candidate was chosen."""

    candidate: str
    text: str
    above_cutoff: bool
    kind: str


@dataclass(frozen=True)
class Row:
    """A row of either table, whose decisions are kind, label and number of parameters.

    The second-moment elements ``before`` (AdamW) and ``after`` are None where no shape is known.
    """

    name: str
    role: str
    shape: str
    count: int
    columns: list[Measured | None]
    others: list[Measured]
    decisions: list[tuple[str, str, int]]
    before: int | None
    after: int | None
    reason: str

    @property
    def saved(self) -> str:
        """Share of the elements saved."""
        return f"{1 - self.after / self.before:.2%}" if self.before and self.after is not None else "–"


def headline(plan: CompressionPlan) -> list[Quantity]:
    """Return the bytes of second moments, and of the state with a first moment of the same element size."""
    kept, full = (_BYTES_PER_ELEMENT * elements for elements in plan.second_moments)
    return [Quantity("Second moments", full, kept), Quantity("Optimizer state", 2 * full, full + kept)]


def snr_columns(plan: CompressionPlan) -> list[Candidate]:
    """Return the candidates of vectors and matrices that were measured for any parameter."""
    return [column for column in _COLUMNS if any(column in rule.snr for rule in plan.values())]


def role_rows(plan: CompressionPlan) -> list[Row]:
    """Return one row per role, SNRs averaged over its parameters."""
    return [
        _row(plan, role, role, [plan[name] for name in names]) for role, names in labels.names_by_role(plan).items()
    ]


def parameter_rows(plan: CompressionPlan) -> list[Row]:
    """Return one row per parameter, in the plan's order."""
    return [_row(plan, name, labels.known_role(name, rule), [rule]) for name, rule in plan.items()]


def _row(plan: CompressionPlan, name: str, role: str, rules: Sequence[Rule]) -> Row:
    shapes = {format_shape(rule.shape) for rule in rules}
    chosen = {candidate: rule for rule in rules if (candidate := labels.chosen_candidate(rule)) is not None}
    snr = labels.average_over_layers([rule.snr for rule in rules])
    measured = {}
    for candidate in labels.shown_candidates(snr, chosen):
        text, heading = labels.format_snr(snr[candidate]), labels.dims_label(candidate)
        kind = labels.decision_kind(chosen[candidate]) if candidate in chosen else ""
        measured[candidate] = Measured(heading, text, plan.cutoff is not None and snr[candidate] > plan.cutoff, kind)
    columns = snr_columns(plan)
    decisions = Counter((labels.decision_kind(rule), labels.decision_label(rule)) for rule in rules)
    sized = [(rule, rule.shape) for rule in rules if rule.shape is not None]
    return Row(
        name=name,
        role=role,
        shape=shapes.pop() if len(shapes) == 1 else "various",
        count=len(rules),
        columns=[measured.get(column) for column in columns],
        others=[cell for candidate, cell in measured.items() if candidate not in columns],
        decisions=[(kind, label, count) for (kind, label), count in decisions.most_common()],
        before=sum(math.prod(shape) for _, shape in sized) if sized else None,
        after=sum(rule.stored_elements(shape) for rule, shape in sized) if sized else None,
        reason=rules[0].reason,
    )
