"""What a step updates at a time: a parameter, or a part of one, and the implementation that does it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimadam.averages import SharedPiece, shared_pieces
from slimadam.backends import Backend, choose_backend, fits
from slimadam.distributed import is_dtensor, local, local_rules, local_state
from slimadam.entries import entries_of, momentum_dtype, rounding_seed
from slimadam.functional import Entry, Hyperparameters
from slimadam.parts import key_of
from slimadam.rules import Rule


class Piece(NamedTuple):
    """A parameter, or a part of one, and how it is updated.

    Attributes:
        key: What it goes by in plans.
        rule: Its rule; of a DTensor that of the local shard.
        backend: Which implementation updates it.
        entry: Its tensors; of a DTensor the local ones.
        shared: How its second moment is averaged where other ranks take part.
    """

    key: str
    rule: Rule
    backend: Backend
    entry: Entry
    shared: SharedPiece | None = None


def with_gradient(piece: Piece, grad: Tensor, hyper: Hyperparameters) -> Entry:
    """A piece's tensors for a step, of its parameter's gradient."""
    entry, own = piece.entry, own_gradient(piece, grad)
    if not hyper.stochastic_round:
        return Entry(entry.param, own, *entry[2:])  # several times faster than _replace
    return entry._replace(grad=own, seed=seed_of(piece))


def own_gradient(piece: Piece, grad: Tensor) -> Tensor:
    """A piece's own of a parameter's gradient."""
    return grad if piece.rule.part is None else piece.rule.take(grad)


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
    """A parameter, or each of its parts, with the implementation that updates it.

    Triton's counts the step itself: it takes all parts of a parameter that have elements here, or none.
    """
    keys = [key_of(name, rule.part) for rule in rules]
    shared: list[SharedPiece | None] = [None] * len(rules)
    exp_avg_dtype = momentum_dtype(param, group)
    if is_dtensor(param):
        on_shard = local_rules(name, rules, param)
        state = local_state(name, on_shard, param, state)
        shared = shared_pieces(on_shard, param, state) if averages is None else averages
        rules, param = [one.rule for one in on_shard], local(param)
    entries = [
        entry if of_all is None else of_all.given(entry)
        for entry, of_all in zip(entries_of(rules, param, grad, group, state), shared, strict=True)
    ]
    backends = [_backend_of(rule, param, exp_avg_dtype, group) for rule in rules]
    fitting = [
        backend if fits(backend, entry) else "reference" for backend, entry in zip(backends, entries, strict=True)
    ]
    used = {backend for backend, entry in zip(fitting, entries, strict=True) if entry.param.numel()}
    if "triton" in fitting and (counted or used != {"triton"}):
        fitting = ["reference"] * len(fitting)
    yield from map(Piece, keys, rules, fitting, entries, shared)


def backend_of(name: str, param: Tensor, group: Mapping[str, Any], rules: Sequence[Rule]) -> Backend:
    """The implementation for a parameter, or for the first of its parts."""
    rule = local_rules(name, rules, param)[0].rule if is_dtensor(param) else rules[0]
    return _backend_of(rule, local(param), momentum_dtype(param, group), group)


def _backend_of(rule: Rule, param: Tensor, exp_avg_dtype: torch.dtype, group: Mapping[str, Any]) -> Backend:
    piece = rule.take(param)
    return choose_backend(piece, exp_avg_dtype, rule.averaged_dims(piece.dim()), group)
