"""Second moments of DTensors, some of them averages over several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import LocalRule
from slimadam.kernels.interface import Dims, Entry
from slimadam.state.second_moment import reduced_shape
from slimadam.utils.dtensor import groups_of, laid_out_as, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


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


class SharedPart(NamedTuple):
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

    def with_moments(self, entry: Entry) -> Entry:
        """Return the entry of an update from the second moments that the all-reduce has updated."""
        if self.relative_rows is None:
            used = [moment.stored if moment.maximum is None else moment.maximum for moment in self.moments]
        else:
            used = [self.relative_rows, self.moments[1].stored]
        return entry._replace(exp_avg_sq=[self.rule.own(one) for one in used], max_exp_avg_sq=(), precomputed=True)


def shared_part(rule: LocalRule, param: DTensor, stored: Sequence[Tensor], maxima: Sequence[Tensor]) -> SharedPart:
    """Return the averages over several ranks of a parameter, or of a part of it.

    Args:
        rule: Its rule on this rank.
        param: The parameter.
        stored: This rank's second moments.
        maxima: Their running maxima with amsgrad, else none.

    Raises:
        RuntimeError: The parameter is complex.
    """
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
        return SharedPart(rule, moments, None, (), 1)
    rows = tuple(index for index in summed[1] if index not in summed[0])
    replicas = math.prod(param.device_mesh.size(index) for index in summed[0])
    return SharedPart(rule, moments, torch.empty_like(stored[0]), groups_of(param, rows), replicas)


def zeros(rule: LocalRule, param: DTensor, dims: Dims) -> DTensor:
    """Return a second moment of zero, replicated where ranks average together.

    Args:
        rule: The rule on this rank of the parameter, or of a part of it.
        param: The parameter.
        dims: The dimensions that the second moment is averaged over.
    """
    from torch.distributed.tensor import Replicate

    held = torch.zeros(
        rule.stored_shape(dims), dtype=rule.rule.stored_as.dtype(param.dtype), device=local(param).device
    )
    summed = rule.summed_over(dims)
    placements = [
        Replicate() if placement is None or index in summed else placement
        for index, placement in enumerate(rule.placements)
    ]
    return laid_out_as(param, held, reduced_shape(rule.shape, dims), placements)
