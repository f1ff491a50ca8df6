"""The parameters that an optimizer's groups hold: by name, and which are refused, with or without their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import local_rules, warn_of_old_torch
from slimadam.optim.step.options import check_foreach
from slimadam.state.rule import Rule, Source
from slimadam.utils.dtensor import check_placement, is_dtensor

Held = tuple[str, Tensor, dict[str, Any]]
"""Name, tensor and group of a parameter."""


def named_parameters(names: Sequence[Sequence[str]], groups: Sequence[dict[str, Any]]) -> Iterator[Held]:
    """Every parameter, group by group.

    Args:
        names: Of each group's parameters when it was added.
        groups: The parameter groups.

    """
    for own, group in zip(names, groups, strict=True):
        for name, param in zip(own, group["params"], strict=True):
            yield name, param, group


def check_shards(name: str, param: Tensor, rules: Sequence[Rule]) -> None:
    """Refuse a DTensor through whose shards its rules cannot be followed.

    Raises:
        RuntimeError: Says why, and what to use instead.
    """
    if is_dtensor(param):
        warn_of_old_torch()
    if is_dtensor(param) and any(rule.source == Source.MEASURING or rule.form != "full" for rule in rules):
        check_placement(name, param)
    if is_dtensor(param) and rules[0].source != Source.MEASURING:
        local_rules(name, rules, param)


def check_gradients(parameters: Iterable[Held]) -> None:
    """Refuse gradients, and parameters that have one, with which a step cannot do what their group asks for.

    Raises:
        RuntimeError: Names the parameter and what to use instead.
        ValueError: A group's option, and not a parameter, is the reason.
    """
    for name, param, group in parameters:
        grad = param.grad
        if grad is None:
            continue
        if group["foreach"]:
            check_foreach(group)
        if group["fused"] and not (param.is_floating_point() and param.device.type != "meta"):
            raise RuntimeError(
                f"{name!r}: `fused=True` requires all the params to be floating point and on a real device, "
                f"not {param.dtype} on {param.device.type}; set fused=None"
            )
        if group["differentiable"] and is_dtensor(param):
            raise RuntimeError(
                f"{name!r}: differentiable=True does not follow the step of a DTensor; use differentiable=False, "
                "or parameters that are not sharded"
            )
        if group["momentum_dtype"] == "int8" and not is_dtensor(param) and type(param.data) is not Tensor:
            raise RuntimeError(
                f"{name!r}: momentum_dtype='int8' does not support {type(param.data).__name__}, whose elements a "
                "block of 256 cannot follow; use torch.bfloat16"
            )
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{name!r}: SlimAdam does not support sparse gradients; "
                "use a dense one (sparse=False in the embedding) or torch.optim.SparseAdam for it"
            )
