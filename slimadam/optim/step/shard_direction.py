"""The direction of a pending update on DTensors: from this rank's shards, and averages over ranks made beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from slimadam.distributed.all_reduce import Exchange, SharedPiece, shared_pieces
from slimadam.distributed.sharded_rules import laid_out_as, local, local_gradient, local_rules, local_state
from slimadam.kernels.reference import Scalar
from slimadam.optim.step.direction import update_without_decay
from slimadam.optim.step.tensors import assembled, entries_of, hyperparameters, initial_state
from slimadam.state.rule import Rule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Shared(NamedTuple):
    """All that a pending update asks of other ranks, or of other parameters.

    Attributes:
        averages: By ``id`` of a parameter, for each of its rules, the averages that other ranks take part in.
        clip_factor: What every gradient is multiplied by.
    """

    averages: dict[int, list[SharedPiece | None]]
    clip_factor: Tensor | None = None


def averages_after_step(
    pending: Iterable[tuple[str, DTensor, Mapping[str, Any]]],
    all_rules: Mapping[str, list[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None,
) -> Shared:
    """What the pending step would make of averages over several ranks, by one all-reduce for each process group.

    All ranks must ask. The optimizer's state does not change.

    Args:
        pending: Name, parameter with a gradient, and group.
        all_rules: By name.
        states: By parameter.
        clip_factor: What every gradient is multiplied by.
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
        exchange = Exchange(pieces)
        exchange.start(grads, beta2s, clip_factor)
        exchange.finish(beta2s)
    return Shared(found, clip_factor)


def nbytes_of(shared: Shared) -> int:
    """What the averages hold, in bytes."""
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
    """The part of a DTensor's pending update that gradients and state alone decide, laid out as the DTensor.

    Args:
        name: The parameter's name.
        param: The parameter.
        group: Its group.
        rules: Its rules.
        state: Its state, the pending step counted.
        shared: What :func:`averages_after_step` returned.
    """
    on_shard = local_rules(name, rules, param)
    held, plain = local(param), [one.rule for one in on_shard]
    entries = entries_of(plain, held, local_gradient(name, param), group, local_state(name, on_shard, param, state))
    averaged = shared.averages.get(id(param), [None] * len(on_shard))
    given = (entry if piece is None else piece.given(entry) for entry, piece in zip(entries, averaged, strict=True))
    directions = (update_without_decay(entry, hyperparameters(group, shared.clip_factor)) for entry in given)
    return laid_out_as(param, assembled(held, plain, directions))
