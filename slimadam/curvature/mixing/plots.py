"""Pictures of sharpness over mixing ratios. Needs the extra ``slimadam[cli]``."""

from __future__ import annotations

import math
from pathlib import Path

from slimadam.curvature.mixing.advice import MixAdvice
from slimadam.utils.plot_style import COLOURS, REFERENCE_COLOUR, STYLE

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("plots of sharpness need matplotlib: pip install 'slimadam[cli]'") from error


def draw_mix(advice: MixAdvice, path: str | Path) -> None:
    """The sharpness of each task over the share of the first domain, with intervals and the advised share.

    Of more than two domains the mixes stand in their order.

    Args:
        advice: What :func:`~slimadam.advise_mix` found.
        path: The picture to write; its ending says the format.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
        axes = figure.subplots()
        draw_curves(axes, advice)
        figure.savefig(path, dpi=150)


def draw_curves(axes: Axes, advice: MixAdvice) -> None:
    """As :func:`draw_mix`, on axes at hand."""
    first, *others = advice.weights
    places = [mix[0] for mix in advice.mixes] if len(others) == 1 else list(map(float, range(len(advice.mixes))))
    finite = [value for curve in advice.curves for value in curve.sharpness if 0 < value < math.inf]
    ceiling = 10 * max(finite, default=1.0)
    for index, curve in enumerate(advice.curves):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, [_below(value, ceiling) for value in curve.sharpness], color=colour, label=curve.task,
                  marker="o", markersize=3)  # fmt: skip
        low, high = zip(*curve.interval, strict=True)
        axes.fill_between(places, [_below(value, ceiling) for value in low], [_below(value, ceiling) for value in high],
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
    if not math.isnan(advice.ratio):
        advised = places[advice.mixes.index(tuple(advice.weights.values()))]
        axes.axvline(advised, color=REFERENCE_COLOUR, linestyle="--", linewidth=1, label="advised")
        if len(others) == 1:
            axes.axvspan(*advice.interval, color=REFERENCE_COLOUR, alpha=0.1, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(top=ceiling)
    axes.set_xlabel(f"share of {first} in the mix" if len(others) == 1 else "mix")
    axes.set_ylabel("relative critical sharpness (off the top: no safe step)")
    axes.legend()


def _below(value: float, ceiling: float) -> float:
    """What is off the picture stands just above it, so that the line leaves at the top."""
    return min(value, 2 * ceiling) if value else math.nan
