"""The phase diagrams of a warmup study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.harness.picture import picture

_STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw the final loss by method and target rate for each model, a mark where not every seed trains.

    Args:
        result: Figures of the benchmark.
        path: File of the picture, which is also returned.
    """
    models = result["models"]
    with picture(path, len(models), 4.4, width=4.9 * len(models), style=_STYLE) as axes:
        for panel, (name, found) in zip(axes[0], models.items(), strict=True):
            _draw_model(panel, name, found, result["rates"])
    return path


def _draw_model(panel: Axes, name: str, found: dict[str, Any], rates: list[float]) -> None:
    labels = list(found["final_loss"])
    mean = np.array([[np.mean(losses) for losses in found["final_loss"][label]] for label in labels]).T
    shown = np.minimum(mean, found["guessing_loss"])  # whatever is worse than guessing looks alike
    image = panel.imshow(shown, origin="lower", aspect="auto", cmap="viridis_r", vmin=found["best_loss"],
                         vmax=found["guessing_loss"])  # fmt: skip
    for column, label in enumerate(labels):
        for row, trains in enumerate(found["trains"][label]):
            if not trains:
                panel.text(column, row, "×", ha="center", va="center", color="white", fontsize=12)
    panel.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    panel.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    panel.set_ylabel("target learning rate")
    panel.set_title(f"{name}: final loss, × where a seed fails")
    panel.figure.colorbar(image, ax=panel)
