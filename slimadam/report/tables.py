"""The numbers of the report: headline, table by role, table of parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels
from slimadam.state.rule import FACTORED, Candidate, Rule
from slimadam.utils import formatting

BYTES_PER_ELEMENT = 4
_COLUMNS: tuple[Candidate, ...] = ((0,), (1,), (0, 1), FACTORED)


@dataclass(frozen=True)
class Quantity:
    """One headline number in bytes, before (AdamW) and after."""

    label: str
    before: int
    after: int

    @property
    def saved(self) -> float:
        """Share saved, in 0..1."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Measured:
    """One SNR in a table; ``kind`` colours it if the candidate was chosen."""

    candidate: str
    text: str
    above_cutoff: bool
    kind: str


@dataclass(frozen=True)
class Decision:
    """A decision and the number of parameters that share it."""

    kind: str
    label: str
    count: int = 1


@dataclass(frozen=True)
class Row:
    """A row of either table. Elements are None where no shape is known."""

    name: str
    role: str
    shape: str
    count: int
    columns: list[Measured | None]
    others: list[Measured]
    decisions: list[Decision]
    before: int | None
    after: int | None
    reason: str = ""

    @property
    def saved(self) -> str:
        """Share of the elements saved."""
        if not self.before or self.after is None:
            return "–"
        return formatting.format_percent(1 - self.after / self.before)


def headline(plan: CompressionPlan) -> list[Quantity]:
    """Second moments, and the optimizer state with a first moment of the same element size."""
    kept, full = (BYTES_PER_ELEMENT * elements for elements in plan.second_moments)
    return [Quantity("Second moments", full, kept), Quantity("Optimizer state", 2 * full, full + kept)]


def snr_columns(plan: CompressionPlan) -> list[Candidate]:
    """The candidates of vectors and matrices that were measured for any parameter."""
    return [column for column in _COLUMNS if any(column in rule.snr for rule in plan.values())]


def role_rows(plan: CompressionPlan) -> list[Row]:
    """One row per role, SNRs averaged over its parameters."""
    rows = []
    for role, names in labels.names_by_role(plan).items():
        rules = [plan[name] for name in names]
        shapes = {formatting.format_shape(rule.shape) for rule in rules}
        shape = shapes.pop() if len(shapes) == 1 else "various"
        rows.append(_row(plan, role, role, shape, rules))
    return rows


def parameter_rows(plan: CompressionPlan) -> list[Row]:
    """One row per parameter, in the plan's order."""
    return [
        _row(plan, name, labels.known_role(name, rule), formatting.format_shape(rule.shape), [rule])
        for name, rule in plan.items()
    ]


def _row(plan: CompressionPlan, name: str, role: str, shape: str, rules: Sequence[Rule]) -> Row:
    chosen = {candidate: rule for rule in rules if (candidate := labels.chosen_candidate(rule)) is not None}
    snr = labels.average_over_layers(rule.snr for rule in rules)
    shown = labels.shown_candidates(snr, chosen)
    measured = {candidate: _measured(candidate, snr[candidate], chosen, plan.cutoff) for candidate in shown}
    columns = snr_columns(plan)
    before, after = _elements(rules)
    return Row(
        name=name,
        role=role,
        shape=shape,
        count=len(rules),
        columns=[measured.get(column) for column in columns],
        others=[cell for candidate, cell in measured.items() if candidate not in columns],
        decisions=_decisions(rules),
        before=before,
        after=after,
        reason=rules[0].reason,
    )


def _measured(candidate: Candidate, value: float, chosen: Mapping[Candidate, Rule], cutoff: float | None) -> Measured:
    return Measured(
        candidate=labels.dims_label(candidate),
        text=labels.format_snr(value),
        above_cutoff=cutoff is not None and value > cutoff,
        kind=labels.decision_kind(chosen[candidate]) if candidate in chosen else "",
    )


def _decisions(rules: Iterable[Rule]) -> list[Decision]:
    counted = Counter((labels.decision_kind(rule), labels.decision_label(rule)) for rule in rules)
    return [Decision(kind, label, count) for (kind, label), count in counted.most_common()]


def _elements(rules: Iterable[Rule]) -> tuple[int | None, int | None]:
    """Second-moment elements of AdamW and of the plan, over the rules whose shape is known."""
    sized = [(rule, rule.shape) for rule in rules if rule.shape is not None]
    if not sized:
        return None, None
    before = sum(math.prod(shape) for _, shape in sized)
    return before, sum(rule.stored_elements(shape) for rule, shape in sized)
