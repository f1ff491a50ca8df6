"""The demo's picture: both loss curves, and what the optimizers' state costs."""

from __future__ import annotations

import io
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimadam.demo.training import DemoResult, OptimizerResult, TrainingCurve
from slimadam.utils.plot_style import WITHOUT_GRID

_COLOURS = {"AdamW": "#d1662a", "averages": "#2166ac", "best form": "#1b7837"}
_LINES = {"AdamW": "-", "averages": "--", "best form": ":"}
_MARKERS = {"AdamW": "o", "averages": "s", "best form": "^"}
_PALE = 0.28
_SMOOTHING = 0.9
_STYLE: dict[Any, Any] = {**WITHOUT_GRID, "svg.fonttype": "none", "svg.hashsalt": "slimadam-demo"}


def draw(result: DemoResult, file_format: Literal["png", "svg"]) -> bytes:
    """The picture as the bytes of a file.

    Args:
        result: A finished demo.
        file_format: ``"png"`` or ``"svg"``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
        losses, memory = figure.subplots(1, 2, width_ratios=(2.7, 1))
        runs = {"AdamW": result.adamw, "averages": result.slimadam, "best form": result.best}
        for name, run in runs.items():
            _draw_curve(losses, name, run.curve)
        _label_losses(losses, result)
        _draw_memory(memory, runs)
        content = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {}
        figure.savefig(content, format=file_format, dpi=150, metadata=metadata)
    return content.getvalue()


def _draw_curve(axes: Axes, name: str, curve: TrainingCurve) -> None:
    colour, line = _COLOURS[name], _LINES[name]
    label = name if name == "AdamW" else f"SlimAdam, {name}"
    steps = range(1, len(curve.train_losses) + 1)
    axes.plot(steps, _smoothed(curve.train_losses), line, color=colour, alpha=_PALE + 0.2, linewidth=1)
    axes.plot(list(curve.held_out_losses), list(curve.held_out_losses.values()), line, color=colour,
              marker=_MARKERS[name], markersize=4.5, markerfacecolor="white", linewidth=1.8,
              label=f"{label}: {curve.held_out_loss:.3f}")  # fmt: skip


def _label_losses(axes: Axes, result: DemoResult) -> None:
    settings = result.settings
    axes.set_title(f"Held-out loss (pale: batches, smoothed) at learning rate {settings.lr:g}, seed {settings.seed}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per byte")
    axes.set_xlim(0, None)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="upper right")


def _draw_memory(axes: Axes, runs: dict[str, OptimizerResult]) -> None:
    """One bar each: the second moments on top of the rest of the state."""
    parameters = runs["AdamW"].state.second_moments / 4
    for name, run in runs.items():
        rest = (run.state.total - run.state.second_moments) / parameters
        second = run.state.second_moments / parameters
        axes.bar(name, rest, width=0.62, color=_COLOURS[name], alpha=_PALE)
        axes.bar(name, second, width=0.62, bottom=rest, color=_COLOURS[name])
        axes.annotate(f"{rest + second:.2f}", (name, rest + second), (0, 3), textcoords="offset points",
                      ha="center")  # fmt: skip
    axes.set_title("State, bytes per parameter", fontsize=9)
    axes.set_xlabel("pale: momentum\nsolid: second moments")
    axes.set_ylim(0, 9)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)


def _smoothed(values: list[float]) -> list[float]:
    """Exponential moving average, started at the first value."""
    smoothed = values[:1]
    for value in values[1:]:
        smoothed.append(_SMOOTHING * smoothed[-1] + (1 - _SMOOTHING) * value)
    return smoothed
