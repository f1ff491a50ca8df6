"""Which launch settings are fastest on this GPU: ``python -m benchmarks.launch_settings --out DIR``.

For each kernel and width of tile in ``slimadam.kernels.triton_update.SETTINGS``, steps a stack of matrices that the
kernel takes with every candidate in turn, and prints the medians. The table in the code is edited by hand: kernels that
update in place must not be tuned while they train. ``--quick --device cpu`` runs it in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from slimadam.kernels import triton_update
from slimadam.kernels.triton_update import SETTINGS, Settings, TritonStep

from benchmarks import machine, stopwatch
from slimadam.functional import Dims, Entry, Hyperparameters

DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS = {
    "full": (2048, 4096, 8192),
    "columns": (64, 128, 256),
    "rows": (1024, 2048, 4096, 8192),
    "spread": (2048, 4096),
}
"""Elements of a tile; for ``"columns"`` its rows."""
WARPS = (4, 8, 16)
SHAPES: dict[tuple[str, int], tuple[tuple[int, int], tuple[Dims, ...]]] = {
    ("full", 256): ((4096, 4096), ((),)),
    ("spread", 256): ((4096, 4096), ((1,), (0,))),
    ("columns", 32): ((4096, 4096), ((0,),)),
    ("rows", 32): ((1 << 18, 32), ((1,),)),
    ("rows", 256): ((1 << 16, 256), ((1,),)),
    ("rows", 1024): ((1 << 14, 768), ((1,),)),
    ("rows", 4096): ((1 << 12, 4096), ((1,),)),
}
"""By kernel and width of a tile: a matrix that takes it, and its averaged dimensions."""


def candidates(kind: str, columns: int) -> list[Settings]:
    """Settings to try, the present ones first."""
    lines = [count if kind == "columns" else max(1, count // columns) for count in ELEMENTS[kind]]
    tried = [Settings(each, columns, warps) for each in dict.fromkeys(lines) for warps in WARPS]
    present = SETTINGS[kind, columns]
    return [present, *(settings for settings in tried if settings != present)]


def measure(kind: str, columns: int, dtype: torch.dtype, device: str, copies: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step by settings."""
    shape, averaged = SHAPES[kind, columns]
    shape = shape if copies > 1 else (8, min(shape[1], 256))
    entries = [_entry(shape, averaged, dtype, device) for _ in range(copies)]
    hyper, found = Hyperparameters(), {}
    present = SETTINGS[kind, columns]
    steps = {}
    try:
        for settings in candidates(kind, columns):
            triton_update.SETTINGS[kind, columns] = settings
            steps[settings] = TritonStep(entries, hyper)
    finally:
        triton_update.SETTINGS[kind, columns] = present
    laps: dict[Settings, list[float]] = {settings: [] for settings in steps}
    for turn in range(rounds + 1):
        for settings, step in steps.items():
            taken = stopwatch.lap(lambda step=step: step.run(hyper), device).total  # type: ignore[misc]
            laps[settings] += [taken] if turn else []
    for settings, times in laps.items():
        found[f"{settings.lines} x {settings.columns}, {settings.num_warps} warps"] = statistics.median(times)
    return found


def _entry(shape: tuple[int, int], averaged: tuple[Dims, ...], dtype: torch.dtype, device: str) -> Entry:
    param, grad, exp_avg = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    kept = [[1 if dim in dims else size for dim, size in enumerate(shape)] for dims in averaged]
    second = [torch.rand(sizes, device=device) for sizes in kept]
    return Entry(param, grad, exp_avg, second, (), torch.zeros((), device=device), averaged)


def main(arguments: list[str] | None = None) -> None:
    """Measure everything, print, and write ``launch_settings.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small matrix, one round")
    parser.add_argument("--out", type=Path, default=machine.RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {}
    for dtype in DTYPES:
        for kind, columns in SETTINGS:
            copies, rounds = (1, 1) if options.quick else (8, options.rounds)
            found = measure(kind, columns, dtype, options.device, copies, rounds)
            best = min(found, key=found.__getitem__)
            now = next(iter(found.values()))
            print(f"{kind} {columns}, {dtype}: best {best} {found[best]:.3f} ms; at present {now:.3f} ms")
            figures[f"{kind} {columns}, {dtype}"] = found
    print("written:", machine.write("launch_settings", figures, options.out))


if __name__ == "__main__":
    main()
