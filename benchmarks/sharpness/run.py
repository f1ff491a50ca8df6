"""Curvature of training: ``python -m benchmarks.sharpness``, or of some parts: ``python -m benchmarks.sharpness uv``.

Phenomena that others found, each with a criterion that is computed from the data, and whether it was reproduced
here: ``uv``, the UV model; ``edge``, progressive sharpening and the edge of stability on real data; ``tracking``,
critical beside directional and Hessian sharpness; ``schedule``, a learning rate that warms up, stays and decays;
``regimes``, the four regimes of one run. Bars: the worst error of ``hessian_sharpness`` on the UV model below 1e-6,
and that of the critical against the directional sharpness on quadratics below 7%.

Each part writes ``results/sharpness_PART.json`` and ``docs/sharpness-PART.png``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.sharpness import edge, plots, regimes, schedule, tracking, uv

PARTS: dict[str, tuple[Callable[[bool], dict[str, Any]], Callable[[dict[str, Any], Path], None]]] = {
    "uv": (uv.study, plots.draw_uv),
    "edge": (edge.study, plots.draw_edge),
    "tracking": (tracking.study, plots.draw_tracking),
    "schedule": (schedule.study, plots.draw_schedule),
    "regimes": (regimes.study, plots.draw_regimes),
}
PICTURES = Path(__file__).resolve().parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print and write them; the exit code is 1 if a bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    options.pictures.mkdir(parents=True, exist_ok=True)
    held = [_run(part, options) for part in options.parts or PARTS]
    return 0 if all(held) else 1


def _run(part: str, options: argparse.Namespace) -> bool:
    study, draw = PARTS[part]
    started = time.perf_counter()
    figures = rounded(study(options.quick))
    figures["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{part} ({figures['seconds']:.0f} s)")
    for finding, reproduced in figures["findings"].items():
        print(f"  {'reproduced    ' if reproduced else 'NOT reproduced'}  {finding}")
    met = machine.print_bars(figures["bars"])
    for line in figures.get("table", []):
        print(f"    {line}")
    print("  written:", machine.write(f"sharpness_{part}", figures, options.out), flush=True)
    draw(figures, options.pictures)
    return met


def rounded(value: Any) -> Any:
    """Round floats to six significant digits, all through; values without JSON, which are not finite, become None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    raise SystemExit(main())
