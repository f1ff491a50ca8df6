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
_MANY_ROWS = 32


class Cell(NamedTuple):
    """One parameter: position and width in the drawing, kind of decision, label if it fits, text on hover."""

    x: float
    width: float
    kind: str
    label: str
    hover: str


class StripRow(NamedTuple):
    """One layer."""

    name: str
    label: str
    y: float
    cells: list[Cell]


class Strip(NamedTuple):
    """The drawing. Lengths are in units of its own coordinates."""

    width: float
    height: float
    row_height: float
    dense: bool
    rows: list[StripRow]


def draw(plan: CompressionPlan) -> Strip:
    """Lay out the cells of a plan's parameters, in the plan's order.

    Each cell takes a minimum and as much again as a gap, plus its share by size.
    """
    sides = {name: 1.0 if rule.shape is None else math.sqrt(math.prod(rule.shape)) for name, rule in plan.items()}
    layers = [(layer, list(names)) for layer, names in itertools.groupby(plan, layer_of)]
    room = WIDTH - _LABEL_WIDTH
    minimum = min(3.0, room / (4 * max(len(names) for _, names in layers)))
    scale = min((room - 2 * minimum * len(names)) / max(1.0, sum(sides[name] for name in names)) for _, names in layers)
    dense = len(layers) > _MANY_ROWS
    pitch = 17.0 if dense else 28.0
    rows = []
    for index, (layer, names) in enumerate(layers):
        cells = []
        x = _LABEL_WIDTH
        for name in names:
            rule, width = plan[name], minimum + scale * sides[name]
            hover = f"{name}\n{format_shape(rule.shape)}: {labels.decision_label(rule)}"
            label = _fitting_label(name.removeprefix(layer + "."), width)
            cells.append(Cell(x, width, labels.decision_kind(rule), label, hover))
            x += width + minimum
        rows.append(StripRow(layer, _shortened(layer), index * pitch, cells))
    return Strip(WIDTH, len(layers) * pitch, pitch - 4, dense, rows)


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number that is not the last component.

    Without such a number, the module that owns it.

    Example:
        >>> layer_of("blocks.0.attention.query.weight")
        'blocks.0'
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def _fitting_label(name: str, width: float) -> str:
    """Return the last component of a dotted name other than ``weight``, where it fits."""
    label = name.removesuffix(".weight").rpartition(".")[2]
    return label if _CHARACTER_WIDTH * len(label) + 8 <= width else ""


def _shortened(name: str) -> str:
    room = int(_LABEL_WIDTH / _CHARACTER_WIDTH) - 3
    return name if len(name) <= room else "…" + name[-room:]
