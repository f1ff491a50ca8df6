"""The preconditioned sharpness at initialisation, with second moments that start at zero and at the first gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.warmup.runs import BETAS, initial_critical_lr
from benchmarks.workloads.training import Workload
from slimadam import SlimAdam, hessian_sharpness

_TOLERANCE = 1e-3


def initial(workload: Workload, seed: int) -> dict[str, Any]:
    """Return the sharpness and the critical learning rate at the initialisation, of Adam and of GI-Adam.

    The sharpness is the top eigenvalue of ``P^(-1/2) H P^(-1/2)`` with ``P = sqrt(v_hat) + eps`` of the first step:
    ``v_hat = g**2`` for Adam, ``g**2 / (1 - beta2)`` where the second moment starts at ``g**2`` and the bias correction
    is kept (arXiv 2406.09405).

    Args:
        workload: Data and model.
        seed: Seed of initialisation and batches.
    """
    found: dict[str, Any] = {
        variance_init: {
            "preconditioned_sharpness": _sharpness(workload, seed, variance_init),
            "critical_lr": initial_critical_lr(workload, seed, variance_init),
        }
        for variance_init in ("zeros", "gradient")
    }
    found["ratio"] = found["zeros"]["preconditioned_sharpness"] / found["gradient"]["preconditioned_sharpness"]
    return found


def _sharpness(workload: Workload, seed: int, variance_init: str) -> float:
    model = workload.new_model(seed).double()
    batch = next(iter(workload.batches(1, seed)))
    inputs, targets = (part.double() if part.is_floating_point() else part for part in batch)
    # A step at rate 0 makes the second moments and leaves the parameters.
    optimizer = SlimAdam(model.parameters(), lr=0.0, betas=BETAS, plan=None, variance_init=variance_init)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        torch.autograd.backward(workload.loss(model, (inputs, targets)))
        optimizer.step()
        loss = workload.loss(model, (inputs, targets))
        return float(hessian_sharpness(model.parameters(), loss, preconditioner=optimizer, tol=_TOLERANCE))
