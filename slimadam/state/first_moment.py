"""The first moment: in the precision that is asked for, or as codes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from slimadam.state import int8
from slimadam.utils.dtensor import is_dtensor, laid_out_as, local

logger = logging.getLogger("slimadam")


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
