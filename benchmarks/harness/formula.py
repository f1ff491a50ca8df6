"""The update in float64 on the CPU, written from the formulas alone, for every form and every first moment.

It takes the package's rules, so that parts of a parameter can be followed. ``tests/reference.py`` has a smaller one in
numpy that knows nothing of the package; the tests compare both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slimadam import Rule

_BLOCK = 256
_LARGEST_CODE = 127


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of a run; names and meanings as :class:`slimadam.SlimAdam`'s."""

    lr: float = 3e-3
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1
    amsgrad: bool = False
    maximize: bool = False
    variance_init: str = "zeros"


class Followed(NamedTuple):
    """A parameter after its last step.

    Attributes:
        param: The parameter after the last step, float64.
        path: Sum of the sizes of its updates: what rounding errors of the update are relative to.
    """

    param: Tensor
    path: Tensor


def follow(
    start: Tensor,
    grads: Sequence[Tensor],
    rules: Sequence[Rule],
    hyper: Hyperparameters,
    momentum: torch.dtype | str = torch.float64,
) -> Followed:
    """Take all steps of one parameter; only the storage of the first moment is rounded.

    Args:
        start: The parameter, any shape and precision.
        grads: A gradient for each step.
        rules: One for the parameter, or one for each of its parts.
        hyper: Hyperparameters.
        momentum: How the first moment is stored between steps: a dtype, or ``"int8"``.
    """
    beta1, beta2 = hyper.betas
    param = start.detach().cpu().double()
    path, exp_avg = torch.zeros_like(param), torch.zeros_like(param)
    second: list[list[Tensor]] = []
    largest = torch.zeros_like(param)
    for step, given in enumerate(grads, start=1):
        grad = given.detach().cpu().double() * (-1 if hyper.maximize else 1)
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        squares = [_averages(grad**2, rule) for rule in rules]
        if not second:
            begins = 1.0 if hyper.variance_init == "gradient" else 0.0
            second = [[begins * part for part in parts] for parts in squares]
        second = [
            [beta2 * old + (1 - beta2) * new for old, new in zip(parts, averages, strict=True)]
            for parts, averages in zip(second, squares, strict=True)
        ]
        whole = torch.empty_like(param)
        for rule, parts in zip(rules, second, strict=True):
            rule.take(whole).copy_(_stand_in(parts, rule, param.dim()))
        largest = torch.maximum(largest, whole)
        used = largest if hyper.amsgrad else whole
        update = hyper.lr * exp_avg / (1 - beta1**step) / ((used / (1 - beta2**step)).sqrt() + hyper.eps)
        param = param * (1 - hyper.lr * hyper.weight_decay) - update
        path += update.abs()
        exp_avg = _stored(exp_avg, grad, momentum)
    return Followed(param, path)


def _averages(squared: Tensor, rule: Rule) -> list[Tensor]:
    piece = rule.take(squared)
    return [piece.mean(dims, keepdim=True) if dims else piece for dims in rule.averaged_dims(piece.dim())]


def _stand_in(parts: Sequence[Tensor], rule: Rule, ndim: int) -> Tensor:
    """Return the second moment that row and column averages represent: ``r c / mean(r)``."""
    if len(parts) == 1:
        return parts[0]
    rows, columns = parts
    return rows * columns / rows.mean(rule.averaged_dims(ndim)[1], keepdim=True).clamp_min(1e-300)


def _stored(exp_avg: Tensor, grad: Tensor, momentum: torch.dtype | str) -> Tensor:
    """Return a first moment that was stored and read again."""
    if isinstance(momentum, torch.dtype):
        return exp_avg.to(momentum).double()
    blocks, grads = _blocks(exp_avg), _blocks(grad)
    scales = _rounded_up(blocks.abs().amax(1, keepdim=True))
    codes = _LARGEST_CODE * (blocks.abs() / scales.clamp_min(1e-300)).sqrt()
    codes = torch.where(grads == 0, codes.floor(), codes.round())
    decoded = blocks.sign() * (codes / _LARGEST_CODE) ** 2 * scales
    return decoded.flatten()[: exp_avg.numel()].reshape(exp_avg.shape)


def _blocks(values: Tensor) -> Tensor:
    padding = -values.numel() % _BLOCK
    return torch.nn.functional.pad(values.flatten(), (0, padding)).reshape(-1, _BLOCK)


def _rounded_up(values: Tensor) -> Tensor:
    """Return the smallest power of two that is not below each value, none of which is negative; zero for zero."""
    return torch.where(values > 0, torch.exp2(values.log2().ceil()), torch.zeros_like(values))
