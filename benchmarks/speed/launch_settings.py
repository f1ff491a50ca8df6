"""Find the fastest launch settings for this GPU: ``python -m benchmarks.launch_settings --out DIR``.

For each kernel and width of tile in ``slimadam.kernels.triton.launch.SETTINGS``, steps a stack of matrices that the
kernel takes with every candidate in turn, and prints the medians. The table in the code is edited by hand: kernels that
update in place must not be tuned while they train. It needs a GPU; with ``TRITON_INTERPRET=1`` in the environment,
``--quick --device cpu`` tries the program itself in Triton's interpreter.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import machine, stopwatch
from slimadam.kernels.interface import Dims, Entry, Hyperparameters
from slimadam.kernels.triton import launch
from slimadam.kernels.triton.launch import SETTINGS, Settings, TritonStep
from slimadam.kernels.triton.tiling import Kind

DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS = {
    "full": (2048, 4096, 8192),
    "rows": (1024, 2048, 4096, 8192),
    "spread": (1024, 2048, 4096),
}
"""Elements of a tile."""
WARPS = (4, 8, 16)
SHAPES: dict[tuple[str, int], tuple[tuple[int, int], tuple[Dims, ...]]] = {
    ("full", 256): ((4096, 4096), ((),)),
    ("spread", 256): ((4096, 4096), ((1,), (0,))),
    ("rows", 32): ((1 << 18, 32), ((1,),)),
    ("rows", 256): ((1 << 16, 256), ((1,),)),
    ("rows", 1024): ((1 << 14, 768), ((1,),)),
    ("rows", 2048): ((1 << 13, 2048), ((1,),)),
    ("rows", 4096): ((1 << 12, 4096), ((1,),)),
}
"""A matrix that takes a kernel and a width of a tile, and its averaged dimensions."""
HYPER = Hyperparameters()


def candidates(kind: Kind, columns: int, dtype: torch.dtype) -> list[Settings]:
    """Return the settings to try, the present ones first.

    Args:
        kind: Kind of kernel.
        columns: Width of its tile.
        dtype: Precision of parameters.
    """
    lines = [max(1, count // columns) for count in ELEMENTS[kind]]
    tried = [Settings(each, columns, warps) for each in dict.fromkeys(lines) for warps in WARPS]
    table = SETTINGS[kind, columns]
    present = Settings(table.lines_of(dtype.itemsize), columns, table.num_warps)
    return [present, *(settings for settings in tried if settings != present)]


def measure(
    kind: Kind, columns: int, dtype: torch.dtype, device: str, copies: int, rounds: int
) -> dict[str, float | str]:
    """Return median milliseconds of a step by settings, the present ones first.

    A text says why some settings cannot be launched.

    Args:
        kind: Kind of kernel.
        columns: Width of its tile.
        dtype: Precision of parameters, gradients and first moments.
        device: Device of the tensors.
        copies: Matrices in one step; a single one is small.
        rounds: Timed steps of each settings.
    """
    shape, averaged = SHAPES[kind, columns]
    shape = shape if copies > 1 else (8, shape[1] if kind == "rows" else 256)  # the length of rows decides on the tile
    entries = [_entry(shape, averaged, dtype, device) for _ in range(copies)]
    present = SETTINGS[kind, columns]
    tried: dict[str, TritonStep | str] = {}
    try:
        for settings in candidates(kind, columns, dtype):
            launch.SETTINGS[kind, columns] = settings
            label = f"{settings.lines} x {settings.columns}, {settings.num_warps} warps"
            tried[label] = _launched(entries, device)
    finally:
        launch.SETTINGS[kind, columns] = present
    steps = {label: step for label, step in tried.items() if not isinstance(step, str)}
    laps: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            laps[label].append(_milliseconds(step, device))
    return {label: step if isinstance(step, str) else statistics.median(laps[label]) for label, step in tried.items()}


def _launched(entries: list[Entry], device: str) -> TritonStep | str:
    """Return a step with the settings that are in the table now, run once; or why that cannot be."""
    try:
        step = TritonStep(entries, HYPER)
        _milliseconds(step, device)
    except Exception as error:  # a tile may need more than a GPU has, which compiler or driver say in various ways
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return step


def _milliseconds(step: TritonStep, device: str) -> float:
    return stopwatch.lap(lambda: step.run(HYPER), device).total


def _entry(shape: tuple[int, int], averaged: tuple[Dims, ...], dtype: torch.dtype, device: str) -> Entry:
    param, grad, exp_avg = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    kept = [[1 if dim in dims else size for dim, size in enumerate(shape)] for dims in averaged]
    second = [torch.rand(sizes, device=device) for sizes in kept]
    return Entry(param, grad, exp_avg, second, (), torch.zeros((), device=device), averaged)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write ``launch_settings.json`` kernel by kernel; 1 if settings in the table do not launch."""
    parser = machine.parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small matrix, one round")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if (reason := unusable(options.device)) is not None:
        parser.error(f"--device {options.device}: {reason}")
    figures: dict[str, Any] = {}
    works = True
    for dtype in DTYPES:
        for kind, columns in SETTINGS:
            copies, rounds = (1, 1) if options.quick else (8, options.rounds)
            found = measure(kind, columns, dtype, options.device, copies, rounds)
            figures[f"{kind} {columns}, {dtype}"] = found
            path = machine.write("launch_settings", figures, options.out)
            works = works and not isinstance(next(iter(found.values())), str)
            print(f"{kind} {columns}, {dtype}: {_summary(found)}", flush=True)
    print("written:", path)
    return 0 if works else 1


def unusable(device: str) -> str | None:
    """Return why kernels cannot be launched on a device, or None."""
    trial = "to try the program without one, set TRITON_INTERPRET=1 and pass --quick --device cpu"
    if not stopwatch.is_cuda(device):
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"launch settings are measured on a GPU; {trial}"
    if not torch.cuda.is_available():
        return f"this needs a GPU, and torch {torch.__version__} finds no CUDA device; {trial}"
    return None


def _summary(found: dict[str, float | str]) -> str:
    """Return the fastest settings, the present ones, and a line for each that cannot be launched."""
    times = {label: value for label, value in found.items() if not isinstance(value, str)}
    now = next(iter(found))
    best = min(times, key=times.__getitem__, default=None)
    parts = [f"best {best} {times[best]:.3f} ms" if best else "none can be launched"]
    parts += [f"; at present {times[now]:.3f} ms" if now in times else f"; FAIL the present {now} cannot be launched"]
    parts += [f"\n  cannot be launched: {label}: {why}" for label, why in found.items() if isinstance(why, str)]
    return "".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
