"""Rules of a DTensor as they apply to a rank's shard: its shape, its second moments, and the ranks an average needs.

``torch.distributed.tensor`` is not imported before a DTensor exists: it takes a second to load, and builds of torch
without it work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slimadam.layers.splits import Part, split_dims
from slimadam.state.rule import Dims, Rule
from slimadam.utils import torch_private
from slimadam.utils.dtensor import local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("slimadam")


@cache
def warn_of_old_torch() -> None:
    """Warn once if this torch is older than the releases that sharded parameters are tested with."""
    if torch.__version__ < "2.7":
        logger.warning(
            "torch %s: its DTensors may have no uneven or empty shards, and its FSDP2 does not run on a CPU; use torch "
            "2.7 or later for sharded parameters",
            torch.__version__,
        )


class LocalRule(NamedTuple):
    """A rule as it applies to this rank's shard of a parameter.

    Attributes:
        rule: The rule, its part in the coordinates of the shard.
        shape: The global shape of the parameter or part.
        local_shape: The shape of this rank's shard of it.
        placements: For each dimension of the mesh, the placement of that shape; None where it is not sharded.
        cut: Dimension of a part along which shards end elsewhere than an even division of the part would: second
            moments are replicated along it. None if there is none.
        start: Where along ``cut`` this rank's shard begins.
    """

    rule: Rule
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placements: tuple[Any, ...]
    cut: int | None = None
    start: int = 0

    @property
    def averaged_dims(self) -> tuple[Dims, ...]:
        """For each second moment, the dimensions it is averaged over."""
        return self.rule.averaged_dims(len(self.shape))

    @property
    def is_shared(self) -> bool:
        """True if some of its second moments are averages over several ranks."""
        return any(map(self.summed_over, self.averaged_dims))

    def summed_over(self, dims: Dims) -> tuple[int, ...]:
        """Return the dimensions of the mesh whose ranks each hold a share of an average over ``dims``."""
        shared = {*dims, self.cut}
        return tuple(index for index, one in enumerate(self.placements) if one is not None and one.dim in shared)

    def own(self, moment: Tensor) -> Tensor:
        """Return this shard's share of a second moment, or of sums of its shape."""
        if self.cut is None or moment.shape[self.cut] != self.shape[self.cut] or self.shape[self.cut] == 1:
            return moment
        return moment.narrow(self.cut, self.start, self.local_shape[self.cut])

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        """Return the shape in which this rank stores a second moment averaged over ``dims``."""
        return tuple(
            1 if dim in dims else self.shape[dim] if dim == self.cut else size
            for dim, size in enumerate(self.local_shape)
        )


def local_rules(name: str, rules: Sequence[Rule], param: DTensor) -> list[LocalRule]:
    """Return each rule of a parameter as it applies to this rank.

    Args:
        name: The parameter's name, for errors.
        rules: Its rules.
        param: The parameter.

    Raises:
        RuntimeError: Shards end where a part cannot be followed; the message has a remedy.
    """
    mesh, held = param.device_mesh, local(param)
    placements = tuple(
        None if placement.is_replicate() or mesh.size(index) == 1 else placement
        for index, placement in enumerate(param.placements)
    )
    if any(placement is not None and placement.is_partial() for placement in placements):
        raise RuntimeError(f"{name!r}: a parameter cannot be Partial; redistribute it to Shard or Replicate")
    if rules[0].part is None:
        return [LocalRule(rules[0], tuple(param.shape), tuple(held.shape), placements)]
    return [_local_part(name, rule, rule.part, param, placements) for rule in rules if rule.part is not None]


def _local_part(name: str, rule: Rule, part: Part, param: DTensor, placements: tuple[Any, ...]) -> LocalRule:
    """Return a part's rule, with the part cut to the shard."""
    from torch.distributed.tensor import Shard

    shape, offsets = torch_private.local_shape_and_offset(param)
    view, start, end, missed = list(part.view), part.start, part.start + part.size, 0
    cut: int | None = None
    in_part: list[Any] = [None] * len(placements)
    for index, placement in enumerate(placements):
        if placement is None:
            continue
        inside = split_dims(name, part.of, part.view)[placement.dim]
        first = next((dim for dim in inside if part.view[dim] > 1), inside[0])
        inner = part.of[placement.dim] // part.view[first]
        rows, begin = shape[placement.dim] // inner, offsets[placement.dim] // inner
        if (
            type(placement) is not Shard
            or rows * inner != shape[placement.dim]
            or begin * inner != offsets[placement.dim]
        ):
            raise RuntimeError(_cannot_follow(name, part, f"{placement} cuts through its slices"))
        in_part[index] = Shard(first)
        view[first] = rows
        if first == part.dim:
            cut = first
            start, end = (min(max(bound - begin, 0), rows) for bound in (part.start, part.start + part.size))
            missed = min(max(begin - part.start, 0), part.size)
    if cut is not None and not any(rule.averaged_dims(len(view))):
        raise RuntimeError(
            _cannot_follow(name, part, "it keeps a second moment for each element, and shards end elsewhere than it")
        )
    here = Part(part.label, tuple(shape), tuple(view), part.dim, start, end - start)
    own = replace(rule, part=here, shape=here.shape)
    return LocalRule(own, part.shape, here.shape, tuple(in_part), cut, missed)


def _cannot_follow(name: str, part: Part, why: str) -> str:
    return (
        f"{name!r}: its part {part.label!r} cannot be followed through these shards: {why}; shard it along another "
        "dimension (fully_shard(..., shard_placement_fn=lambda parameter: Shard(1))), or give the whole parameter one "
        "rule, CompressionPlan({name: Rule(...)})"
    )
