"""Pictures of sharpness over a run. Needs the extra ``slimadam[cli]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from slimadam.curvature.records import SharpnessRow
from slimadam.utils.plot_style import COLOURS, REFERENCE_COLOUR, STYLE

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots of sharpness need matplotlib: pip install 'slimadam[cli]'") from error


def draw_run(rows: Sequence[SharpnessRow], path: str | Path) -> None:
    """Sharpness of each task over the steps, with ``2 / lr`` and the edge-of-stability threshold.

    Where nothing was found a cross stands at the bottom, or at the top where the update is no descent.

    Args:
        rows: Measurements in the order of their steps.
        path: The picture to write; its ending says the format.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("there is no measurement to plot yet")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for index, task in enumerate(dict.fromkeys(row.task for row in rows)):
            _draw_task(axes, [row for row in rows if row.task == task], COLOURS[index % len(COLOURS)])
        once = list({row.step: row for row in rows}.values())
        _draw_reference(axes, once, [2 / row.lr if row.lr else math.nan for row in once], "--", "2 / learning rate")
        thresholds = [math.nan if row.threshold is None else row.threshold for row in once]
        _draw_reference(axes, once, thresholds, ":", "edge of stability")
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("critical sharpness")
        axes.legend()
        figure.savefig(path, dpi=150)


def _draw_task(axes: Axes, rows: Sequence[SharpnessRow], colour: str) -> None:
    label = rows[0].task or "critical sharpness"
    found = [row.sharpness if row.found and row.sharpness else math.nan for row in rows]
    steps = [row.step for row in rows]
    axes.plot(steps, found, color=colour, marker="o", markersize=3, label=label)
    for places, height, what in (
        ([row.step for row in rows if row.status == "no descent"], 0.98, "no descent"),
        ([row.step for row in rows if not row.found and row.status != "no descent"], 0.02, "not found"),
    ):
        if places:
            axes.plot(places, [height] * len(places), "x", color=colour, transform=axes.get_xaxis_transform(),
                      label=f"{label}: {what}")  # fmt: skip


def _draw_reference(axes: Axes, rows: Sequence[SharpnessRow], values: Sequence[float], line: str, label: str) -> None:
    if not all(map(math.isnan, values)):
        axes.plot([row.step for row in rows], values, line, color=REFERENCE_COLOUR, linewidth=1, label=label)
