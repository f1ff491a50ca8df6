"""The picture of the mixing study."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from benchmarks.harness.picture import picture

_COLOURS = {"prose": "#2166ac", "code": "#d1662a", "the worse of both": "#1a1a1a"}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw the sharpness and the changes by fine-tuning over the share of prose, for all seeds.

    Args:
        result: Figures of the benchmark.
        path: File of the picture, which is also returned.
    """
    with picture(path, 2, 3.8) as ((before, after),):
        _draw_sharpness(before, result)
        _draw_changes(after, result)
        advised = [run["advice"]["weights"]["prose"] for run in result["runs"]]
        for axes in (before, after):
            for share in {share for share in advised if share is not None}:
                axes.axvline(share, color="#5a5a5a", linestyle="--", linewidth=0.8)
            axes.set_xlabel("share of prose in the mix (dashed: advised)")
    return path


def _draw_sharpness(axes: Axes, result: dict[str, Any]) -> None:
    shares = result["settings"]["shares"]
    finite = [value for run in result["runs"] for curve in run["advice"]["curves"]
              for value in curve["sharpness"] if value]  # fmt: skip
    ceiling = 2 * max(finite, default=1.0)
    for index, run in enumerate(result["runs"]):
        for curve in run["advice"]["curves"]:
            drawn = [2 * ceiling if value is None else value or math.nan for value in curve["sharpness"]]
            axes.plot(shares, drawn, color=_COLOURS[curve["task"]], marker="o", markersize=2.5, linewidth=1,
                      label=curve["task"] if not index else None)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(top=ceiling)
    axes.set_title("At the checkpoint: relative critical sharpness")
    axes.set_ylabel("sharpness (off the top: no safe step)")
    axes.legend()


def _draw_changes(axes: Axes, result: dict[str, Any]) -> None:
    shares, runs = result["settings"]["shares"], result["runs"]
    lines = {task: [[change[task] for change in run["changes"]] for run in runs] for task in ("prose", "code")}
    lines["the worse of both"] = [run["worse_change"] for run in runs]
    for label, values in lines.items():
        columns = list(zip(*values, strict=True))
        axes.plot(shares, [fmean(column) for column in columns], color=_COLOURS[label], label=label,
                  linestyle="-" if label in ("prose", "code") else ":", linewidth=1.4)  # fmt: skip
        axes.fill_between(shares, [min(column) for column in columns], [max(column) for column in columns],
                          color=_COLOURS[label], alpha=0.12, linewidth=0)  # fmt: skip
    axes.axhline(0, color="#5a5a5a", linewidth=0.8)
    axes.set_title(f"After {result['settings']['finetuning_steps']} steps: change of the held-out losses")
    axes.set_ylabel("nats per byte (line: mean, band: all seeds)")
    axes.legend()
