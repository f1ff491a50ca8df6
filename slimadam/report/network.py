"""The network as rows of cells: one row per layer, one cell per parameter, as wide as the root of its size."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels
from slimadam.utils.formatting import format_shape

WIDTH = 1120.0
_LABEL_WIDTH = 168.0
_CHARACTER_WIDTH = 6.4


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
