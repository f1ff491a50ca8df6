"""How plots look: one style and one set of colours for all that slimadam draws."""

from __future__ import annotations

from typing import Any

WITHOUT_GRID: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
STYLE: dict[Any, Any] = {
    **WITHOUT_GRID,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
}
COLOURS = ("#2166ac", "#d1662a", "#1b7837", "#7b3294", "#b2182b", "#8c6d1f")
REFERENCE_COLOUR = "#5a5a5a"
