"""The page itself: the numbers of its tables, the drawing of the network, and the template that they go into."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from slimadam.measurement.history import ParameterSNR
from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels, plots
from slimadam.state.rule import FACTORED, Candidate, Rule
from slimadam.utils.formatting import format_bytes, format_shape

WIDTH = 1120.0
_LABEL_WIDTH = 168.0
_CHARACTER_WIDTH = 6.4
_BYTES_PER_ELEMENT = 4
_COLUMNS: tuple[Candidate, ...] = ((0,), (1,), (0, 1), FACTORED)


def render(
    plan: CompressionPlan,
    measured: Mapping[str, ParameterSNR],
    title: str,
    facts: Mapping[str, str],
    figures: Sequence[tuple[str, str]],
) -> str:
    """Return the report as HTML.

    Args:
        plan: A plan with at least one parameter.
        measured: Measurements by the plan's parameter names.
        title: Heading.
        facts: Further rows of the list of facts.
        figures: Captions and SVG markup from the caller.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breakable=lambda name: Markup(".<wbr>").join(name.split(".")), bytes=format_bytes, percent="{:.2%}".format
    )
    rows = parameter_rows(plan)
    named = labels.names_by_role(plan)
    roles = [_row(plan, role, role, [plan[name] for name in names]) for role, names in named.items()]
    kinds = set(map(labels.decision_kind, plan.values()))
    return environment.get_template("report.html.j2").render(
        title=title,
        facts={**_basic_facts(plan, measured), **facts},
        figures=[(caption, plots.inline_svg(svg)) for caption, svg in figures],
        headline=headline(plan),
        plan=plan,
        layers=draw(plan),
        width=WIDTH,
        legend={kind: label for kind, label in labels.LEGEND.items() if kind in kinds},
        columns=[labels.dims_label(column) for column in snr_columns(plan)],
        has_others=any(row.others for row in rows),
        roles=roles,
        plots=plots.role_plots(plan, measured),
        max_roles=plots.MAX_ROLES,
        depth_colours=plots.DEPTH_COLOURS,
        parameters=rows,
    )


def _basic_facts(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> dict[str, str]:
    compressed = sum(not rule.is_full for rule in plan.values())
    facts = {"Parameters": f"{len(plan):,} tensors, {compressed:,} of them compressed"}
    if elements := plan.second_moments[1]:
        facts["Elements"] = f"{elements:,}"
    if plan.cutoff is not None:
        facts["SNR cutoff"] = f"{plan.cutoff:g}"
    if plan.expectation is not None:
        facts["To expect"] = str(plan.expectation)
    steps = sorted({step for parameter in measured.values() for step in parameter.values})
    if steps:
        facts["Measured"] = f"at {len(steps):,} optimizer steps, {steps[0]:,} to {steps[-1]:,}"
    return facts


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
    """A row of either table; its decisions are kind, label and number of parameters.

    ``before`` (AdamW) and ``after`` count elements, and are None where no shape is known.
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
    saved: str
    reason: str


def headline(plan: CompressionPlan) -> list[Quantity]:
    """Return the bytes of second moments, and of the state with a first moment of the same element size."""
    kept, full = (_BYTES_PER_ELEMENT * elements for elements in plan.second_moments)
    return [Quantity("Second moments", full, kept), Quantity("Optimizer state", 2 * full, full + kept)]


def snr_columns(plan: CompressionPlan) -> list[Candidate]:
    """Return the candidates of vectors and matrices that were measured for any parameter."""
    return [column for column in _COLUMNS if any(column in rule.snr for rule in plan.values())]


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
    before = sum(math.prod(shape) for _, shape in sized)
    after = sum(rule.stored_elements(shape) for rule, shape in sized)
    return Row(
        name=name,
        role=role,
        shape=shapes.pop() if len(shapes) == 1 else "various",
        count=len(rules),
        columns=[measured.get(column) for column in columns],
        others=[cell for candidate, cell in measured.items() if candidate not in columns],
        decisions=[(kind, label, count) for (kind, label), count in decisions.most_common()],
        before=before if sized else None,
        after=after if sized else None,
        saved=f"{1 - after / before:.2%}" if before else "–",
        reason=rules[0].reason,
    )


class Cell(NamedTuple):
    """One parameter: position and width in the drawing, kind of decision, label if it fits, text on hover."""

    x: float
    width: float
    kind: str
    label: str
    hover: str


class Layer(NamedTuple):
    """One row: the name of the layer, its label and its parameters."""

    name: str
    label: str
    cells: list[Cell]


def draw(plan: CompressionPlan) -> list[Layer]:
    """Lay out the cells of a plan's parameters, in the plan's order.

    Each cell takes a minimum and as much again as a gap, plus its share by size.
    """
    sides = {name: 1.0 if rule.shape is None else math.sqrt(math.prod(rule.shape)) for name, rule in plan.items()}
    layers = [(layer, list(names)) for layer, names in itertools.groupby(plan, layer_of)]
    room = WIDTH - _LABEL_WIDTH
    minimum = min(3.0, room / (4 * max(len(names) for _, names in layers)))
    scale = min((room - 2 * minimum * len(names)) / max(1.0, sum(sides[name] for name in names)) for _, names in layers)
    rows = []
    for layer, names in layers:
        cells = []
        x = _LABEL_WIDTH
        for name in names:
            rule, width = plan[name], minimum + scale * sides[name]
            hover = f"{name}\n{format_shape(rule.shape)}: {labels.decision_label(rule)}"
            label = name.removeprefix(layer + ".").removesuffix(".weight").rpartition(".")[2]
            label = label if _CHARACTER_WIDTH * len(label) + 8 <= width else ""
            cells.append(Cell(x, width, labels.decision_kind(rule), label, hover))
            x += width + minimum
        most = int(_LABEL_WIDTH / _CHARACTER_WIDTH) - 3
        rows.append(Layer(layer, layer if len(layer) <= most else "…" + layer[-most:], cells))
    return rows


def layer_of(name: str) -> str:
    """Return the layer of a parameter: ``"blocks.0"`` for ``"blocks.0.attention.query.weight"``.

    It is the name up to the first number that is not the last component; else the module that owns the parameter.
    """
    *owners, _ = name.split(".")
    end = next((index for index, owner in enumerate(owners, start=1) if owner.isdigit()), len(owners))
    return ".".join(owners[:end]) or name
