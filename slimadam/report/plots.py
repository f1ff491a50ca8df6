"""SNR over training as small plots, one row per role, in SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from slimadam.measurement.history import ParameterSNR
from slimadam.plans.plan import CompressionPlan
from slimadam.report import labels
from slimadam.state.rule import Candidate

Item = TypeVar("Item")

DEPTH_COLOURS = 8
MAX_LINES = 24
MAX_ROLES = 40
_MAX_POINTS = 48
_PANELS_PER_ROW = 4

_PANEL_WIDTH, _PANEL_HEIGHT = 2.52, 1.45
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 0.62, 0.12, 0.30, 0.42, 0.14
_SMALLEST, _LARGEST = 1e-6, 1e9
_FEW_POINTS = 8

# Colours that stand for variables of style.css, so that one drawing serves light, dark and print.
_PLACES = ("currentColor", "var(--grid)", "var(--cutoff)", "var(--panel)", "var(--panel-chosen)")
_VARIABLES = {f"#00aa{index:02x}": place for index, place in enumerate(_PLACES, start=1)}
_VARIABLES |= {f"#00bb{index:02x}": f"var(--depth-{index})" for index in range(DEPTH_COLOURS)}
_TEXT, _GRID, _CUTOFF, _PLAIN, _CHOSEN, *_DEPTH = _VARIABLES
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slimadam",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _TEXT),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _GRID),
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class RolePlot:
    """The plots of one role: ``width`` in CSS pixels, and how many of its parameters are drawn."""

    role: str
    svg: Markup
    width: int
    drawn: int
    count: int


def role_plots(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> list[RolePlot]:
    """Plot the measurements of each role that has any, of the :data:`MAX_ROLES` largest at most.

    Args:
        plan: Roles, decisions and the cutoff.
        measured: Measurements by the plan's parameter names.
    """
    with style.context(["default", _STYLE]):
        return [_role_plot(role, plan, found) for role, found in _largest_roles(plan, measured).items()]


def inline_svg(svg: str) -> Markup:
    """Return SVG markup fit to stand inside an HTML page: only the element, without metadata and namespaces.

    Raises:
        ValueError: There is no complete ``<svg>`` element.
    """
    element = re.search(r"<svg\b.*</svg>", svg, re.DOTALL)
    if element is None:
        raise ValueError(f"figures: {svg[:60]!r} is not SVG; pass the text of an <svg> element")
    inner = re.sub(r"<metadata>.*?</metadata>", "", element[0], flags=re.DOTALL)
    return Markup(re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", inner).replace("xlink:href=", "href="))


def _largest_roles(plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> dict[str, dict[str, ParameterSNR]]:
    """Return the measurements of each role, roles in the order of the report."""
    roles = {
        role: {name: measured[name] for name in names if name in measured and measured[name].average()}
        for role, names in labels.names_by_role(plan).items()
    }
    sizes = {role: sum(math.prod(found.shape) for found in group.values()) for role, group in roles.items() if group}
    largest = sorted(sizes, key=lambda role: -sizes[role])[:MAX_ROLES]
    return {role: group for role, group in roles.items() if role in largest}


def _role_plot(role: str, plan: CompressionPlan, measured: Mapping[str, ParameterSNR]) -> RolePlot:
    names = _evenly(list(measured), MAX_LINES)
    drawn = [measured[name] for name in names]
    chosen = Counter(labels.chosen_candidate(plan[name]) for name in measured)
    average = labels.average_over_layers([parameter.average() for parameter in measured.values()])
    candidates = labels.shown_candidates(average, chosen)
    figure, panels = _figure(len(candidates))
    limits = _limits(drawn, candidates, plan.cutoff)
    for index, (panel, candidate) in enumerate(zip(panels, candidates, strict=True)):
        _draw_panel(panel, drawn, candidate, plan.cutoff)
        label, times = labels.dims_label(candidate), chosen[candidate]
        panel.set_title(f"{label} · chosen for {times} of {len(measured)}" if times else label)
        panel.set_facecolor(_CHOSEN if times else _PLAIN)
        panel.set_ylim(limits)
        if index % _PANELS_PER_ROW:
            panel.tick_params(labelleft=False)
        else:
            panel.set_ylabel("SNR")
            panel.yaxis.set_label_coords(-0.5 / _PANEL_WIDTH, 0.5)
    svg = _to_svg(figure, f"SNR over training steps: {role}", names)
    return RolePlot(role, svg, round(96 * figure.get_figwidth()), len(drawn), len(measured))


def _figure(panel_count: int) -> tuple[Figure, list[Axes]]:
    columns, rows = min(panel_count, _PANELS_PER_ROW), math.ceil(panel_count / _PANELS_PER_ROW)
    width = _LEFT + columns * (_PANEL_WIDTH + _GAP) - _GAP + _RIGHT
    height = rows * (_TOP + _PANEL_HEIGHT + _BOTTOM)
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        rows, columns, left=_LEFT / width, right=1 - _RIGHT / width, bottom=_BOTTOM / height, top=1 - _TOP / height,
        wspace=_GAP / _PANEL_WIDTH, hspace=(_TOP + _BOTTOM) / _PANEL_HEIGHT,
    )  # fmt: skip
    return figure, [figure.add_subplot(grid[divmod(index, columns)]) for index in range(panel_count)]


def _draw_panel(panel: Axes, measured: Sequence[ParameterSNR], candidate: Candidate, cutoff: float | None) -> None:
    panel.set_yscale("log")
    panel.grid(axis="y")
    panel.set_xlabel("optimizer step", labelpad=2)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    panel.yaxis.set_major_locator(LogLocator(numticks=6))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if cutoff:
        panel.axhline(cutoff, color=_CUTOFF, linestyle=(0, (4, 3)), linewidth=1.0)
    for index, parameter in enumerate(measured):
        series = _evenly(parameter.series(candidate), _MAX_POINTS)
        depth = round(index * (DEPTH_COLOURS - 1) / max(1, len(measured) - 1))
        panel.plot(
            [step for step, _ in series],
            [_drawable(value) for _, value in series],
            color=_DEPTH[depth],
            marker="o" if len(series) <= _FEW_POINTS else "",
            markersize=2.5,
            gid=f"line{index}",
        )


def _limits(
    measured: Sequence[ParameterSNR], candidates: Sequence[Candidate], cutoff: float | None
) -> tuple[float, float]:
    """Return whole decades around everything that is drawn."""
    drawn = [_drawable(value) for parameter in measured for candidate in candidates
             for _, value in parameter.series(candidate)]  # fmt: skip
    known = [value for value in [*drawn, cutoff or math.nan] if not math.isnan(value)] or [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _drawable(value: float) -> float:
    """Return a value within the range of the plots, or NaN, a gap in the line, where a logarithm has none."""
    return min(max(value, _SMALLEST), _LARGEST) if 0 < value < math.inf else math.nan


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most ``most`` of the items, evenly spaced, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _to_svg(figure: Figure, label: str, names: Sequence[str]) -> Markup:
    """Draw the figure without what the page sets itself: fonts, identifiers, needless digits and white space."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = str(inline_svg(buffer.getvalue()))
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"<style.*?</style>|font-family: [^;]*; |(?<=>)\s+(?=<)", "", svg, flags=re.DOTALL)
    svg = re.sub("|".join(_VARIABLES), lambda colour: _VARIABLES[colour[0]], svg)
    svg = re.sub(r'<g id="line(\d+)">', lambda line: f"<g><title>{escape(names[int(line[1])])}</title>", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
