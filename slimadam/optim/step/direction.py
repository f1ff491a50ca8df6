"""The direction of a pending update, worked out some rows at a time: beside the result nothing large is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import local
from slimadam.kernels.reference import (
    Dims,
    Entry,
    Hyperparameters,
    Scalar,
    clipped,
    mean_square,
    second_moment_dtype,
    stand_in,
    update_first_moment,
)

BLOCK_ELEMENTS = 1 << 18


def block_dim(shape: Sequence[int]) -> int:
    """The dimension that :func:`row_blocks` goes along: the first of more than one element, or 0."""
    return next((dim for dim, size in enumerate(shape) if size > 1), 0)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...] | EllipsisType]:
    """Indices of a tensor's rows, at most about 2**18 elements at a time, along :func:`block_dim`."""
    if not shape:
        yield ...
        return
    dim = block_dim(shape)
    in_a_row = max(1, torch.Size(shape[dim + 1 :]).numel())
    rows = max(1, BLOCK_ELEMENTS // in_a_row)
    for start in range(0, max(1, shape[dim]), rows):
        yield (*[slice(None)] * dim, slice(start, start + rows))


def update_without_decay(entry: Entry, hyper: Hyperparameters) -> Tensor:
    """The part of the pending update's direction that gradients and state alone decide. Nothing is changed.

    Args:
        entry: The parameter's tensors before the step; only the count of steps includes it, and second moments that
            are given.
        hyper: Hyperparameters; ``lr`` and ``weight_decay`` do not matter.

    Returns:
        ``m_hat / (sqrt(v_hat) + eps)``, shaped as the parameter, in at least float32.
    """
    direction = torch.empty_like(entry.param, dtype=second_moment_dtype(entry.param.dtype))
    real = torch.view_as_real if direction.is_complex() else torch.Tensor.detach
    target, exp_avg, grad = map(real, (direction, entry.exp_avg, entry.grad))
    parts, maxima = [[real(part) for part in moments] for moments in (entry.exp_avg_sq, entry.max_exp_avg_sq)]
    # A count of steps on a device is used there: reading it would make the host wait.
    step = entry.step.item() if entry.step.device.type == "cpu" else entry.step
    correction, root = 1 - hyper.beta1**step, (1 - hyper.beta2**step) ** 0.5
    if entry.is_given:
        averaged = stand_in(parts, entry.averaged_dims, is_relative=True)
    elif any(entry.averaged_dims):
        averaged = _second_moment_after(parts, maxima, grad, entry.averaged_dims, hyper)
    else:
        averaged = None
    dim = block_dim(target.shape)
    for rows in row_blocks(target.shape):
        if averaged is None:
            part, maximum = ([moment[rows] for moment in moments] for moments in (parts, maxima))
            second = _second_moment_after(part, maximum, grad[rows], ((),), hyper)
        else:
            second = averaged if averaged.shape[dim] == 1 else averaged[rows]
        first = exp_avg[rows].clone()
        clipped_grad = clipped(grad[rows], hyper.clip_factor)
        update_first_moment(first, -clipped_grad if hyper.maximize else clipped_grad, hyper.beta1)
        denominator = (second.sqrt() / root).add_(hyper.eps)
        target[rows] = first.to(target.dtype) / correction / denominator
    return direction


def with_decay(direction: Tensor, param: Tensor, weight_decay: Scalar) -> Tensor:
    """``direction + weight_decay param``: a step with learning rate ``lr`` is ``param - lr`` times that.

    Args:
        direction: Overwritten, or returned as it is.
        param: The parameter, of the same shape; where it is a DTensor both are, laid out alike.
        weight_decay: Decoupled weight decay.
    """
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        held, own = local(direction), local(param)
        for rows in row_blocks(own.shape):
            held[rows] += own[rows].to(held.dtype) * weight_decay
    return direction


def _second_moment_after(
    parts: Sequence[Tensor],
    maxima: Sequence[Tensor],
    grad: Tensor,
    averaged_dims: Sequence[Dims],
    hyper: Hyperparameters,
) -> Tensor:
    """What stands for the second moment after the pending step, broadcastable to the gradient."""
    after = [
        part * hyper.beta2 + _mean_square(grad, dims, part.dtype, hyper.clip_factor) * (1 - hyper.beta2)
        for part, dims in zip(parts, averaged_dims, strict=True)
    ]
    if hyper.amsgrad:
        after = [torch.maximum(part, maximum) for part, maximum in zip(after, maxima, strict=True)]
    return stand_in(after, averaged_dims)


def _mean_square(grad: Tensor, dims: Dims, dtype: torch.dtype, clip_factor: Tensor | None) -> Tensor:
    """As :func:`~slimadam.kernels.reference.mean_square` of a clipped gradient, some rows at a time."""
    blocks = (mean_square(clipped(grad[rows], clip_factor).to(dtype), dims) for rows in row_blocks(grad.shape))
    dim = block_dim(grad.shape)
    if dim not in dims:
        return torch.cat(list(blocks), dim) if grad.dim() else next(blocks)
    sizes = [grad[rows].shape[dim] for rows in row_blocks(grad.shape)]
    count = max(1, grad.shape[dim])
    return sum(block * (size / count) for block, size in zip(blocks, sizes, strict=True))  # type: ignore[return-value]
