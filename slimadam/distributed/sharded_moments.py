"""Second moments whose averages extend over several ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import LocalRule, local_rules, zeros
from slimadam.kernels.interface import Dims, Entry
from slimadam.kernels.reference import initial_second_moment, scale_grad
from slimadam.state import second_moment
from slimadam.state.rule import Rule
from slimadam.utils.dtensor import fill, groups_of, local, local_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("slimadam")


class SharedMoment(NamedTuple):
    """One second-moment tensor that is updated from sums.

    Attributes:
        stored: What this rank keeps of it.
        maximum: With amsgrad its running maximum.
        dims: The dimensions it is averaged over.
        averaged: How many elements of the global tensor are averaged together.
        groups: The process groups whose ranks' sums belong together; none where this rank has all.
    """

    stored: Tensor
    maximum: Tensor | None
    dims: Dims
    averaged: int
    groups: tuple[ProcessGroup, ...]


class SharedPiece(NamedTuple):
    """A parameter, or part of one, with a second moment that no rank can average alone.

    Attributes:
        rule: Its rule on this rank.
        moments: Its second moments.
        relative_rows: Factored: where the rows over their mean are put; else None.
        row_groups: The process groups among which the rows are shared out.
        replicas: Factored: how many ranks keep the same rows.
    """

    rule: LocalRule
    moments: list[SharedMoment]
    relative_rows: Tensor | None
    row_groups: tuple[ProcessGroup, ...]
    replicas: int

    def given(self, entry: Entry) -> Entry:
        """The entry of an update that finds its second moments made."""
        if self.relative_rows is None:
            used = [moment.stored if moment.maximum is None else moment.maximum for moment in self.moments]
        else:
            used = [self.relative_rows, self.moments[1].stored]
        return entry._replace(exp_avg_sq=[self.rule.own(one) for one in used], max_exp_avg_sq=(), precomputed=True)


def shared_pieces(rules: Sequence[LocalRule], param: DTensor, state: Mapping[str, Any]) -> list[SharedPiece | None]:
    """For each rule of a parameter its averages, where other ranks take part in one, else None.

    Args:
        rules: The rules on this rank.
        param: The parameter.
        state: This rank's tensors.
    """
    ndim = len(rules[0].shape)
    plain = [one.rule for one in rules]
    moments = second_moment.by_rule(plain, second_moment.moments_of(state, plain), ndim)
    maxima = second_moment.by_rule(plain, second_moment.moments_of(state, plain, "max_exp_avg_sq"), ndim)
    return [
        _shared_piece(rule, param, stored, largest)
        for rule, (_, stored), (_, largest) in zip(rules, moments, maxima, strict=True)
    ]


def _shared_piece(
    rule: LocalRule, param: DTensor, stored: Sequence[Tensor], maxima: Sequence[Tensor]
) -> SharedPiece | None:
    dims = rule.rule.averaged_dims(len(rule.shape))
    asked = [rule.summed_over(one) for one in dims]
    if not any(asked):
        return None
    if param.is_complex():
        raise RuntimeError(
            f"a complex DTensor of shape {tuple(param.shape)} whose second moment is averaged over ranks is not "
            "supported; keep it in full, or shard it along a dimension that is not averaged"
        )
    moments = [
        SharedMoment(moment, largest, one, rule.count(one), groups_of(param, summed))
        for moment, largest, one, summed in zip(stored, maxima or repeat(None), dims, asked, strict=False)
    ]
    if len(dims) == 1:
        return SharedPiece(rule, moments, None, (), 1)
    rows = tuple(index for index in asked[1] if index not in asked[0])
    replicas = math.prod(param.device_mesh.size(index) for index in asked[0])
    return SharedPiece(rule, moments, torch.empty_like(stored[0]), groups_of(param, rows), replicas)


def initial_moments(
    name: str, rules: Sequence[Rule], param: DTensor, from_gradient: bool, clip_factor: Tensor | None = None
) -> list[Tensor]:
    """Second moments of a DTensor before its first step, zero or the averages of its first squared gradient.

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
        from_gradient: Start at the gradient's. Averages over several ranks are left at zero: the step's exchange sends
            for the gradient's anyway, and makes them that with ``beta2 = 0``.
        clip_factor: What the gradient is multiplied by.
    """
    on_shard = local_rules(name, rules, param)
    made = [zeros(rule, param, dims) for rule in on_shard for dims in rule.rule.averaged_dims(len(rule.shape))]
    if not from_gradient:
        return made
    held = [local(moment) for moment in made]
    grad = local_gradient(name, param)
    shared = shared_pieces(on_shard, param, second_moment.by_key(held, [one.rule for one in on_shard]))
    moments = second_moment.by_rule([one.rule for one in on_shard], held, len(on_shard[0].shape))
    for piece, (rule, own) in zip(shared, moments, strict=True):
        if piece is None:
            gradient = scale_grad(rule.take(grad), clip_factor)
            for moment, dims in zip(own, rule.averaged_dims(gradient.dim()), strict=True):
                moment.copy_(initial_second_moment(gradient, dims))
    return made


def distributed_moments(name: str, rules: Sequence[Rule], param: DTensor, averaged: Sequence[Tensor]) -> list[Tensor]:
    """Second moments as DTensors that lie as the rules of a parameter ask.

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
        averaged: The moments, of global shapes, the same on every rank.
    """
    made = initial_moments(name, rules, param, from_gradient=False)
    for moment, values in zip(made, averaged, strict=True):
        fill(cast("DTensor", moment), values)
    return made


def rules_that_shards_allow(name: str, rules: list[Rule], param: DTensor) -> list[Rule]:
    """The rules, or one that keeps the parameter whole where its parts cannot be followed through its shards."""
    try:
        local_rules(name, rules, param)
    except RuntimeError as error:
        logger.warning("plan='auto' keeps the second moment of %s in full: %s", name, error)
        return [Rule(shape=tuple(param.shape), reason=str(error))]
    return rules
