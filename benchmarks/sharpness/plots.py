"""The pictures of the curvature studies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.picture import picture
from slimadam.utils.plot_style import COLOURS

_GREY = "#7a7a7a"
_EDGE: dict[str, Any] = {"color": _GREY, "linewidth": 0.8, "linestyle": "--"}


def draw_uv(result: dict[str, Any], folder: Path) -> None:
    """Draw the behaviours of the UV model over steps, and late sharpness over the learning rate.

    Args:
        result: Figures of the part.
        folder: Folder of the picture.
    """
    with picture(folder / "sharpness-uv.png", 2, 3.4, dpi=120, width_ratios=(1, 1.4)) as ((left, right),):
        for (name, run), colour in zip(result["runs"].items(), COLOURS, strict=False):
            shares = np.array(run["sharpness"]) * run["lr"] / 2
            left.plot(shares[:100], color=colour, linewidth=1.1, label=name)
        left.axhline(1, **_EDGE)
        left.set(yscale="log", xlabel="step", title="UV model: sharpness over 2/lr")
        left.legend()
        scanned = result["scan"]
        for rate, values in zip(scanned["rates"], scanned["late_sharpness_over_the_edge"], strict=True):
            right.plot([rate] * len(values), values, ",", color=COLOURS[0], alpha=0.7)
        right.axhline(1, **_EDGE)
        right.set(
            xlabel="learning rate, in sqrt(width) / y", title="late sharpness over 2/lr: periods 1, 2, 4, ... and chaos"
        )


def draw_edge(result: dict[str, Any], folder: Path) -> None:
    """Draw each optimizer's sharpness as a share of its threshold, by learning rate.

    Args:
        result: Figures of the part.
        folder: Folder of the picture.
    """
    names = list(dict.fromkeys(run["optimizer"] for run in result["runs"]))
    with picture(folder / "sharpness-edge.png", len(names), 3.2, dpi=120, sharey=True) as (axes,):
        for panel, name in zip(axes, names, strict=True):
            runs = [run for run in result["runs"] if run["optimizer"] == name]
            for run, colour in zip(runs, COLOURS, strict=False):
                shares = [row["sharpness"] / row["threshold"] for row in run["rows"]]
                panel.plot([row["step"] for row in run["rows"]], shares, color=colour, linewidth=1.1,
                           label=f"lr {run['lr']:g}")  # fmt: skip
            panel.axhline(1, **_EDGE)
            panel.set(title=name, xlabel="step")
            panel.legend()
        axes[0].set_ylabel("Hessian sharpness over its threshold")


def draw_tracking(result: dict[str, Any], folder: Path) -> None:
    """Draw critical, directional and Hessian sharpness along each run, as shares of their thresholds.

    Args:
        result: Figures of the part.
        folder: Folder of the picture.
    """
    with picture(folder / "sharpness-tracking.png", len(result["runs"]), 3.2, dpi=120, sharey=True) as (axes,):
        for panel, (name, rows) in zip(axes, result["runs"].items(), strict=True):
            steps = [row["step"] for row in rows]
            for (key, style), colour in zip((("hessian", "-"), ("directional", "-"), ("critical", ".")), COLOURS,
                                            strict=False):  # fmt: skip
                panel.plot(steps, _positive([row[key] for row in rows]), style, color=colour, linewidth=1.1,
                           markersize=3, label=key)  # fmt: skip
            panel.axhline(1, **_EDGE)
            panel.set(title=name, xlabel="step", yscale="log")
        axes[0].set_ylabel("sharpness over its threshold")
        axes[0].legend()


def draw_schedule(result: dict[str, Any], folder: Path) -> None:
    """Draw critical sharpness and 2/lr over the steps of the schedule.

    Args:
        result: Figures of the part.
        folder: Folder of the picture.
    """
    with picture(folder / "sharpness-schedule.png", len(result["runs"]), 3.2, dpi=120) as (axes,):
        for panel, (name, run) in zip(axes, result["runs"].items(), strict=True):
            steps = [row["step"] for row in run["rows"]]
            critical = _positive([row["critical"] and row["critical"] * 2 / row["lr"] for row in run["rows"]])
            panel.plot(steps, critical, ".", color=COLOURS[0], markersize=4, label="critical sharpness")
            panel.plot(steps, [2 / row["lr"] for row in run["rows"]], **_EDGE, label="2/lr")
            panel.set(title=name, xlabel="step", yscale="log")
        axes[0].legend()


def draw_regimes(result: dict[str, Any], folder: Path) -> None:
    """Draw one run's sharpness with its regimes as bands.

    Args:
        result: Figures of the part.
        folder: Folder of the picture.
    """
    with picture(folder / "sharpness-regimes.png", 1, 3.2, dpi=120) as ((panel,),):
        rows = result["rows"]
        panel.plot([row["step"] for row in rows], [row["sharpness"] for row in rows], color="black", linewidth=1.1)
        panel.axhline(rows[0]["threshold"], **_EDGE, label="2/lr")
        for (label, first, last, _), colour in zip(result["regimes"], COLOURS, strict=False):
            panel.axvspan(first, last, color=colour, alpha=0.15, linewidth=0, label=label)
        panel.set(title="gradient descent on digits: Hessian sharpness", xlabel="step", xscale="log")
        panel.legend()


def _positive(values: Sequence[float | None]) -> list[float]:
    """Replace values that a logarithmic axis cannot show with NaN, which is not drawn."""
    return [math.nan if value is None or value <= 0 else value for value in values]
