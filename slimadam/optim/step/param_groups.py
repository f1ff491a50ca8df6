"""Parameters group by group, and checks of their gradients, state and memory before a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slimadam.distributed.sharded_rules import local_rules, warn_of_old_torch
from slimadam.kernels.layout import is_marked
from slimadam.optim.step.options import check_foreach
from slimadam.state import second_moment
from slimadam.state.first_moment import STORED
from slimadam.state.rule import Rule, Source
from slimadam.utils.dtensor import check_placement, is_dtensor, local

Held = tuple[str, Tensor, dict[str, Any]]
"""Name, tensor and group of a parameter."""

_ZERO = "ZeroRedundancyOptimizer's state dict has no plan: pass the one it was saved with"
_ANEW = "load all of it with load_state_dict, or take all of it out, optimizer.state.pop(parameter), to start anew"


def named_parameters(names: Sequence[Sequence[str]], groups: Sequence[dict[str, Any]]) -> Iterator[Held]:
    """Yield name, tensor and group of every parameter, group by group.

    Args:
        names: The names of each group's parameters.
        groups: The parameter groups.
    """
    for own, group in zip(names, groups, strict=True):
        for name, param in zip(own, group["params"], strict=True):
            yield name, param, group


def check_shards(name: str, param: Tensor, rules: Sequence[Rule]) -> None:
    """Check that a DTensor's rules can be followed through its shards.

    Args:
        name: The parameter's name.
        param: The parameter.
        rules: Its rules.

    Raises:
        RuntimeError: Says why not, and what to use instead.
    """
    if is_dtensor(param):
        warn_of_old_torch()
    if is_dtensor(param) and any(rule.source == Source.MEASURING or rule.form != "full" for rule in rules):
        check_placement(name, param)
    if is_dtensor(param) and rules[0].source != Source.MEASURING:
        local_rules(name, rules, param)


def check_gradients(parameters: Iterable[Held]) -> None:
    """Check that a step can do what each group asks for with its parameters' gradients.

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


def check_lacks_all(states: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Check that state without a step count holds no moments; a user's own entries do not count.

    Args:
        states: Names and states of parameters that lack a count of steps.

    Raises:
        RuntimeError: Names the parameter.
    """
    for name, state in states:
        own = [key for key in state if second_moment.is_own(key)]
        if own:
            raise RuntimeError(f"{name!r}: its state has {own}, but no step; {_ANEW}")


def check_shapes(name: str, rules: Sequence[Rule], param: Tensor, moments: Sequence[Tensor]) -> None:
    """Check that second moments have the shapes that the rules keep.

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
        moments: Its second moments.

    Raises:
        RuntimeError: Names the parameter and both shapes.
    """
    if not moments:
        raise RuntimeError(f"{name!r}: its state lacks one of {second_moment.keys_of(rules)}; {_ANEW}; {_ZERO}")
    kept = tuple(tuple(part.shape) for part in moments)
    wanted = second_moment.state_shapes(rules, tuple(param.shape))
    if kept != wanted:
        raise RuntimeError(
            f"{name!r}: its second moment has shape {' and '.join(map(str, kept))}, the rule for a parameter of shape "
            f"{tuple(param.shape)} keeps {wanted}; exchange a parameter for one of another size by "
            f"optimizer.replace_param(old, new, keep=..., added=...), which carries its state over; {_ZERO}"
        )


def check_memory(name: str, param: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
    """Check that tensors have memory, which offloading or FSDP may have let go, on the parameter's device.

    Args:
        name: The parameter's name.
        param: The local shard, or the parameter.
        grad: Its gradient; it may be one of those zeros that have no memory.
        state: Its state; the step count may lie elsewhere.

    Raises:
        RuntimeError: Names the parameter and the tensor.
    """
    if param.device.type == "meta":
        return
    state = {key: local(value) for key, value in state.items() if second_moment.is_own(key) and key != "step"}
    for what, tensor in {"values": param, "gradient": grad, **state}.items():
        if type(tensor) not in (Tensor, Parameter) or (tensor is grad and is_marked(grad)):
            continue
        if tensor.device != param.device:
            raise RuntimeError(f"{name!r}: its {what} is on {tensor.device}, the parameter on {param.device}; move it")
        if tensor.numel() and not tensor.data_ptr():
            raise RuntimeError(f"{name!r}: the memory of its {what} has been let go; bring it back before the step")


def check_has_first_moment(name: str, state: Mapping[str, Any]) -> None:
    """Check that a state has a first moment in one of the formats.

    Args:
        name: The parameter's name.
        state: Its state.

    Raises:
        RuntimeError: Names the parameter.
    """
    if not any(key in state for key in STORED):
        raise RuntimeError(f"{name!r}: its state lacks exp_avg; {_ANEW}")
