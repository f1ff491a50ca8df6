"""Checks of parameters before a step: their gradients, their state, their memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slimadam.distributed.slots import ParamSlot
from slimadam.kernels.layout import is_marked
from slimadam.optim.step.options import check_foreach
from slimadam.state import second_moment
from slimadam.state.first_moment import STORED, momentum_in
from slimadam.utils.dtensor import is_dtensor, local

_ZERO = "ZeroRedundancyOptimizer's state dict has no plan: pass the one it was saved with"
_ANEW = "load all of it with load_state_dict, or take all of it out, optimizer.state.pop(parameter), to start anew"


def check_gradients(slots: Iterable[ParamSlot]) -> None:
    """Check that a step can do what each group asks for with its parameters' gradients.

    Raises:
        RuntimeError: Names the parameter and what to use instead.
        ValueError: A group's option, and not a parameter, is the reason.
    """
    for slot in slots:
        name, param, group, grad = slot.name, slot.param, slot.group, slot.param.grad
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


def check_state(slot: ParamSlot, grad: Tensor, state: Mapping[str, Any]) -> None:
    """Check that a parameter's state is complete and has the shapes that its rules and options ask for.

    Args:
        slot: The parameter.
        grad: This rank's gradient.
        state: Its state.

    Raises:
        RuntimeError: Names the parameter and the entry.
    """
    name, rules = slot.name, slot.rules
    if not torch.compiler.is_compiling():
        slot.check_options()
        _check_memory(name, slot.own, grad, state)
    _check_second_moment(slot, second_moment.moments_of(state, rules))
    if not any(key in state for key in STORED):
        raise RuntimeError(f"{name!r}: its state lacks exp_avg; {_ANEW}")
    momentum_in(state).check(name, slot.param, state)
    if slot.group["amsgrad"] and not second_moment.moments_of(state, rules, "max_exp_avg_sq"):
        raise RuntimeError(
            f"{name!r}: amsgrad=True was set after steps without it, which kept no maxima; set it back, or begin "
            "the parameter's state anew by optimizer.state.pop(param)"
        )


def _check_second_moment(slot: ParamSlot, moments: Sequence[Tensor]) -> None:
    name, rules = slot.name, slot.rules
    if not moments:
        raise RuntimeError(f"{name!r}: its state lacks one of {second_moment.keys_of(rules)}; {_ANEW}; {_ZERO}")
    kept = tuple(tuple(part.shape) for part in moments)
    wanted = second_moment.state_shapes(rules, slot.shape)
    if not second_moment.fits(moments, rules, slot.shape):
        raise RuntimeError(
            f"{name!r}: its second moment has shape {' and '.join(map(str, kept))} and is "
            f"{' and '.join(str(part.dtype) for part in moments)}, the rule for a parameter of shape "
            f"{slot.shape} keeps {wanted}; exchange a parameter for one of another size by "
            f"optimizer.replace_param(old, new, keep=..., added=...), which carries its state over; {_ZERO}"
        )


def _check_memory(name: str, param: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
    """Check that tensors have memory, which offloading or FSDP may have let go, on the parameter's device."""
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
