"""The network as rows of cells: one row per layer, one cell per parameter, as wide as the root of its size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels
from slimadam.state.rule import Rule
from slimadam.utils import formatting

WIDTH = 1120.0
LABEL_WIDTH = 168.0
_CHARACTER_WIDTH = 6.4
_MANY_ROWS = 32


@dataclass(frozen=True)
class Cell:
    """One parameter: position and width in the drawing, kind of decision, label if it fits, text on hover."""

    x: float
    width: float
    kind: str
    label: str
    hover: str


@dataclass(frozen=True)
class StripRow:
    """One layer."""

    name: str
    label: str
    y: float
    cells: list[Cell]


@dataclass(frozen=True)
class Strip:
    """The drawing. Lengths are in units of its own coordinates."""

    width: float
    height: float
    row_height: float
    dense: bool
    rows: list[StripRow]


def draw(plan: CompressionPlan) -> Strip:
    """Lay out the cells of a plan's parameters, in the plan's order."""
    layers = [(layer, list(names)) for layer, names in itertools.groupby(plan, layer_of)]
    dense = len(layers) > _MANY_ROWS
    pitch = 17.0 if dense else 28.0
    most = max(len(names) for _, names in layers)
    minimum = min(3.0, (WIDTH - LABEL_WIDTH) / (4 * most))
    scale = min(_largest_scale([plan[name] for name in names], minimum) for _, names in layers)
    rows = [
        StripRow(layer, _shortened(layer), index * pitch, _cells(plan, layer, names, scale, minimum))
        for index, (layer, names) in enumerate(layers)
    ]
    return Strip(WIDTH, len(layers) * pitch, pitch - 4, dense, rows)


def layer_of(name: str) -> str:
    """The layer a parameter belongs to: its name up to the first number that is not the last component.

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


def _largest_scale(rules: Sequence[Rule], minimum: float) -> float:
    room = WIDTH - LABEL_WIDTH - 2 * minimum * len(rules)
    return room / max(1.0, sum(_side(rule) for rule in rules))


def _side(rule: Rule) -> float:
    return math.sqrt(math.prod(rule.shape)) if rule.shape is not None else 1.0


def _cells(plan: CompressionPlan, layer: str, names: Sequence[str], scale: float, minimum: float) -> list[Cell]:
    """Each cell takes ``minimum`` and as much again as a gap, plus its share by size."""
    cells = []
    x = LABEL_WIDTH
    for name in names:
        rule = plan[name]
        width = minimum + scale * _side(rule)
        hover = f"{name}\n{formatting.format_shape(rule.shape)}: {labels.decision_label(rule)}"
        label = _fitting_label(name.removeprefix(layer + "."), width)
        cells.append(Cell(x, width, labels.decision_kind(rule), label, hover))
        x += width + minimum
    return cells


def _fitting_label(name: str, width: float) -> str:
    """The last component of a dotted name other than ``weight``, where it fits."""
    label = name.removesuffix(".weight").rpartition(".")[2]
    return label if _CHARACTER_WIDTH * len(label) + 8 <= width else ""


def _shortened(name: str) -> str:
    room = int(LABEL_WIDTH / _CHARACTER_WIDTH) - 3
    return name if len(name) <= room else "…" + name[-room:]
