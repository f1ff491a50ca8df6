"""The choice of the implementation that updates a parameter."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from slimadam.kernels.cpp import update
from slimadam.kernels.foreach import foreach_update
from slimadam.kernels.interface import Dims, Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.layout import has_gaps, is_marked
from slimadam.kernels.reference import reference_update

if TYPE_CHECKING:
    from slimadam.kernels.triton.launch import TritonStep

logger = logging.getLogger("slimadam")

Backend = Literal["reference", "foreach", "compiled", "triton"]

UPDATES: Mapping[Backend, Callable[[Sequence[Entry], Hyperparameters], None]] = {
    "reference": reference_update,
    "foreach": foreach_update,
    "compiled": update.compiled_update,
}

TAKES_CODES: frozenset[Backend] = frozenset({"compiled", "triton"})
"""Implementations that read and write int8 first moments themselves; the others get them decoded."""

_FUSED_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def choose_backend(
    param: Tensor, exp_avg_dtype: torch.dtype, averaged_dims: Sequence[Dims], group: Mapping[str, Any]
) -> Backend:
    """Return the implementation for one parameter.

    ``foreach=False`` without ``fused=True``, ``fused=False``, ``differentiable``, ``capturable`` on a CPU, tracing and
    complex parameters take the readable reference. ``foreach=True`` takes lists of tensors at once. The default are
    Triton kernels on CUDA and one compiled pass on a CPU. Without Triton or the compiled library, and on CUDA where
    averages are over dimensions that are not adjacent, lists are taken where they can be.

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
    if (group["foreach"] is False and not group["fused"]) or group["fused"] is False:
        return "reference"
    if runs_triton(param.device) and _triton().supports(param, averaged_dims, group["momentum_dtype"] == "int8"):
        return "triton"
    if param.device.type != "cpu":
        return "foreach" if listable else "reference"
    if group["capturable"] or not update.supports(param, exp_avg_dtype, averaged_dims):
        return "reference"
    if update.library() is not None:
        return "compiled"
    return "foreach" if listable and not _has_tensors(group) else "reference"


def _has_tensors(group: Mapping[str, Any]) -> bool:
    """Return whether lr or betas are tensors, which lists of tensors on a CPU do not take."""
    return any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))


@cache
def runs_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device, and warn once where Triton is missing."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed, so steps take lists of tensors at once; pip install triton")
        return False
    return True


def steps_on_device(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter's step count lies on its device, as with ``torch.optim.AdamW(fused=True)``.

    Args:
        param: The parameter.
        group: Its group.
    """
    fused = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    default = fused and not group["differentiable"]
    return bool(group["capturable"]) or (default and param.is_floating_point() and runs_triton(param.device))


def triton_step(entries: Sequence[Entry], hyper: Hyperparameters) -> TritonStep:
    """Return the tables of a step by Triton, to be kept while they fit.

    Args:
        entries: The tensors of each parameter.
        hyper: Hyperparameters of the step.
    """
    from slimadam.kernels.triton.launch import TritonStep

    return TritonStep(entries, hyper)


def _triton() -> ModuleType:
    """Import late: where no kernel runs, nobody waits for Triton."""
    from slimadam.kernels.triton import launch

    return launch


def supports(backend: Backend, entry: Entry) -> bool:
    """Return whether an implementation supports these tensors, whose memory it reads as the parameter's.

    Args:
        backend: The implementation.
        entry: The tensors.
    """
    if backend in ("reference", "foreach"):
        return True
    if not _dtypes_fit(backend, entry) or any(map(is_marked, (entry.param, entry.grad, entry.exp_avg))):
        return False
    if backend == "triton":
        return _same_layout(entry, has_gaps=False) and bool(_triton().same_layout(entry))
    return _same_layout(entry, has_gaps(entry.param))


def _dtypes_fit(backend: Backend, entry: Entry) -> bool:
    """Return whether state and gradient have the precisions that go with the parameter's, which may have changed."""
    dtype, second = entry.param.dtype, second_moment_dtype(entry.param.dtype)
    if any(moment.dtype != second for moment in (*entry.exp_avg_sq, *entry.max_exp_avg_sq)):
        return False
    if entry.exp_avg_scale is None and entry.exp_avg.dtype not in (dtype, torch.float32, torch.bfloat16):
        return False
    if entry.exp_avg_scale is not None and not _are_codes(entry.exp_avg, entry.exp_avg_scale):
        return False
    if not _is_count(entry.step) or (backend == "compiled" and not entry.step.is_cpu):
        return False
    return entry.grad.dtype in ({dtype} if backend == "compiled" else _FUSED_DTYPES)


def _is_count(step: Tensor) -> bool:
    return step.numel() == 1 and step.dtype in (torch.float32, torch.float64)


def _are_codes(codes: Tensor, scales: Tensor) -> bool:
    return codes.dtype == torch.int8 and scales.dtype == torch.uint8 and scales.is_contiguous()


def _same_layout(entry: Entry, has_gaps: bool) -> bool:
    """Return whether gradient and moments have the parameter's layout; under gaps, second moments have none."""
    param, second = entry.param, (*entry.exp_avg_sq, *entry.max_exp_avg_sq)
    same_shape = [entry.grad, entry.exp_avg]
    if has_gaps and not all(moment.is_contiguous() for moment in second):
        return False
    if not any(entry.averaged_dims) and not has_gaps:
        same_shape += second
    if any(tensor.shape != param.shape or tensor.device != param.device for tensor in same_shape):
        return False
    if param.is_contiguous():
        return all(tensor.is_contiguous() for tensor in same_shape)
    return all(tensor.stride() == param.stride() for tensor in same_shape)
