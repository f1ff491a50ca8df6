"""What a step updates at a time: a parameter, or a part of one, and the implementation that does it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.all_reduce import SharedPiece, shared_pieces
from slimadam.distributed.sharded_rules import is_dtensor, local, local_rules, local_state
from slimadam.kernels.reference import Entry, Hyperparameters
from slimadam.layers.splits import key_of
from slimadam.optim.step.dispatch import Backend, choose_backend, fits
from slimadam.optim.step.tensors import entries_of, momentum_dtype, rounding_seed, slices_of
from slimadam.state.rule import Rule

WORTH_SLICING = 1 << 14
"""Elements from which on a slice is worth an update of its own."""


class Piece(NamedTuple):
    """A parameter, or a part of one, and how it is updated.

    Attributes:
        key: What it goes by in plans.
        rule: Its rule; of a DTensor that of the local shard.
        backend: Which implementation updates it.
        entry: Its tensors; of a DTensor the local ones.
        shared: How its second moment is averaged where other ranks take part.
        slice_index: Which slice of the first dimension it is; None: all of it.
    """

    key: str
    rule: Rule
    backend: Backend
    entry: Entry
    shared: SharedPiece | None = None
    slice_index: int | None = None


def with_gradient(piece: Piece, grad: Tensor, hyper: Hyperparameters) -> Entry:
    """A piece's tensors for a step, of its parameter's gradient."""
    param, _, exp_avg, second, largest, step, dims, seed, scale, is_given = piece.entry
    if hyper.stochastic_round:
        seed = seed_of(piece)
    # Neither _replace nor a slice: they are slow, and Dynamo of torch 2.6 does not trace them.
    return Entry(param, own_gradient(piece, grad), exp_avg, second, largest, step, dims, seed, scale, is_given)


def own_gradient(piece: Piece, grad: Tensor) -> Tensor:
    """A piece's own of a parameter's gradient."""
    if piece.rule.part is not None:
        grad = piece.rule.take(grad)
    return grad if piece.slice_index is None else grad[piece.slice_index]


def seed_of(piece: Piece) -> int:
    """Of this step's stochastic rounding."""
    counts = piece.backend == "triton"
    return zlib.crc32(piece.key.encode()) if counts else rounding_seed(piece.entry.step, piece.key)


def pieces_of_step(
    name: str,
    param: Tensor,
    grad: Tensor,
    group: Mapping[str, Any],
    rules: Sequence[Rule],
    state: Mapping[str, Any],
    averages: list[SharedPiece | None] | None = None,
    counted: bool = False,
) -> Iterator[Piece]:
    """A parameter, or each of its parts, with the implementation that updates it; or slices, if that takes those alone.

    Triton's counts the step itself: it takes all parts of a parameter that have elements here, or none.
    """
    shared: list[SharedPiece | None] = [None] * len(rules)
    exp_avg_dtype = momentum_dtype(param, group)
    if is_dtensor(param):
        on_shard = local_rules(name, rules, param)
        state = local_state(name, on_shard, param, state)
        shared = shared_pieces(on_shard, param, state) if averages is None else averages
        rules, param = [one.rule for one in on_shard], local(param)
    found: list[Piece] = []
    for rule, entry, of_all in zip(rules, entries_of(rules, param, grad, group, state), shared, strict=True):
        key = key_of(name, rule.part)
        backend, in_slices = _backend_of(rule, param, exp_avg_dtype, group)
        if in_slices and of_all is None:
            slices = list(slices_of(entry, state))
            if all(fits(backend, one) for one in slices):
                found += (
                    Piece(f"{key}[{index}]", rule, backend, one, slice_index=index) for index, one in enumerate(slices)
                )
                continue
        own = entry if of_all is None else of_all.given(entry)
        found.append(Piece(key, rule, backend if not in_slices and fits(backend, own) else "reference", own, of_all))
    used = {piece.backend for piece in found if piece.entry.param.numel()}
    if "triton" in {piece.backend for piece in found} and (counted or used != {"triton"}):
        found = [piece._replace(backend="reference") for piece in found]
    yield from found


def backend_of(name: str, param: Tensor, group: Mapping[str, Any], rules: Sequence[Rule]) -> Backend:
    """The implementation for a parameter, or for the first of its parts."""
    rule = local_rules(name, rules, param)[0].rule if is_dtensor(param) else rules[0]
    return _backend_of(rule, local(param), momentum_dtype(param, group), group)[0]


def _backend_of(
    rule: Rule, param: Tensor, exp_avg_dtype: torch.dtype, group: Mapping[str, Any]
) -> tuple[Backend, bool]:
    """The implementation for one part of a parameter, and whether it takes the slices of the first dimension alone.

    Those of stacked experts' gate or up projection lie apart from each other, each in one piece.
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
