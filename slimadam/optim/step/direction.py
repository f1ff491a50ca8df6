"""The direction of a pending update, worked out some rows at a time: beside the result nothing large is held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.all_reduce import BucketedAllReduce
from slimadam.distributed.sharded_moments import SharedPiece, shared_pieces
from slimadam.distributed.sharded_rules import local_rules, local_state
from slimadam.kernels.interface import Dims, Entry, Hyperparameters, Scalar, second_moment_dtype
from slimadam.kernels.reference import mean_square, reconstruct, scale_grad, update_first_moment
from slimadam.optim.step.param_groups import Held
from slimadam.optim.step.stepper import hyperparameters
from slimadam.optim.step.tasks import assembled, entries_of, initial_state
from slimadam.state.first_moment import decoded
from slimadam.state.rule import Rule
from slimadam.state.second_moment import is_made
from slimadam.utils.dtensor import is_dtensor, laid_out_as, local, local_gradient

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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
            part, maximum = ([moment[rows] for moment in moments] for moments in (parts, maxima))
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
    parameters: Iterable[Held],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    averages: Shared,
) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """Yield pending updates, see :meth:`slimadam.SlimAdam.updates_without_decay`.

    Args:
        parameters: Those of the optimizer.
        all_rules: By name.
        states: By parameter; those without one start with the pending step.
        averages: The result of :func:`averages_after_step`.
    """
    for name, param, group in parameters:
        if param.grad is None:
            continue
        rules = all_rules[name]
        state = states.get(param, {})
        if not is_made(state):
            state = initial_state(name, rules, param, group, averages.clip_factor)
        state = {**decoded(param, state), "step": state["step"] + 1}
        if is_dtensor(param):
            yield param, group, update_of_shards(name, param, group, rules, state, averages)
            continue
        directions = (
            update_without_decay(entry, hyperparameters(group, averages.clip_factor))
            for entry in entries_of(rules, param, param.grad, group, state)
        )
        yield param, group, assembled(param, rules, directions)


class Shared(NamedTuple):
    """Averages of a pending update over several ranks, and its clip factor.

    Attributes:
        averages: By ``id`` of a parameter, for each of its rules, the averages that other ranks take part in.
        clip_factor: Factor of every gradient.
    """

    averages: dict[int, list[SharedPiece | None]]
    clip_factor: Tensor | None = None


def averages_after_step(
    pending: Iterable[tuple[str, DTensor, Mapping[str, Any]]],
    all_rules: Mapping[str, list[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None,
) -> Shared:
    """Compute averages over several ranks after the pending step, by one all-reduce for each process group.

    Collective. The optimizer's state does not change.

    Args:
        pending: Name, parameter with a gradient, and group.
        all_rules: By name.
        states: By parameter.
        clip_factor: Factor of every gradient.
    """
    found: dict[int, list[SharedPiece | None]] = {}
    pieces: list[SharedPiece] = []
    grads: list[Tensor] = []
    beta2s: list[Scalar] = []
    for name, param, group in pending:
        rules = local_rules(name, all_rules[name], param)
        if not any(rule.summed_over(dims) for rule in rules for dims in rule.rule.averaged_dims(len(rule.shape))):
            continue
        state = states.get(param)
        starts = not state and group["variance_init"] == "gradient"
        state = state or initial_state(name, all_rules[name], param, group)
        shared = shared_pieces(rules, param, local_state(name, rules, param, state))
        copies = found[id(param)] = [None if piece is None else _with_own_moments(piece) for piece in shared]
        for piece in copies:
            if piece is not None:
                pieces.append(piece)
                grads.append(piece.rule.rule.take(local_gradient(name, param)))
                beta2s.append(0.0 if starts else hyperparameters(group).beta2)
    if pieces:
        exchange = BucketedAllReduce(pieces)
        exchange.start(grads, beta2s, clip_factor)
        exchange.finish(beta2s)
    return Shared(found, clip_factor)


def nbytes_of(shared: Shared) -> int:
    """Return the bytes that the averages hold."""
    pieces = [piece for pieces in shared.averages.values() for piece in pieces if piece is not None]
    held = [piece.relative_rows for piece in pieces]
    for piece in pieces:
        for moment in piece.moments:
            held += [moment.stored, moment.maximum]
    return sum(one.nbytes for one in held if one is not None)


def _with_own_moments(piece: SharedPiece) -> SharedPiece:
    moments = [
        moment._replace(
            stored=moment.stored.clone(), maximum=None if moment.maximum is None else moment.maximum.clone()
        )
        for moment in piece.moments
    ]
    return piece._replace(moments=moments)


def update_of_shards(
    name: str, param: DTensor, group: Mapping[str, Any], rules: Sequence[Rule], state: Mapping[str, Any], shared: Shared
) -> DTensor:
    """Compute the pending update of a DTensor without weight decay, laid out as the DTensor.

    Args:
        name: The parameter's name.
        param: The parameter.
        group: Its group.
        rules: Its rules.
        state: Its state, the pending step counted.
        shared: The result of :func:`averages_after_step`.
    """
    on_shard = local_rules(name, rules, param)
    held, plain = local(param), [one.rule for one in on_shard]
    entries = entries_of(plain, held, local_gradient(name, param), group, local_state(name, on_shard, param, state))
    averaged = shared.averages.get(id(param), [None] * len(on_shard))
    given = (entry if piece is None else piece.given(entry) for entry, piece in zip(entries, averaged, strict=True))
    directions = (update_without_decay(entry, hyperparameters(group, shared.clip_factor)) for entry in given)
    return laid_out_as(param, assembled(held, plain, directions))
