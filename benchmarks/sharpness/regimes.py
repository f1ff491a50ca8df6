"""The four regimes of one run, labelled by ``slimadam.regimes`` (arXiv 2302.12250).

Gradient descent on all digits from parameters larger than torch's, which is where the early transient comes from.
Measured at steps in geometric progression: the transient takes a few of them, the rest thousands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.workloads.full_batch import FullBatch
from slimadam import edge_of_stability, hessian_sharpness, regimes

GAIN = 2.5
LEARNING_RATE = 0.2
MARGIN = 0.1
LABELS = ("early transient", "intermediate saturation", "progressive sharpening", "edge of stability")


def study(quick: bool) -> dict[str, Any]:
    """Return the run and its regimes."""
    rows = _trace(600 if quick else 6000, 60 if quick else 160)
    found = regimes(rows, margin=MARGIN)
    labels = [regime.label for regime in found]
    return {
        "gain": GAIN,
        "lr": LEARNING_RATE,
        "rows": rows,
        "regimes": found,
        "table": [f"steps {one.first_step} to {one.last_step}: {one.label}, {one.reason}" for one in found],
        "findings": {"one run goes through all four regimes, in order": labels == list(LABELS)},
        "bars": {},
    }


def _trace(steps: int, measurements: int) -> list[dict[str, Any]]:
    """Return the top eigenvalue and the threshold at steps in geometric progression."""
    workload = FullBatch()
    model = workload.new_model(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(GAIN)
    closure = workload.closure(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    measured = set(np.geomspace(1, steps, measurements).round().astype(int).tolist())
    rows, start = [], None
    for step in range(1, steps + 1):
        if step in measured:
            found = hessian_sharpness(model.parameters(), closure(), start=start, tol=1e-3)
            start = found.eigenvector
            rows.append({"step": step, "sharpness": float(found), "threshold": edge_of_stability(optimizer)})
        optimizer.zero_grad()
        torch.autograd.backward(closure())
        optimizer.step()
    return rows
