"""Plots of sharpness over a run, and over mixing ratios. Needs the extra ``slimadam[cli]``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from slimadam.curvature.mixing.advice import MixAdvice
from slimadam.curvature.records import SharpnessRow
from slimadam.utils.plot_style import COLOURS, REFERENCE_COLOUR, STYLE

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots of sharpness need matplotlib: pip install 'slimadam[cli]'") from error


@contextmanager
def _axes(path: str | Path) -> Iterator[Axes]:
    """Yield logarithmic axes, and write their picture after the block."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        axes.set_yscale("log")
        yield axes
        axes.legend()
        figure.savefig(path, dpi=150)


def draw_run(rows: Sequence[SharpnessRow], path: str | Path) -> None:
    """Draw the sharpness of each task over the steps, with ``2 / lr`` and the edge-of-stability threshold.

    A cross at the bottom marks that nothing was found, one at the top that the loss does not fall.

    Args:
        rows: Measurements in the order of their steps.
        path: The picture to write; its ending says the format.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("there is no measurement to plot yet")
    with _axes(path) as axes:
        for index, task in enumerate(dict.fromkeys(row.task for row in rows)):
            _draw_task(axes, [row for row in rows if row.task == task], COLOURS[index % len(COLOURS)])
        steps = {row.step: row for row in rows}
        rates = [2 / row.lr if row.lr else math.nan for row in steps.values()]
        thresholds = [math.nan if row.threshold is None else row.threshold for row in steps.values()]
        for values, line, label in ((rates, "--", "2 / learning rate"), (thresholds, ":", "edge of stability")):
            if not all(map(math.isnan, values)):
                axes.plot(list(steps), values, line, color=REFERENCE_COLOUR, linewidth=1, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("critical sharpness")


def _draw_task(axes: Axes, rows: Sequence[SharpnessRow], colour: str) -> None:
    label = rows[0].task or "critical sharpness"
    found = [row.sharpness if row.found and row.sharpness else math.nan for row in rows]
    axes.plot([row.step for row in rows], found, color=colour, marker="o", markersize=3, label=label)
    no_descent = [row.step for row in rows if row.status == "no descent"]
    not_found = [row.step for row in rows if not row.found and row.status != "no descent"]
    for places, height, outcome in ((no_descent, 0.98, "no descent"), (not_found, 0.02, "not found")):
        if places:
            heights, transform = [height] * len(places), axes.get_xaxis_transform()
            axes.plot(places, heights, "x", color=colour, transform=transform, label=f"{label}: {outcome}")


def draw_mix(advice: MixAdvice, path: str | Path) -> None:
    """Draw the sharpness of each task over the share of the first domain, with intervals and the advised share.

    With more than two domains the mixes are drawn in their order.

    Args:
        advice: The result of :func:`~slimadam.advise_mix`.
        path: The picture to write; its ending says the format.
    """
    first, *others = advice.weights
    places = [mix[0] for mix in advice.mixes] if len(others) == 1 else list(map(float, range(len(advice.mixes))))
    finite = [value for curve in advice.curves for value in curve.sharpness if 0 < value < math.inf]
    ceiling = 10 * max(finite, default=1.0)

    def below(values: Sequence[float]) -> list[float]:
        """Return values with those off the picture just above it, so that the line leaves at the top."""
        return [min(value, 2 * ceiling) if value else math.nan for value in values]

    with _axes(path) as axes:
        for index, curve in enumerate(advice.curves):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(places, below(curve.sharpness), color=colour, label=curve.task, marker="o", markersize=3)
            low, high = zip(*curve.interval, strict=True)
            axes.fill_between(places, below(low), below(high), color=colour, alpha=0.15, linewidth=0)
        if not math.isnan(advice.ratio):
            advised = places[advice.mixes.index(tuple(advice.weights.values()))]
            axes.axvline(advised, color=REFERENCE_COLOUR, linestyle="--", linewidth=1, label="advised")
            if len(others) == 1:
                axes.axvspan(*advice.interval, color=REFERENCE_COLOUR, alpha=0.1, linewidth=0)
        axes.set_ylim(top=ceiling)
        axes.set_xlabel(f"share of {first} in the mix" if len(others) == 1 else "mix")
        axes.set_ylabel("relative critical sharpness (off the top: no safe step)")
