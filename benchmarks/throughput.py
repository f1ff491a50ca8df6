"""Time of one optimizer step, side by side: ``python -m benchmarks.throughput``.

Every optimizer steps the same shapes in the same process, in turn, so that a busy machine slows all of them.
Before anything is timed, each SlimAdam step is compared with the float64 formula; a wrong one stops the run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from slimadam.kernels import blocked
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import machine
from benchmarks.parity import worst_error
from benchmarks.workloads.shapes import MODELS, Shapes
from slimadam import SlimAdam

Named = list[tuple[str, Tensor]]
BASELINE = "AdamW (default)"
OPTIMIZERS: dict[str, Callable[[Named], Optimizer]] = {
    BASELINE: lambda named: torch.optim.AdamW([param for _, param in named]),
    "AdamW (foreach)": lambda named: torch.optim.AdamW([param for _, param in named], foreach=True),
    "AdamW (fused)": lambda named: torch.optim.AdamW([param for _, param in named], fused=True),
    "SlimAdam (plan=None)": lambda named: SlimAdam(named, plan=None),
    "SlimAdam (rules)": lambda named: SlimAdam(named, plan="rules"),
    "SlimAdam (rules, fused)": lambda named: SlimAdam(named, plan="rules", fused=True),
    "SlimAdam (factored)": lambda named: SlimAdam(named, plan="factored"),
}
BARS = {"SlimAdam (rules)": 0.30}
FUSED, FUSED_BAR = ("SlimAdam (rules, fused)", "AdamW (fused)"), 0.80


def measure(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each optimizer, taken in turn."""
    grads = {name: torch.randn(shape) * 1e-3 for name, shape in shapes.items()}
    optimizers = {}
    for label, make in OPTIMIZERS.items():
        named = [(name, torch.randn(shape).mul_(0.02).requires_grad_()) for name, shape in shapes.items()]
        for name, param in named:
            param.grad = grads[name]
        optimizers[label] = make(named)
    times: dict[str, list[float]] = {label: [] for label in optimizers}
    for turn in range(rounds + 2):
        for label, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                times[label].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measure, print a table, write ``results/throughput.json``; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=blocked.BLOCK_ELEMENTS, help="elements in a cache block")
    arguments = parser.parse_args()
    error = worst_error()
    if error > 2e-5:
        raise SystemExit(f"not timing a wrong step: it is off by {error:.1e} from float64")
    blocked.BLOCK_ELEMENTS = arguments.block
    shapes = MODELS[arguments.model]()
    medians = {label: statistics.median(times) for label, times in measure(shapes, arguments.rounds).items()}
    ratios = {label: value / medians[BASELINE] for label, value in medians.items()}
    print(f"{arguments.model}, {torch.get_num_threads()} threads, medians of {arguments.rounds} steps")
    for label, value in medians.items():
        bar = f"   bar {BARS[label]}" if label in BARS else ""
        print(f"{label:24s} {value:9.1f} ms   {ratios[label]:6.3f} of {BASELINE}{bar}")
    fused = medians[FUSED[0]] / medians[FUSED[1]]
    print(f"{FUSED[0]}: {fused:.3f} of {FUSED[1]}   bar {FUSED_BAR}")
    figures = {"model": arguments.model, "block": arguments.block, "milliseconds": medians, "ratios": ratios}
    print("written:", machine.write("throughput", figures))
    if fused > FUSED_BAR or any(ratios[label] > bar for label, bar in BARS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
