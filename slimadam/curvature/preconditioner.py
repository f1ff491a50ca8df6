"""Adam's preconditioner ``P = sqrt(v_hat) + eps``, as the scaling ``P**(-1/2)`` of each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import unwrapped
from slimadam.kernels.interface import second_moment_dtype
from slimadam.optim.slimadam import SlimAdam
from slimadam.state import second_moment
from slimadam.utils.errors import shown


@torch.no_grad()
def scales_of(preconditioner: Optimizer | Iterable[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """``P**(-1/2)`` for each parameter, broadcastable to it.

    Args:
        preconditioner: An optimizer that keeps ``exp_avg_sq``, or the diagonal of ``P`` for each parameter.
        params: The parameters, in their order.

    Raises:
        TypeError: It is neither, or the optimizer keeps no second moments.
        ValueError: A parameter is missing, or a diagonal has the wrong shape or is not positive.
    """
    if isinstance(preconditioner, Optimizer):
        diagonals = _of_optimizer(unwrapped(preconditioner), params)
    elif isinstance(preconditioner, Tensor) or not isinstance(preconditioner, Iterable):
        raise TypeError(f"preconditioner={shown(preconditioner)} must be an optimizer or a list of tensors")
    else:
        diagonals = list(preconditioner)
    if len(diagonals) != len(params):
        raise ValueError(f"preconditioner has {len(diagonals)} tensors for {len(params)} parameters; give one for each")
    return [_scale(index, *pair) for index, pair in enumerate(zip(diagonals, params, strict=True))]


def _scale(index: int, diagonal: Tensor, param: Tensor) -> Tensor:
    if not isinstance(diagonal, Tensor):
        raise TypeError(f"preconditioner[{index}]={shown(diagonal)} must be a tensor")
    try:
        diagonal.expand_as(param)
    except RuntimeError:
        raise ValueError(
            f"preconditioner[{index}] has shape {tuple(diagonal.shape)}; it must broadcast to the parameter's, "
            f"{tuple(param.shape)}"
        ) from None
    if diagonal.is_complex() or not (diagonal.isfinite() & (diagonal > 0)).all():
        raise ValueError(
            f"preconditioner[{index}] has elements that are not positive numbers: an optimizer needs eps > 0 for "
            "elements whose gradient was always zero"
        )
    return diagonal.to(param.device).rsqrt()


def _of_optimizer(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    found = {param: (group, moment) for param, group, moment in _second_moments(optimizer)}
    for index, param in enumerate(params):
        if param not in found:
            raise ValueError(
                f"params[{index}], of shape {tuple(param.shape)}, has no second moment in {type(optimizer).__name__}; "
                "take a step first, and leave out what the optimizer does not hold or what never had a gradient"
            )
    return [_diagonal(*found[param], optimizer.state[param]["step"]) for param in params]


def _diagonal(group: dict[str, Any], moment: Tensor, step: Tensor | float) -> Tensor:
    """``sqrt(v / (1 - beta2**t)) + eps``."""
    correction = 1 - float(group["betas"][1]) ** float(step)
    diagonal: Tensor = (moment.to(second_moment_dtype(moment.dtype)) / correction).sqrt() + group["eps"]
    return diagonal


def _second_moments(optimizer: Optimizer) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """Parameter, group and full second moment of what has been stepped; with amsgrad its maximum."""
    if not all({"betas", "eps"} <= group.keys() for group in optimizer.param_groups):
        raise TypeError(f"preconditioner: {type(optimizer).__name__} is not Adam-like: it has no betas and eps")
    pairs = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    all_rules: Iterable[Any] = [None] * len(pairs)
    if isinstance(optimizer, SlimAdam):
        all_rules = optimizer.plan.by_parameter().values()
    for (group, param), rules in zip(pairs, all_rules, strict=True):
        kind = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        state = optimizer.state.get(param, {})
        moment = state.get(kind)
        if rules is not None:
            stored = second_moment.moments_of(state, rules, kind)
            moment = second_moment.expand(stored, rules, tuple(param.shape)) if stored else None
        if moment is not None:
            yield param, group, moment
