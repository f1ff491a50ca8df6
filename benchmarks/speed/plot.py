"""The picture of a throughput run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.harness.picture import picture
from slimadam.utils.plot_style import STYLE

_STYLE = STYLE | {"axes.grid.axis": "x"}
_OURS, _THEIRS = "#2166ac", "#9a9a9a"


def draw(rows: dict[str, dict[str, Any]], title: str, path: Path) -> Path:
    """Draw the time of a step and the state of each optimizer, fastest first.

    Args:
        rows: Figures by label.
        title: Title of the picture.
        path: File of the picture, which is also returned.
    """
    order = sorted(rows, key=lambda label: -rows[label]["ratio"])
    panels = (
        ("ratio", "time of a step, relative to AdamW (fused)", ".2f"),
        ("state_bytes_per_parameter", "optimizer state, bytes per parameter", ".2f"),
    )
    with picture(path, 2, 1.2 + 0.26 * len(order), style=_STYLE, sharey=True) as axes:
        for panel, (key, label, style) in zip(axes[0], panels, strict=True):
            _bars(panel, {name: rows[name][key] for name in order}, style)
            panel.set_xlabel(label)
        axes[0, 0].set_xscale("log")  # from a fraction of AdamW's time to a hundred times it
        axes[0, 0].figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return path


def _bars(panel: Axes, values: dict[str, float], style: str) -> None:
    colours = [_OURS if label.startswith("SlimAdam") else _THEIRS for label in values]
    bars = panel.barh(list(values), list(values.values()), color=colours, height=0.7)
    panel.bar_label(bars, [format(value, style) for value in values.values()], padding=3, fontsize=8)
    panel.margins(x=0.15)
