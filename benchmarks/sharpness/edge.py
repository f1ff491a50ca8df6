"""Progressive sharpening and the edge of stability on real data, for gradient descent and for Adam.

All digits are one batch. Gradient descent is judged by the top eigenvalue of the Hessian against ``2/lr`` (arXiv
2103.00065), Adam and SlimAdam by that of the preconditioned Hessian against ``38/lr`` (arXiv 2207.14484).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.workloads.full_batch import FullBatch
from slimadam import SlimAdam, edge_of_stability, hessian_sharpness, regimes

BETAS = (0.9, 0.99)
MEASUREMENTS = 120
SMALLEST_RISE = 2.0
ABOUT = 0.1
"""How far from the threshold the median over the edge of stability may be."""
TOLERANCE = 1e-3
"""Tolerance of the eigenvalue's residual."""

OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "gradient descent": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr),
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr, betas=BETAS),
    "SlimAdam": lambda model, lr: SlimAdam(model, lr=lr, betas=BETAS, weight_decay=0.0, plan="factored"),
}
RUNS: dict[str, dict[float, int]] = {
    "gradient descent": {0.2: 3600, 0.28: 2640, 0.4: 1800},
    "Adam": {5e-4: 2400, 1e-3: 1800, 2e-3: 1200},
    "SlimAdam": {5e-4: 2400, 1e-3: 1800, 2e-3: 1200},
}
"""Steps by learning rate: rates at which the sharpness begins well below its threshold."""
QUICK: dict[str, dict[float, int]] = {"gradient descent": {0.4: 900}, "Adam": {2e-3: 800}}


def study(quick: bool) -> dict[str, Any]:
    """Return each run's trace and regimes, and what was reproduced."""
    runs = [
        _trace(name, lr, steps, 70 if quick else MEASUREMENTS)
        for name, rates in (QUICK if quick else RUNS).items()
        for lr, steps in rates.items()
    ]
    return {
        "runs": runs,
        "table": [
            f"{run['optimizer']}, lr {run['lr']:g}: rises {run['rise']:.1f} times; at the edge "
            f"{run['of_threshold_at_the_edge'] or math.nan:.3f} of the threshold at the median"
            for run in runs
        ],
        "findings": findings(runs),
        "bars": {},
    }


def _trace(name: str, lr: float, steps: int, measurements: int) -> dict[str, Any]:
    """Train, measuring the top eigenvalue at equal distances, after the step of which it says the stability."""
    workload = FullBatch()
    model = workload.new_model(seed=0)
    closure = workload.closure(model)
    optimizer = OPTIMIZERS[name](model, lr)
    preconditioner = None if name == "gradient descent" else optimizer
    rows: list[dict[str, Any]] = []
    start, unconverged = None, 0
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = closure()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % (steps // measurements) == 0:
            found = hessian_sharpness(
                model.parameters(), closure(), preconditioner=preconditioner, start=start, tol=TOLERANCE
            )
            start = found.eigenvector
            unconverged += not found.converged
            rows.append({"step": step, "sharpness": float(found), "threshold": edge_of_stability(optimizer),
                         "loss": loss.item()})  # fmt: skip
    found_regimes = regimes(rows)
    at_edge = [regime for regime in found_regimes if regime.label == "edge of stability"]
    ratios = [row["sharpness"] / row["threshold"] for row in rows if at_edge and row["step"] >= at_edge[0].first_step]
    lowest = min(row["sharpness"] for row in rows)
    return {
        "optimizer": name,
        "lr": lr,
        "rows": rows,
        "unconverged": unconverged,
        "rise": max(row["sharpness"] for row in rows) / lowest,
        "of_threshold_at_the_edge": median(ratios) if ratios else None,
        "regimes": found_regimes,
    }


def findings(runs: list[dict[str, Any]]) -> dict[str, bool]:
    """Return whether every run of each optimizer sharpens, and comes to rest at its threshold."""
    found = {}
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        own = [run for run in runs if run["optimizer"] == name]
        found[f"{name}: the sharpness rises {SMALLEST_RISE:g} times and more at every rate"] = all(
            run["rise"] >= SMALLEST_RISE for run in own
        )
        ratios = [run["of_threshold_at_the_edge"] for run in own]
        found[f"{name}: it then stays within {ABOUT:.0%} of the threshold at every rate"] = all(
            ratio is not None and abs(ratio - 1) <= ABOUT for ratio in ratios
        )
    return found
