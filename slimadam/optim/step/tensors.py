"""From a parameter, its group and its state to what an update takes, and back."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slimadam.distributed.all_reduce import initial_moments
from slimadam.distributed.sharded_rules import is_dtensor, laid_out_as, local
from slimadam.kernels.reference import (
    Entry,
    Hyperparameters,
    Scalar,
    clipped,
    initial_second_moment,
    second_moment_dtype,
)
from slimadam.optim.step.cache import is_marked
from slimadam.optim.step.dispatch import steps_on_device
from slimadam.state import int8, second_moment
from slimadam.state.rule import Rule

logger = logging.getLogger("slimadam")
_ZERO = "ZeroRedundancyOptimizer's state dict has no plan: pass the one it was saved with"
_ANEW = "load all of it with load_state_dict, or take all of it out, optimizer.state.pop(parameter), to start anew"


def entries_of(
    rules: Sequence[Rule], param: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[Entry]:
    """The tensors of a parameter's step, or of one for each of its parts; none of them a copy.

    A part that does not consist of whole blocks of codes has no ``exp_avg_scale``: :func:`decoded` first.
    """
    ndim = param.dim()
    if rules[0].part is None:
        second = second_moment.moments_of(state, rules)
        maxima = second_moment.moments_of(state, rules, "max_exp_avg_sq") if group["amsgrad"] else []
        dims = rules[0].averaged_dims(ndim)
        scales = state.get("exp_avg_scale")
        exp_avg = second_moment.first_moment(state)
        yield Entry(param, grad, exp_avg, second, maxima, state["step"], dims, exp_avg_scale=scales)
        return
    whole = second_moment.first_moment(state)
    moments = second_moment.by_rule(rules, second_moment.moments_of(state, rules), ndim)
    maxima = second_moment.moments_of(state, rules, "max_exp_avg_sq") if group["amsgrad"] else []
    for (rule, parts), (_, largest) in zip(moments, second_moment.by_rule(rules, maxima, ndim), strict=True):
        piece = rule.take(param)
        own_grad, exp_avg = rule.take(grad), rule.take(whole)
        scales = state.get("exp_avg_scale")
        if scales is not None:
            scales = int8.scales_of(exp_avg, whole, scales)
        dims = rule.averaged_dims(piece.dim())
        yield Entry(piece, own_grad, exp_avg, parts, largest, state["step"], dims, exp_avg_scale=scales)


def slices_of(entry: Entry, state: Mapping[str, Any]) -> Iterator[Entry]:
    """An entry for each slice of the first dimension, along which nothing is averaged.

    Args:
        entry: Of a parameter or a part of one; with codes but no scales where they are no whole blocks.
        state: The parameter's state.
    """
    dims = [tuple(dim - 1 for dim in one) for one in entry.averaged_dims]
    scales = state.get("exp_avg_scale")
    for index in range(entry.param.shape[0]):
        exp_avg = entry.exp_avg[index]
        yield Entry(
            entry.param[index],
            entry.grad[index],
            exp_avg,
            [moment[index] for moment in entry.exp_avg_sq],
            [moment[index] for moment in entry.max_exp_avg_sq],
            entry.step,
            dims,
            exp_avg_scale=None if scales is None else int8.scales_of(exp_avg, state["exp_avg_codes"], scales),
        )


def assembled(param: Tensor, rules: Sequence[Rule], pieces: Iterator[Tensor]) -> Tensor:
    """A tensor of the parameter's shape from one for each of its rules."""
    if rules[0].part is None:
        return next(pieces)
    whole = torch.empty_like(param, dtype=second_moment_dtype(param.dtype))
    for rule, piece in zip(rules, pieces, strict=True):
        rule.take(whole).copy_(piece)
    return whole


def check_lacks_all(states: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse state of which only some is there; what users have put beside it does not count.

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
    """Refuse state that is not what the rules keep for the parameter.

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
    """Refuse tensors without memory, which offloading or FSDP may have let go, or on another device.

    Args:
        name: The parameter's name.
        param: What this rank holds of it.
        grad: What this rank holds of its gradient; it may be one of those zeros that have no memory.
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


def check_first_moment(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse a first moment of another shape than the parameter.

    Raises:
        RuntimeError: Names the parameter and both shapes.
    """
    if "exp_avg" not in state and "exp_avg_codes" not in state:
        raise RuntimeError(f"{name!r}: its state lacks exp_avg; {_ANEW}")
    exp_avg, scales = second_moment.first_moment(state), state.get("exp_avg_scale")
    if scales is not None and tuple(scales.shape) != int8.scales_shape(exp_avg):
        raise RuntimeError(
            f"{name!r}: its exp_avg_scale has shape {tuple(scales.shape)}, its exp_avg needs "
            f"{int8.scales_shape(exp_avg)}; load both from one state dict with load_state_dict"
        )
    wanted = (*param.shape, 2) if "exp_avg_scale" in state and param.is_complex() else tuple(param.shape)
    if tuple(exp_avg.shape) != wanted:
        raise RuntimeError(
            f"{name!r}: its exp_avg has shape {tuple(exp_avg.shape)}, the parameter {tuple(param.shape)}; exchange a "
            "parameter for one of another size by optimizer.replace_param(old, new, keep=..., added=...)"
        )


def initial_state(
    name: str, rules: Sequence[Rule], param: Tensor, group: Mapping[str, Any], clip_factor: Tensor | None = None
) -> dict[str, Any]:
    """A parameter's state before its first step; second moments start at zero, or at the first squared gradient.

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
        group: Its group.
        clip_factor: What its gradient is multiplied by.
    """
    dtype = second_moment_dtype(param.dtype)
    parts: Sequence[Tensor]
    if is_dtensor(param):
        from_gradient = group["variance_init"] == "gradient" and param.grad is not None
        parts = initial_moments(name, rules, param, from_gradient, clip_factor)
    elif group["variance_init"] == "gradient" and param.grad is not None:
        grads = ((rule, clipped(rule.take(param.grad), clip_factor)) for rule in rules)
        parts = [initial_second_moment(grad, dims) for rule, grad in grads for dims in rule.averaged_dims(grad.dim())]
    elif rules[0].part is None and rules[0].form == "full":
        parts = [torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)]
    else:
        shapes = second_moment.state_shapes(rules, tuple(param.shape))
        parts = [torch.zeros(shape, dtype=dtype, device=param.device) for shape in shapes]
    made = {
        "step": torch.zeros(
            (),
            dtype=second_moment.step_dtype(),
            device=param.device if steps_on_device(param, group) else torch.device("cpu"),
        ),
        **initial_first_moment(param, group),
        **second_moment.by_key(parts, rules),
    }
    if group["amsgrad"]:
        made.update(second_moment.by_key([torch.zeros_like(part) for part in parts], rules, "max_exp_avg_sq"))
    return made


def initial_first_moment(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A first moment of zero as the group stores it: a tensor, or codes and their scales."""
    if stores_codes(param, group):
        codes = int8.new_codes(param)
        return {"exp_avg_codes": codes, "exp_avg_scale": int8.new_scales(codes)}
    dtype = momentum_dtype(param, group)
    return {"exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}


def decoded(param: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter's state with the first moment itself in the place of codes and scales."""
    own = dict(state)
    if "exp_avg_scale" in own:
        codes = own.pop("exp_avg_codes")
        value = int8.decode(local(codes), local(own.pop("exp_avg_scale")).view(-1))
        if is_dtensor(codes):
            value = laid_out_as(codes, value, codes.shape)
        own["exp_avg"] = torch.view_as_complex(value) if param.is_complex() else value
    return own


def encode(param: Tensor, exp_avg: Tensor, grad: Tensor, state: Mapping[str, Any]) -> None:
    """Write a first moment to the codes and scales in the parameter's state, see :func:`slimadam.state.int8.encode`."""
    if param.is_complex():
        exp_avg, grad = torch.view_as_real(exp_avg), torch.view_as_real(grad)
    int8.encode(local(exp_avg), local(grad), local(state["exp_avg_codes"]), local(state["exp_avg_scale"]).view(-1))


def stores_codes(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's first moment is stored as codes."""
    return group["momentum_dtype"] == int8.INT8 and int8.can_follow(param)


def tell_without_codes(group: Mapping[str, Any], params: Collection[Tensor]) -> None:
    """Say how much of what ``momentum_dtype="int8"`` is asked for is not stored in codes; of vectors alone nothing."""
    without = [param for param in params if group["momentum_dtype"] == int8.INT8 and not stores_codes(param, group)]
    if any(param.dim() > 1 for param in without):
        logger.warning(
            "momentum_dtype='int8': the first moments of %d of %d parameters, %.1f%% of their elements, stay in the "
            "parameters' precision: their shards need not consist of whole blocks of 256 elements; shard along "
            "a dimension followed by a multiple of 256 elements, such as the first of a matrix of so many columns",
            len(without),
            len(params),
            100 * sum(param.numel() for param in without) / max(1, sum(param.numel() for param in params)),
        )


def momentum_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Precision in which updates see a parameter's first moment; codes are decoded for them."""
    chosen = group["momentum_dtype"]
    if chosen == int8.INT8:
        if not int8.can_follow(param):
            return param.dtype
        return torch.complex64 if param.is_complex() else torch.float32
    return param.dtype if chosen is None or param.is_complex() else chosen  # there is no complex bfloat16


def momentum_bytes(param: Tensor, group: Mapping[str, Any]) -> int:
    """Bytes of what this rank holds of a parameter's first moment, the scales of codes included."""
    held = local(param).numel()
    if stores_codes(param, group):
        elements = held * (2 if param.is_complex() else 1)
        return elements * torch.int8.itemsize + int8.scale_count(elements) * torch.uint8.itemsize
    return held * momentum_dtype(param, group).itemsize


def hyperparameters(group: Mapping[str, Any], clip_factor: Tensor | None = None) -> Hyperparameters:
    """The options of a parameter group as an update takes them, and what it multiplies gradients by."""
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        lr=_scalar(group["lr"]),
        beta1=_scalar(beta1),
        beta2=_scalar(beta2),
        eps=group["eps"],
        weight_decay=_scalar(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),  # kernels take no 1, which may have been assigned since the group was made
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        stochastic_round=group["bf16_stochastic_round"],
        clip_factor=clip_factor,
    )


def _scalar(value: Scalar) -> Scalar:
    return value.squeeze() if isinstance(value, Tensor) and value.dim() else value


def rounding_seed(step: Tensor, name: str) -> int:
    """A seed that only the step and the parameter's name decide, so that a resumed run repeats it."""
    mixed = (int(step.item()) * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode()) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed ^= mixed >> 31
    return mixed * 0x94D049BB133111EB >> 2 & (1 << 62) - 1
