"""Second moments of DTensors, some of them averages over several ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import LocalRule, local_rules
from slimadam.kernels.interface import Dims, Entry, second_moment_dtype
from slimadam.kernels.reference import initial_second_moment, scale_grad
from slimadam.state import second_moment
from slimadam.state.rule import Rule, reduced_shape
from slimadam.utils.dtensor import groups_of, laid_out_as, local, local_gradient, place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("slimadam")


class SharedMoment(NamedTuple):
    """A second-moment tensor that is updated from sums.

    Attributes:
        stored: The tensor that this rank stores.
        maximum: Its running maximum with amsgrad, else None.
        dims: The dimensions it is averaged over.
        averaged: Number of elements of the global tensor that are averaged together.
        groups: The process groups whose ranks' sums are added; none where this rank has all.
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
        relative_rows: The buffer of the rows over their mean if factored, else None.
        row_groups: The process groups over which the rows are sharded.
        replicas: Number of ranks that store the same rows if factored.
    """

    rule: LocalRule
    moments: list[SharedMoment]
    relative_rows: Tensor | None
    row_groups: tuple[ProcessGroup, ...]
    replicas: int

    def given(self, entry: Entry) -> Entry:
        """Return the entry of an update from the second moments that the all-reduce has updated."""
        if self.relative_rows is None:
            used = [moment.stored if moment.maximum is None else moment.maximum for moment in self.moments]
        else:
            used = [self.relative_rows, self.moments[1].stored]
        return entry._replace(exp_avg_sq=[self.rule.own(one) for one in used], max_exp_avg_sq=(), precomputed=True)


def shared_pieces(rules: Sequence[LocalRule], param: DTensor, state: Mapping[str, Any]) -> list[SharedPiece | None]:
    """Return for each rule of a parameter its averages over several ranks, or None where there are none.

    Args:
        rules: The rules on this rank.
        param: The parameter.
        state: This rank's tensors.
    """
    plain = [one.rule for one in rules]
    moments, maxima = (
        second_moment.by_rule(plain, second_moment.moments_of(state, plain, kind), len(rules[0].shape))
        for kind in second_moment.SECOND_MOMENTS
    )
    return [
        _shared_piece(rule, param, stored, largest) if _is_shared(rule) else None
        for rule, (_, stored), (_, largest) in zip(rules, moments, maxima, strict=True)
    ]


def _is_shared(rule: LocalRule) -> bool:
    return any(map(rule.summed_over, rule.averaged_dims))


def _shared_piece(rule: LocalRule, param: DTensor, stored: Sequence[Tensor], maxima: Sequence[Tensor]) -> SharedPiece:
    if param.is_complex():
        raise RuntimeError(
            f"a complex DTensor of shape {tuple(param.shape)} whose second moment is averaged over ranks is not "
            "supported; keep it in full, or shard it along a dimension that is not averaged"
        )
    summed = [rule.summed_over(dims) for dims in rule.averaged_dims]
    moments = [
        SharedMoment(moment, largest, dims, math.prod(rule.shape[dim] for dim in dims), groups_of(param, over))
        for moment, largest, dims, over in zip(stored, maxima or repeat(None), rule.averaged_dims, summed, strict=False)
    ]
    if len(moments) == 1:
        return SharedPiece(rule, moments, None, (), 1)
    rows = tuple(index for index in summed[1] if index not in summed[0])
    replicas = math.prod(param.device_mesh.size(index) for index in summed[0])
    return SharedPiece(rule, moments, torch.empty_like(stored[0]), groups_of(param, rows), replicas)


def initial_moments(
    name: str, rules: Sequence[Rule], param: DTensor, from_gradient: bool, clip_factor: Tensor | None = None
) -> list[Tensor]:
    """Return second moments of a DTensor before its first step: zero, or the averages of its first squared gradient.

    Args:
        name: The parameter's name, for errors.
        rules: Its rules.
        param: The parameter.
        from_gradient: Start at the gradient's averages. Those over several ranks are left at zero: the all-reduce of
            the step computes them with ``beta2 = 0``.
        clip_factor: Factor of the gradient.
    """
    grad = local_gradient(name, param) if from_gradient else None
    found: list[Tensor] = []
    for rule in local_rules(name, rules, param):
        moments = [_zeros(rule, param, dims) for dims in rule.averaged_dims]
        if grad is not None and not _is_shared(rule):
            own = scale_grad(rule.rule.take(grad), clip_factor)
            for moment, dims in zip(moments, rule.averaged_dims, strict=True):
                local(moment).copy_(initial_second_moment(own, dims))
        found += moments
    return found


def _zeros(rule: LocalRule, param: DTensor, dims: Dims) -> DTensor:
    """Return a second moment of zero, as a DTensor that is replicated where ranks average together."""
    from torch.distributed.tensor import Replicate

    held = torch.zeros(rule.stored_shape(dims), dtype=second_moment_dtype(param.dtype), device=local(param).device)
    summed = rule.summed_over(dims)
    placements = [
        Replicate() if placement is None or index in summed else placement
        for index, placement in enumerate(rule.placements)
    ]
    return laid_out_as(param, held, reduced_shape(rule.shape, dims), placements)


def distributed_moments(name: str, rules: Sequence[Rule], param: DTensor, averaged: Sequence[Tensor]) -> list[Tensor]:
    """Return second moments as DTensors with the placements that the rules of a parameter need.

    Args:
        name: The parameter's name, for errors.
        rules: Its rules.
        param: The parameter.
        averaged: The moments, of global shapes, the same on every rank.
    """
    made = initial_moments(name, rules, param, from_gradient=False)
    for moment, values in zip(made, averaged, strict=True):
        place(moment, values)
    return made


def rules_that_shards_allow(name: str, rules: list[Rule], param: DTensor) -> list[Rule]:
    """Return the rules, or one full rule where the parameter's parts cannot be followed through its shards.

    Args:
        name: The parameter's name.
        rules: Its rules.
        param: The parameter.
    """
    try:
        local_rules(name, rules, param)
    except RuntimeError as error:
        logger.warning("plan='auto' keeps the second moment of %s in full: %s", name, error)
        return [Rule(shape=tuple(param.shape), reason=str(error))]
    return rules
