"""The demo's picture: both loss curves, and what the optimizers' state costs."""

from __future__ import annotations

import io
import itertools
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimadam.demo.training import DemoResult, Trainee
from slimadam.utils.plot_style import WITHOUT_GRID

_LOOKS = {"AdamW": ("#d1662a", "-", "o"), "averages": ("#2166ac", "--", "s"), "best form": ("#1b7837", ":", "^")}
_PALE = 0.28
_SMOOTHING = 0.9
_STYLE: dict[Any, Any] = {**WITHOUT_GRID, "svg.fonttype": "none", "svg.hashsalt": "slimadam-demo"}


def draw(result: DemoResult, file_format: Literal["png", "svg"]) -> bytes:
    """Return the picture as the bytes of a file.

    Args:
        result: A finished demo.
        file_format: ``"png"`` or ``"svg"``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
        losses, memory = figure.subplots(1, 2, width_ratios=(2.7, 1))
        runs = {"AdamW": result.adamw, "averages": result.slimadam, "best form": result.best}
        _draw_losses(losses, runs)
        losses.set_title(
            "Held-out loss (pale: batches, smoothed) at learning rate "
            f"{result.settings.lr:g}, seed {result.settings.seed}"
        )
        _draw_memory(memory, runs)
        content = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {}
        figure.savefig(content, format=file_format, dpi=150, metadata=metadata)
    return content.getvalue()


def _draw_losses(axes: Axes, runs: dict[str, Trainee]) -> None:
    for name, run in runs.items():
        colour, line, marker = _LOOKS[name]
        label = name if name == "AdamW" else f"SlimAdam, {name}"
        steps = range(1, len(run.train_losses) + 1)
        smoothed = list(
            itertools.accumulate(run.train_losses, lambda mean, loss: _SMOOTHING * mean + (1 - _SMOOTHING) * loss)
        )
        axes.plot(steps, smoothed, line, color=colour, alpha=_PALE + 0.2, linewidth=1)
        axes.plot(list(run.held_out_losses), list(run.held_out_losses.values()), line, color=colour, marker=marker,
                  markersize=4.5, markerfacecolor="white", linewidth=1.8,
                  label=f"{label}: {run.held_out_loss:.3f}")  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per byte")
    axes.set_xlim(0, None)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="upper right")


def _draw_memory(axes: Axes, runs: dict[str, Trainee]) -> None:
    """Draw one bar each: the second moments on top of the rest of the state."""
    parameters = runs["AdamW"].second_moment_bytes / 4
    for name, run in runs.items():
        rest = (run.state_bytes - run.second_moment_bytes) / parameters
        second = run.second_moment_bytes / parameters
        colour = _LOOKS[name][0]
        axes.bar(name, rest, width=0.62, color=colour, alpha=_PALE)
        axes.bar(name, second, width=0.62, bottom=rest, color=colour)
        axes.annotate(f"{rest + second:.2f}", (name, rest + second), (0, 3), textcoords="offset points",
                      ha="center")  # fmt: skip
    axes.set_title("State, bytes per parameter", fontsize=9)
    axes.set_xlabel("pale: momentum\nsolid: second moments")
    axes.set_ylim(0, 9)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
