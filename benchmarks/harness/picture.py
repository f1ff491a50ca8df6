"""Pictures of results, in the style of the package's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from slimadam.utils.plot_style import STYLE


@contextmanager
def picture(
    path: Path,
    columns: int,
    height: float,
    rows: int = 1,
    width: float = 9.0,
    dpi: int = 150,
    style: dict[Any, Any] = STYLE,
    **options: Any,
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield axes ``[rows, columns]`` to draw on, and write the picture at the end.

    Args:
        path: File of the picture; its folder is made if it is missing.
        columns: Panels side by side.
        height: Height in inches.
        rows: Panels one below the other.
        width: Width in inches; the default is that of a page.
        dpi: Pixels per inch.
        style: Settings of matplotlib.
        **options: Further arguments of :meth:`matplotlib.figure.Figure.subplots`.
    """
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure.subplots(rows, columns, squeeze=False, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
