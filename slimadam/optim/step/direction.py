"""The direction of a pending update, worked out some rows at a time: beside the result nothing large is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.all_reduce import BucketedAllReduce
from slimadam.distributed.sharded_moments import SharedPart
from slimadam.distributed.slots import ParamSlot
from slimadam.kernels.float8 import values_of
from slimadam.kernels.interface import Dims, Entry, Hyperparameters, Scalar, second_moment_dtype
from slimadam.kernels.reference import mean_square, reconstruct, scale_grad, update_first_moment
from slimadam.optim.step.stepper import hyperparameters
from slimadam.optim.step.tasks import assembled, entries_of, initial_state
from slimadam.state.first_moment import decoded
from slimadam.state.second_moment import is_made
from slimadam.utils.dtensor import local

BLOCK_ELEMENTS = 1 << 18


def block_dim(shape: Sequence[int]) -> int:
    """Return the dimension that :func:`row_blocks` goes along: the first of more than one element, or 0."""
    return next((dim for dim, size in enumerate(shape) if size > 1), 0)


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...] | EllipsisType]:
    """Yield indices of a tensor's rows, at most about 2**18 elements at a time, along :func:`block_dim`."""
    if not shape:
        yield ...
        return
    dim = block_dim(shape)
    in_a_row = max(1, torch.Size(shape[dim + 1 :]).numel())
    rows = max(1, BLOCK_ELEMENTS // in_a_row)
    for start in range(0, max(1, shape[dim]), rows):
        yield (*[slice(None)] * dim, slice(start, start + rows))


def update_without_decay(entry: Entry, hyper: Hyperparameters) -> Tensor:
    """Compute the pending update of a parameter without weight decay. Nothing is changed.

    Args:
        entry: The parameter's tensors before the step; the count of steps, and second moments that are precomputed,
            include it.
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
    if entry.precomputed:
        averaged = reconstruct(parts, entry.averaged_dims, is_relative=True)
    elif any(entry.averaged_dims):
        averaged = _second_moment_after(parts, maxima, grad, entry.averaged_dims, hyper)
    else:
        averaged = None
    dim = block_dim(target.shape)
    for rows in row_blocks(target.shape):
        if averaged is None:
            part, maximum = (
                [values_of(moment[rows]).to(target.dtype) for moment in moments] for moments in (parts, maxima)
            )
            second = _second_moment_after(part, maximum, grad[rows], ((),), hyper)
        else:
            second = averaged if averaged.shape[dim] == 1 else averaged[rows]
        first = exp_avg[rows].clone()
        clipped_grad = scale_grad(grad[rows], hyper.clip_factor)
        update_first_moment(first, -clipped_grad if hyper.maximize else clipped_grad, hyper.beta1)
        denominator = (second.sqrt() / root).add_(hyper.eps)
        target[rows] = first.to(target.dtype) / correction / denominator
    return direction


def with_decay(direction: Tensor, param: Tensor, weight_decay: Scalar) -> Tensor:
    """Add weight decay to a direction, in place: a step is ``param - lr * (direction + weight_decay * param)``.

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
    """Return the second moment after the pending step, broadcastable to the gradient."""
    after = [
        part * hyper.beta2 + _mean_square(grad, dims, part.dtype, hyper.clip_factor) * (1 - hyper.beta2)
        for part, dims in zip(parts, averaged_dims, strict=True)
    ]
    if hyper.amsgrad:
        after = [torch.maximum(part, maximum) for part, maximum in zip(after, maxima, strict=True)]
    return reconstruct(after, averaged_dims)


def _mean_square(grad: Tensor, dims: Dims, dtype: torch.dtype, clip_factor: Tensor | None) -> Tensor:
    """Compute :func:`~slimadam.kernels.reference.mean_square` of a clipped gradient, some rows at a time."""
    blocks = (mean_square(scale_grad(grad[rows], clip_factor).to(dtype), dims) for rows in row_blocks(grad.shape))
    dim = block_dim(grad.shape)
    if dim not in dims:
        return torch.cat(list(blocks), dim) if grad.dim() else next(blocks)
    sizes = [grad[rows].shape[dim] for rows in row_blocks(grad.shape)]
    count = max(1, grad.shape[dim])
    return sum(block * (size / count) for block, size in zip(blocks, sizes, strict=True))  # type: ignore[return-value]


def updates_without_decay(
    slots: Iterable[ParamSlot], states: Mapping[Tensor, Mapping[str, Any]], averages: Shared
) -> Iterator[tuple[Tensor, Mapping[str, Any], Tensor]]:
    """Yield pending updates, see :meth:`slimadam.SlimAdam.updates_without_decay`.

    Args:
        slots: The optimizer's parameters.
        states: By parameter; those without one start with the pending step.
        averages: The result of :func:`averages_after_step`.
    """
    for slot in slots:
        if slot.param.grad is None:
            continue
        state = states.get(slot.param, {})
        if not is_made(state):
            state = initial_state(slot, averages.clip_factor)
        own_state = slot.own_state({**decoded(slot.param, state), "step": state["step"] + 1})
        shared = averages.averages.get(id(slot.param)) or [None] * len(slot.rules)
        hyper = hyperparameters(slot.group, averages.clip_factor)
        directions = (
            update_without_decay(entry if part is None else part.with_moments(entry), hyper)
            for entry, part in zip(entries_of(slot, slot.gradient, own_state), shared, strict=True)
        )
        yield slot.param, slot.group, slot.wrap(assembled(slot, directions))


class Shared(NamedTuple):
    """Averages of a pending update over several ranks, and its clip factor.

    Attributes:
        averages: By ``id`` of a parameter, for each of its rules, the averages that other ranks take part in.
        clip_factor: Factor of every gradient.
    """

    averages: dict[int, list[SharedPart | None]]
    clip_factor: Tensor | None = None


def averages_after_step(
    slots: Iterable[ParamSlot], states: Mapping[Tensor, Mapping[str, Any]], clip_factor: Tensor | None
) -> Shared:
    """Compute averages over several ranks after the pending step, by one all-reduce for each process group.

    Collective. The optimizer's state does not change.

    Args:
        slots: The optimizer's parameters.
        states: By parameter.
        clip_factor: Factor of every gradient.
    """
    found: dict[int, list[SharedPart | None]] = {}
    parts: list[SharedPart] = []
    grads: list[Tensor] = []
    beta2s: list[Scalar] = []
    for slot in slots:
        if slot.param.grad is None or not slot.is_shared:
            continue
        state = states.get(slot.param)
        starts = not state and slot.group["variance_init"] == "gradient"
        state = slot.own_state(state or initial_state(slot))
        copies = [None if part is None else _with_own_moments(part) for part in slot.shared_parts(state)]
        found[id(slot.param)] = copies
        for part in copies:
            if part is not None:
                parts.append(part)
                grads.append(part.rule.rule.take(slot.gradient))
                beta2s.append(0.0 if starts else hyperparameters(slot.group).beta2)
    if parts:
        exchange = BucketedAllReduce(parts)
        exchange.start(grads, beta2s, clip_factor)
        exchange.finish(beta2s)
    return Shared(found, clip_factor)


def nbytes_of(shared: Shared) -> int:
    """Return the bytes that the averages hold."""
    parts = [part for parts in shared.averages.values() for part in parts if part is not None]
    held = [part.relative_rows for part in parts]
    held += [tensor for part in parts for moment in part.moments for tensor in (moment.stored, moment.maximum)]
    return sum(one.nbytes for one in held if one is not None)


def _with_own_moments(part: SharedPart) -> SharedPart:
    moments = [
        moment._replace(
            stored=moment.stored.clone(), maximum=None if moment.maximum is None else moment.maximum.clone()
        )
        for moment in part.moments
    ]
    return part._replace(moments=moments)
