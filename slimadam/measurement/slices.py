"""Evenly spaced slices of second moments that are tracked in full, also of shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slimadam.measurement.snr import small_snr
from slimadam.state.rule import Rule
from slimadam.utils import torch_private

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Index = tuple[slice, ...]
"""Evenly spaced indices along each dimension of a parameter, or of its elements laid end to end."""


def counts_of(index: Index) -> tuple[int, ...]:
    """Return the number of indices along each dimension."""
    return tuple((one.stop - one.start) // (one.step or 1) for one in index)


def take(tensor: Tensor, index: Index) -> Tensor:
    """Return the sampled elements; a view unless all dimensions are averaged and the tensor is not contiguous.

    Args:
        tensor: The parameter's, or a shard of it.
        index: Position of the sample in it.
    """
    whole = tensor if tensor.dim() == len(index) else tensor.reshape(-1)
    if 0 in whole.shape:
        return whole[index]
    steps = whole.stride()  # one call, where indexing makes a view for each dimension
    offset = sum(one.start * step for one, step in zip(index, steps, strict=True))
    strides = [one.step * step for one, step in zip(index, steps, strict=True)]
    return whole.as_strided(counts_of(index), strides, whole.storage_offset() + offset)


def within(sampled: slice, first: int, count: int) -> tuple[slice, slice]:
    """Return which of some evenly spaced indices lie in a span: relative to its beginning, and their numbers.

    Args:
        sampled: The indices.
        first: First index of the span.
        count: Length of the span.
    """
    start, stop, stride = sampled.start, min(sampled.stop, first + count), sampled.step
    begin = max(0, -((start - first) // stride))
    end = max(begin, -((start - stop) // stride))
    at = start + begin * stride - first
    return slice(at, at + (end - begin) * stride, stride), slice(begin, end)


class OwnShard(NamedTuple):
    """A rank's shard of a DTensor: its first index and size along each dimension, and the mesh dimensions that cut."""

    spans: Sequence[tuple[int, int]]
    mesh: DeviceMesh
    mesh_dims: Sequence[int]


def shard_of(param: DTensor, is_flat: bool) -> OwnShard | None:
    """Return this rank's shard; None where that is not one block.

    Args:
        param: The parameter.
        is_flat: Whether its elements count as laid end to end.
    """
    from torch.distributed.tensor import Shard

    mesh = param.device_mesh
    cuts = {
        index: placement
        for index, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(index) > 1
    }
    if any(type(cut) is not Shard or (is_flat and cut.dim > 0) for cut in cuts.values()):
        return None
    shape, offsets = torch_private.local_shape_and_offset(param)
    row = param.shape[1:].numel() if is_flat else 1
    spans = [(first * row, count * row) for first, count in zip(offsets, shape, strict=True)]
    return OwnShard(spans[:1] if is_flat else spans, mesh, tuple(cuts))


@dataclass
class TrackedSlices:
    """Evenly spaced slices of a second moment that are tracked in full.

    Of a DTensor each rank tracks the elements in its ``shard``.

    Attributes:
        rule: How the second moment of the parameter, or part, is stored.
        index: Position of the slices.
        dtype: Precision in which they are tracked.
        shard: This rank's shard; None for a parameter that is not sharded.
        moment: The tracked second moments; None before the first gradient.
    """

    rule: Rule
    index: Index
    dtype: torch.dtype
    shard: OwnShard | None = None
    moment: Tensor | None = None

    def __post_init__(self) -> None:
        spans = [(0, one.stop) for one in self.index] if self.shard is None else self.shard.spans
        pairs = [within(one, *span) for one, span in zip(self.index, spans, strict=True)]
        self.here, self.there = tuple(here for here, _ in pairs), tuple(there for _, there in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank tracks, also before the first gradient."""
        return math.prod(counts_of(self.there)) * self.dtype.itemsize

    def seen(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second moments and the elements of a gradient that they see.

        Args:
            grad: This rank's gradient.
        """
        found = take(self.rule.take(grad), self.here)
        if self.moment is None:
            self.moment = torch.zeros(counts_of(self.there), dtype=self.dtype, device=found.device)
        self.moment = self.moment.to(found.device)
        return self.moment, found

    def full_moment(self) -> Tensor:
        """Return the second moments of all slices (collective)."""
        assert self.moment is not None
        if self.shard is None:
            return self.moment
        full = self.moment.new_zeros(counts_of(self.index))
        full[self.there] = self.moment
        for mesh_dim in self.shard.mesh_dims:
            torch.distributed.all_reduce(full, group=self.shard.mesh.get_group(mesh_dim))
        return full

    def factored_snr(self, moment: Tensor, averages: Sequence[Tensor]) -> float:
        """Compute the SNR of the factored form: the slices over what row and column averages say of them.

        Where leading dimensions count matrices the result is the mean over these. Infinity where the slices are
        constant or no gradient has reached them.

        Args:
            moment: The second moments of all slices.
            averages: Row and column averages of the whole parameter, or part.
        """
        row_dim = self.rule.batch_dims
        rows, columns = (one.cpu().to(torch.float64) for one in averages)
        relative = rows / rows.mean(row_dim, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        at_columns = (*self.index[:row_dim], slice(None), *self.index[row_dim + 1 :])
        expected = relative[self.index[: row_dim + 1]] * columns[at_columns]
        seen, product = (one.double().expand(moment.shape).cpu().numpy() for one in (moment, expected))
        matrices = (math.prod(moment.shape[:row_dim]), -1)
        pairs = zip(seen.reshape(matrices), product.reshape(matrices), strict=True)
        found = [small_snr(own[its != 0] / its[its != 0], (0,)) for own, its in pairs]
        telling = [value for value in found if value != math.inf]
        return math.fsum(telling) / len(telling) if telling else math.inf


@torch.no_grad()
def track(moments: list[Tensor], seen: list[Tensor], kept: Sequence[float], weight: float) -> None:
    """Update tracked second moments in place: ``v <- kept v + weight g**2``.

    Args:
        moments: The second moments.
        seen: For each the elements of the gradient that it sees.
        kept: By how much each decays.
        weight: Weight of the squared gradient.
    """
    torch._foreach_mul_(moments, kept)
    torch._foreach_addcmul_(moments, seen, seen, value=weight)
