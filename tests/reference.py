"""The update in float64 numpy, written from the formulas alone, and runs to compare with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Array = np.ndarray[Any, np.dtype[np.float64]]


def slim_adamw_float64(
    param: Array,
    grads: Sequence[Array],
    dims: tuple[int, ...] | str,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    variance_init: str = "zeros",
) -> Array:
    """All steps of one parameter; ``dims`` is the set averaged over, or ``"factored"``."""
    beta1, beta2 = betas
    kept = [tuple(range(1, param.ndim)), (0,)] if dims == "factored" else [tuple(dims)]
    m = np.zeros_like(param)
    v = [np.zeros_like(_mean(param, axes)) for axes in kept]
    largest = np.zeros_like(v[0])
    for t, g in enumerate(grads, start=1):
        g = -g if maximize else g
        if t == 1 and variance_init == "gradient":
            v = [_mean(g**2, axes) for axes in kept]
        param = param * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = [beta2 * part + (1 - beta2) * _mean(g**2, axes) for part, axes in zip(v, kept, strict=True)]
        whole = v[0] if len(v) == 1 else v[0] * v[1] / v[0].mean()
        if amsgrad:
            largest = np.maximum(largest, whole)
            whole = largest
        m_hat, v_hat = m / (1 - beta1**t), whole / (1 - beta2**t)
        param = param - lr * m_hat / (np.sqrt(v_hat) + eps)
    return param


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return x.mean(axis=axes, keepdims=True) if axes else x


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Float64 gradients whose size differs between rows, columns and steps, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones((), dtype=torch.float64)
    for dim, size in enumerate(shape):
        view = [1] * len(shape)
        view[dim] = size
        scale = scale * torch.rand(size, generator=generator, dtype=torch.float64).mul(4).exp().reshape(view)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for _ in range(steps)]
    return [grad * 10.0 ** -(index % 3) for index, grad in enumerate(made)]


def train(
    params: Sequence[Tensor],
    make: Callable[[list[Tensor]], Optimizer],
    grads: Sequence[Sequence[Tensor]],
) -> tuple[list[Tensor], Optimizer]:
    """Copies of ``params`` stepped once for each entry of ``grads`` (a list per step), and the optimizer."""
    copies = [param.clone().requires_grad_() for param in params]
    optimizer = make(copies)
    for step in grads:
        for param, grad in zip(copies, step, strict=True):
            param.grad = grad.to(param.dtype).clone()
        optimizer.step()
    return copies, optimizer


def first_moment(state: Mapping[str, Any]) -> Tensor:
    """What a parameter's state holds its first moment in: itself, or its codes."""
    stored: Tensor = state["exp_avg_codes" if "exp_avg_codes" in state else "exp_avg"]
    return stored


def second_moments(state: Mapping[str, Any], kind: str = "exp_avg_sq") -> list[Tensor]:
    """The tensors in which a parameter's state holds its second moment, in order; or its largest ones."""
    return [value for key, value in state.items() if key.startswith(kind)]
