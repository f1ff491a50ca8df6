"""Measure what a step on CUDA takes of the host, without a GPU: ``python -m benchmarks.host_time``.

SlimAdam's way to Triton's kernels and that of ``torch.optim.AdamW(fused=True)`` to its own are taken in turn, on as
many tensors as GPT-2 has. Kernels are compiled, and every launch ends where the GPU would begin. Of torch's two calls
into C++ the first thing is left: the versions of what they write go up. Their checks, lists and launches cost nothing
here, which flatters AdamW. What counts is the shortest of many steps, which no other process has interrupted. Bar: at
most AdamW's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from benchmarks.harness import machine
from benchmarks.harness.interpreter import MockDriver
from benchmarks.workloads.shapes import gpt2_narrow
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam
from slimadam.optim.step import dispatch

Tensors = Sequence[Tensor]

BAR = 1.0
"""Of the time of AdamW."""
WARMUP = 5


@contextmanager
def without_kernels() -> Iterator[MockDriver]:
    """Let Triton's launches and those of torch's fused AdamW do nothing, and give the former tensors of the CPU."""
    driver = MockDriver()
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch.object(dispatch, "runs_triton", return_value=True),
        mock.patch.object(torch, "_fused_adamw_", _fused_adamw),
        mock.patch.object(torch, "_foreach_add_", _foreach_add),
    ):
        yield driver


def _fused_adamw(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, *others: Any, **options: Any
) -> None:
    increment_version([*params, *exp_avgs, *exp_avg_sqs])


def _foreach_add(tensors: Tensors, *others: Any, **options: Any) -> None:
    increment_version(tensors)


def measure(rounds: int) -> dict[str, float]:
    """Return the fewest microseconds of a step, and the number of SlimAdam's launches in one.

    Args:
        rounds: Timed steps of each optimizer.
    """
    with without_kernels() as driver:
        steps = {
            f"{label}, gradients {where}": _steps(build, moving)
            for label, build in BUILDS.items()
            for where, moving in (("in place", False), ("moving", True))
        }
        laps: dict[str, list[int]] = {label: [] for label in steps}
        for turn in range(WARMUP + rounds):
            for label, step in steps.items():
                driver.launched.clear()
                taken = step()
                if turn >= WARMUP:
                    laps[label].append(taken)
                if label.startswith("SlimAdam"):
                    launches = len(driver.launched)
    return {label: min(taken) / 1e3 for label, taken in laps.items()} | {"launches": float(launches)}


def _slimadam(model: nn.Module) -> torch.optim.Optimizer:
    return SlimAdam(model, plan="rules", monitor=False)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


BUILDS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {"SlimAdam": _slimadam, "AdamW (fused)": _adamw}


def _steps(build: Callable[[nn.Module], torch.optim.Optimizer], moving: bool) -> Callable[[], int]:
    """Return a function that takes a step and returns its nanoseconds."""
    model = skeleton(gpt2_narrow())
    optimizer = build(model)
    params = list(model.parameters())
    grads: list[list[Tensor]] = [[torch.randn_like(param) for param in params] for _ in range(2 if moving else 1)]

    def step() -> int:
        grads.append(grads.pop(0))
        for param, grad in zip(params, grads[0], strict=True):
            param.grad = grad
        start = time.perf_counter_ns()
        optimizer.step()
        return time.perf_counter_ns() - start

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write ``host_time.json``; 1 if the bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1000, help="timed steps of each optimizer (default: 1000)")
    options = parser.parse_args(arguments)
    found = measure(options.rounds)
    print(f"{len(gpt2_narrow())} tensors, {found['launches']:.0f} launches of SlimAdam")
    ratios = {}
    for where in ("in place", "moving"):
        ours, adamw = (found[f"{label}, gradients {where}"] for label in BUILDS)
        ratios[where] = ours / adamw
        print(f"gradients {where:9s} SlimAdam {ours:7.0f} us   AdamW (fused) {adamw:7.0f} us   {ours / adamw:.2f}")
    print("written:", machine.write("host_time", {"bar": BAR, "microseconds": found, "ratios": ratios}, options.out))
    return 0 if max(ratios.values()) <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
