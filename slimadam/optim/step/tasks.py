"""Update tasks: a parameter, or a part of one, and the implementation that updates it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import SharedPiece, initial_moments, shared_pieces
from slimadam.distributed.sharded_rules import local_rules, local_state
from slimadam.kernels.interface import Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.reference import initial_second_moment, scale_grad
from slimadam.layers.splits import key_of
from slimadam.optim.step.dispatch import Backend, choose_backend, steps_on_device, supports
from slimadam.state import int8, second_moment
from slimadam.state.first_moment import momentum_of, stored_first_moment
from slimadam.state.rule import Rule
from slimadam.utils.dtensor import is_dtensor, local

WORTH_SLICING = 1 << 14
"""Elements from which on a slice is worth an update of its own."""


class UpdateTask(NamedTuple):
    """Update of a parameter, of one part of it, or of one slice.

    Attributes:
        key: Its name in plans.
        rule: Its rule; of a DTensor that of the local shard.
        backend: The implementation that updates it.
        entry: Its tensors; of a DTensor the local ones.
        shared: Its averages that other ranks take part in.
        slice_index: Index of a slice of the first dimension; None: all of it.
    """

    key: str
    rule: Rule
    backend: Backend
    entry: Entry
    shared: SharedPiece | None = None
    slice_index: int | None = None


def with_gradient(piece: UpdateTask, grad: Tensor, hyper: Hyperparameters) -> Entry:
    """Return the tensors of a task with the gradient and the seed of a step.

    Args:
        piece: The task.
        grad: The gradient of the whole parameter.
        hyper: Hyperparameters of the step.
    """
    param, _, exp_avg, second, largest, step, dims, seed, scale, precomputed = piece.entry
    if hyper.stochastic_round:
        seed = seed_of(piece)
    # Neither _replace nor a slice: they are slow, and Dynamo of torch 2.6 does not trace them.
    return Entry(param, own_gradient(piece, grad), exp_avg, second, largest, step, dims, seed, scale, precomputed)


def own_gradient(piece: UpdateTask, grad: Tensor) -> Tensor:
    """Return the part of a parameter's gradient that a task updates with.

    Args:
        piece: The task.
        grad: The gradient of the whole parameter.
    """
    if piece.rule.part is not None:
        grad = piece.rule.take(grad)
    return grad if piece.slice_index is None else grad[piece.slice_index]


def seed_of(piece: UpdateTask) -> int:
    """Return the seed of this step's stochastic rounding."""
    counts = piece.backend == "triton"
    return zlib.crc32(piece.key.encode()) if counts else rounding_seed(piece.entry.step, piece.key)


def tasks_of_step(
    name: str,
    param: Tensor,
    grad: Tensor,
    group: Mapping[str, Any],
    rules: Sequence[Rule],
    state: Mapping[str, Any],
    averages: list[SharedPiece | None] | None = None,
    counted: bool = False,
) -> Iterator[UpdateTask]:
    """Yield the update tasks of a parameter: one, one for each part, or one for each slice.

    Triton counts the step itself: it updates all parts of a parameter that have elements here, or none.

    Args:
        name: The parameter's name.
        param: The parameter.
        grad: Its gradient on this rank.
        group: Its group.
        rules: Its rules.
        state: Its state.
        averages: Averages over several ranks that are known already, for each rule.
        counted: Whether the step has been counted.
    """
    shared: list[SharedPiece | None] = [None] * len(rules)
    exp_avg_dtype = momentum_of(param, group).dtype
    if is_dtensor(param):
        on_shard = local_rules(name, rules, param)
        state = local_state(name, on_shard, param, state)
        shared = shared_pieces(on_shard, param, state) if averages is None else averages
        rules, param = [one.rule for one in on_shard], local(param)
    found: list[UpdateTask] = []
    for rule, entry, of_all in zip(rules, entries_of(rules, param, grad, group, state), shared, strict=True):
        key = key_of(name, rule.part)
        backend, in_slices = _backend_of(rule, param, exp_avg_dtype, group)
        if in_slices and of_all is None:
            slices = list(slices_of(entry, state))
            if all(supports(backend, one) for one in slices):
                found += (
                    UpdateTask(f"{key}[{index}]", rule, backend, one, slice_index=index)
                    for index, one in enumerate(slices)
                )
                continue
        own = entry if of_all is None else of_all.given(entry)
        found.append(
            UpdateTask(key, rule, backend if not in_slices and supports(backend, own) else "reference", own, of_all)
        )
    used = {piece.backend for piece in found if piece.entry.param.numel()}
    if "triton" in {piece.backend for piece in found} and (counted or used != {"triton"}):
        found = [piece._replace(backend="reference") for piece in found]
    yield from found


def backend_of(name: str, param: Tensor, group: Mapping[str, Any], rules: Sequence[Rule]) -> Backend:
    """Return the implementation for a parameter, or for the first of its parts.

    Args:
        name: The parameter's name.
        param: The parameter.
        group: Its group.
        rules: Its rules.
    """
    rule = local_rules(name, rules, param)[0].rule if is_dtensor(param) else rules[0]
    return _backend_of(rule, local(param), momentum_of(param, group).dtype, group)[0]


def _backend_of(
    rule: Rule, param: Tensor, exp_avg_dtype: torch.dtype, group: Mapping[str, Any]
) -> tuple[Backend, bool]:
    """Return the implementation for a part of a parameter, and whether it takes slices of the first dimension alone.

    Slices of stacked experts' gate or up projection lie apart from each other, each in one piece.
    """
    piece = rule.take(param)
    dims = rule.averaged_dims(piece.dim())
    backend = choose_backend(piece, exp_avg_dtype, dims, group)
    apart = backend in ("reference", "foreach") and piece.dim() > 2 and not any(0 in one for one in dims)
    if apart and piece.numel() >= WORTH_SLICING * piece.shape[0] > 0:
        of_slice = choose_backend(piece[0], exp_avg_dtype, [tuple(dim - 1 for dim in one) for one in dims], group)
        if of_slice not in ("reference", "foreach"):
            return of_slice, True
    return backend, False


def entries_of(
    rules: Sequence[Rule], param: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[Entry]:
    """Yield the tensors of a parameter's step, or of each of its parts; none is a copy.

    A part that does not consist of whole blocks of codes has no ``exp_avg_scale``: :func:`decoded` first.

    Args:
        rules: Its rules.
        param: The parameter.
        grad: Its gradient.
        group: Its group.
        state: Its state.
    """
    ndim = param.dim()
    if rules[0].part is None:
        second = second_moment.moments_of(state, rules)
        maxima = second_moment.moments_of(state, rules, "max_exp_avg_sq") if group["amsgrad"] else []
        dims = rules[0].averaged_dims(ndim)
        scales = state.get("exp_avg_scale")
        exp_avg = stored_first_moment(state)
        yield Entry(param, grad, exp_avg, second, maxima, state["step"], dims, exp_avg_scale=scales)
        return
    whole = stored_first_moment(state)
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
    """Yield the tensors of each slice of the first dimension, along which nothing is averaged.

    Args:
        entry: The tensors of a parameter or a part of one; with codes but no scales where they are no whole blocks.
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
    """Return a tensor of the parameter's shape from one for each of its rules.

    Args:
        param: The parameter.
        rules: Its rules.
        pieces: The tensors.
    """
    if rules[0].part is None:
        return next(pieces)
    whole = torch.empty_like(param, dtype=second_moment_dtype(param.dtype))
    for rule, piece in zip(rules, pieces, strict=True):
        rule.take(whole).copy_(piece)
    return whole


def initial_state(
    name: str, rules: Sequence[Rule], param: Tensor, group: Mapping[str, Any], clip_factor: Tensor | None = None
) -> dict[str, Any]:
    """Return a parameter's state before its first step.

    Second moments start at zero, or at the first squared gradient (GI-Adam).

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
        group: Its group.
        clip_factor: Factor of its gradient.
    """
    dtype = second_moment_dtype(param.dtype)
    parts: Sequence[Tensor]
    if is_dtensor(param):
        from_gradient = group["variance_init"] == "gradient" and param.grad is not None
        parts = initial_moments(name, rules, param, from_gradient, clip_factor)
    elif group["variance_init"] == "gradient" and param.grad is not None:
        grads = ((rule, scale_grad(rule.take(param.grad), clip_factor)) for rule in rules)
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
        **momentum_of(param, group).init(param),
        **second_moment.by_key(parts, rules),
    }
    if group["amsgrad"]:
        made.update(second_moment.by_key([torch.zeros_like(part) for part in parts], rules, "max_exp_avg_sq"))
    return made


def rounding_seed(step: Tensor, name: str) -> int:
    """Return a seed that only the step and the parameter's name decide, so that a resumed run repeats it.

    Args:
        step: The step count.
        name: The parameter's name, or a part's.
    """
    mixed = (int(step.item()) * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode()) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed ^= mixed >> 31
    return mixed * 0x94D049BB133111EB >> 2 & (1 << 62) - 1
