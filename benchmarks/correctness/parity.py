"""How exact the update is: ``python -m benchmarks.parity``.

Against ``torch.optim.AdamW`` with ``plan=None`` (25 steps, every option combination, in ulps of the parameter),
and against the formula in float64 with every shape and form (12 steps, the largest error).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.formula import Hyperparameters, follow
from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.state.rule import dimension_subsets

ADAMW_SHAPES = [(), (1,), (0,), (7, 5), (3, 4, 5, 2)]
SHAPES = [(9,), (7, 5), (33, 1), (3, 5, 4), (2, 3, 4, 5)]
IMPLEMENTATIONS: list[dict[str, Any]] = [{}, {"foreach": False}, {"foreach": True}]
HYPERPARAMETERS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}


def worst_ulps(dtype: torch.dtype) -> float:
    """Return the largest difference to AdamW over 25 steps, in ulps of the parameter (at least of 0.01)."""
    worst = 0.0
    for implementation, decay, amsgrad, maximize in itertools.product(
        IMPLEMENTATIONS, (0.0, 0.1), (False, True), (False, True)
    ):
        options = {**HYPERPARAMETERS, "weight_decay": decay, "amsgrad": amsgrad, "maximize": maximize}
        torch.manual_seed(0)
        starts = [torch.randn(shape, dtype=dtype) for shape in ADAMW_SHAPES]
        theirs = [start.clone().requires_grad_() for start in starts]
        ours = [start.clone().requires_grad_() for start in starts]
        optimizers = [torch.optim.AdamW(theirs, **options), SlimAdam(ours, plan=None, **options, **implementation)]
        for _ in range(25):
            for a, b in zip(theirs, ours, strict=True):
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        for a, b in zip(theirs, ours, strict=True):
            if a.numel():
                difference = ((a - b).abs() / a.abs().clamp_min(0.01)).max().item()
                worst = max(worst, difference / torch.finfo(dtype).eps)
    return worst


def worst_error() -> float:
    """Return the largest difference to the float64 formula over 12 steps, every form and implementation."""
    worst = 0.0
    for shape in SHAPES:
        forms: list[Any] = [*dimension_subsets(len(shape)), *(["factored"] if len(shape) > 1 else [])]
        for form, implementation in itertools.product(forms, IMPLEMENTATIONS):
            worst = max(worst, _error(shape, form, implementation))
    return worst


def _error(shape: tuple[int, ...], form: Any, implementation: dict[str, Any]) -> float:
    torch.manual_seed(0)
    rule = Rule(form="factored") if form == "factored" else Rule(form, "mean")
    start = torch.randn(shape)
    grads = [torch.randn(shape) for _ in range(12)]
    param = start.clone().requires_grad_()
    plan = CompressionPlan({"w": rule})
    optimizer = SlimAdam([("w", param)], plan=plan, weight_decay=0.1, **HYPERPARAMETERS, **implementation)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    expected = follow(start, grads, [rule], Hyperparameters(weight_decay=0.1, **HYPERPARAMETERS)).param
    return (param.detach() - expected).abs().max().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the largest differences and write ``results/parity.json``; exit 1 if a bar is missed."""
    out = machine.results_folder(__doc__, arguments)
    ulps = {str(dtype): worst_ulps(dtype) for dtype in (torch.float32, torch.float64)}
    error = worst_error()
    for dtype, value in ulps.items():
        print(f"plan=None against torch.optim.AdamW, {dtype}, 25 steps: {value:.1f} ulp (bar: 4)")
    print(f"compressed against float64, 12 float32 steps: {error:.1e} (bar: 2e-5)")
    print("written:", machine.write("parity", {"ulps": ulps, "float64_error": error}, out))
    if max(ulps.values()) > 4 or error > 2e-5:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
