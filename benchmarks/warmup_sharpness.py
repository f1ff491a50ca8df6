"""The preconditioned sharpness at initialisation, with second moments that start at zero and at the first gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.warmup_runs import BETAS, initial_critical_lr
from benchmarks.workloads.training import Workload

EPS = 1e-8
_TOLERANCE = 1e-3


def initial(workload: Workload, seed: int) -> dict[str, Any]:
    """Top eigenvalue of ``P^(-1/2) H P^(-1/2)`` at the first step, and the critical learning rate, of both.

    ``P = sqrt(v_hat) + eps`` after the first gradient: ``v_hat = g**2`` for Adam, ``g**2 / (1 - beta2)`` where the
    second moment starts at ``g**2`` and the bias correction is kept (arXiv 2406.09405).
    """
    model = workload.new_model(seed).double()
    batch = next(iter(workload.batches(1, seed)))
    inputs, targets = (part.double() if part.is_floating_point() else part for part in batch)
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        gradients = torch.autograd.grad(workload.loss(model, (inputs, targets)), params, create_graph=True)
    found: dict[str, Any] = {}
    for name, scale in (("zeros", 1.0), ("gradient", (1 - BETAS[1]) ** -0.5)):
        preconditioner = [gradient.detach().abs() * scale + EPS for gradient in gradients]
        found[name] = {
            "preconditioned_sharpness": top_eigenvalue(gradients, params, preconditioner),
            "critical_lr": initial_critical_lr(workload, seed, name),
        }
    found["ratio"] = found["zeros"]["preconditioned_sharpness"] / found["gradient"]["preconditioned_sharpness"]
    return found


def top_eigenvalue(gradients: Sequence[Tensor], params: Sequence[Tensor], preconditioner: Sequence[Tensor]) -> float:
    """The largest eigenvalue of the preconditioned Hessian, by Lanczos.

    Args:
        gradients: Of the loss, with their graph.
        params: The parameters.
        preconditioner: The diagonal of ``P``, a tensor for each parameter.
    """
    root = torch.cat([part.flatten() for part in preconditioner]).sqrt()
    sizes = [param.numel() for param in params]

    def product(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        scaled = torch.split(torch.from_numpy(vector.reshape(-1).copy()) / root, sizes)
        directions = [part.view_as(param) for part, param in zip(scaled, params, strict=True)]
        image = torch.autograd.grad(gradients, params, directions, retain_graph=True)
        flat = torch.cat([part.flatten() for part in image]) / root
        return flat.numpy()

    operator = LinearOperator((len(root), len(root)), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(len(root))
    return float(eigsh(operator, k=1, which="LA", v0=start, tol=_TOLERANCE, return_eigenvectors=False)[0])
