"""Which implementation updates a parameter, and the one place where that is decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from slimadam.foreach import foreach_update
from slimadam.functional import Dims, Entry, Hyperparameters, reference_update
from slimadam.kernels import compiled
from slimadam.kernels.blocked import blocked_update, layouts

Backend = Literal["reference", "foreach", "blocked", "compiled"]

UPDATES: Mapping[Backend, Callable[[Sequence[Entry], Hyperparameters], None]] = {
    "reference": reference_update,
    "foreach": foreach_update,
    "blocked": blocked_update,
    "compiled": compiled.compiled_update,
}

_BLOCKED_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def choose_backend(
    param: Tensor, exp_avg_dtype: torch.dtype, averaged_dims: Sequence[Dims], group: Mapping[str, Any]
) -> Backend:
    """The implementation for one parameter.

    ``foreach=False``, ``fused=False``, ``differentiable``, ``capturable`` on a CPU, tracing and complex
    parameters take the readable reference. ``foreach=True``, and real parameters on accelerators by default,
    take lists of tensors at once. On a CPU the default is blocks that stay in cache, and ``fused=True`` one compiled
    pass where a compiler is found.

    Args:
        param: The parameter.
        exp_avg_dtype: Precision of its first moment.
        averaged_dims: For each of its second moments, the averaged dimensions.
        group: Its parameter group.
    """
    if torch.compiler.is_compiling() or group["differentiable"] or param.is_complex() or type(param.data) is not Tensor:
        return "reference"
    listable = exp_avg_dtype == param.dtype and not group["bf16_stochastic_round"]
    if group["foreach"]:
        return "foreach" if listable else "reference"
    if group["foreach"] is False or group["fused"] is False:
        return "reference"
    if param.device.type != "cpu":
        return "foreach" if listable else "reference"
    if group["capturable"] or param.dtype not in _BLOCKED_DTYPES:
        return "reference"
    if group["fused"] and compiled.takes(param, exp_avg_dtype, averaged_dims):
        return "compiled"
    return "blocked" if layouts(param, averaged_dims) is not None else "reference"


def fits_in_memory_order(entry: Entry) -> bool:
    """Whether what has the parameter's shape lies in memory as it does, so that one view serves all."""
    param = entry.param
    same_shape = [entry.grad, entry.exp_avg]
    if not any(entry.averaged_dims):
        same_shape += [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    if param.is_contiguous():
        return all(tensor.is_contiguous() for tensor in same_shape)
    return all(tensor.stride() == param.stride() for tensor in same_shape)
