"""The picture of what sharding leaves of the saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks.harness.picture import picture
from slimadam.utils.plot_style import COLOURS

ADAMW = "AdamW"
STATES = {ADAMW: COLOURS[0], "factored": COLOURS[1], "factored, bfloat16 momentum": COLOURS[2]}
KEPT = {"rules": COLOURS[3], "factored": COLOURS[1]}
_LINES = (("--", "o"), ("-", "s"), (":", "^"))


def draw(models: dict[str, Any], path: Path) -> Path:
    """Draw the state, and what is left of the second moments, over the number of ranks.

    Args:
        models: Figures by model.
        path: File of the picture, which is also returned.
    """
    with picture(path, 2, 4.4) as ((state, kept),):
        _draw(state, models, STATES, lambda ways, way: ways[way]["state"] / 1e9)
        state.set_title("optimizer state on a GPU, GB")
        state.set_yscale("log")
        _draw(kept, models, KEPT, lambda ways, way: 100 * ways[way]["second_moments"] / ways[ADAMW]["second_moments"])
        kept.set_title("second moments kept, % of AdamW's")
    return path


def _draw(
    axes: Axes, models: dict[str, Any], ways: dict[str, str], value: Callable[[dict[str, Any], str], float]
) -> None:
    for (model, found), (line, marker) in zip(models.items(), _LINES, strict=False):
        ranks = [int(count) for count in found["ranks"]]
        for way, colour in ways.items():
            values = [value(one["ways"], way) for one in found["ranks"].values()]
            axes.plot(
                ranks,
                values,
                line,
                color=colour,
                marker=marker,
                markersize=4.5,
                label=f"{model}, {way}".replace("bfloat16", "bf16"),
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, map(str, ranks))
    axes.set_xlabel("GPUs")
    below = (0.5, -0.16)
    axes.legend(loc="upper center", bbox_to_anchor=below, ncols=len(models), fontsize=7, columnspacing=1)
