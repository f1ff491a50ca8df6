"""Which elements of a sample of a DTensor a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimadam.utils import torch_private

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Index = tuple[slice, ...]


@dataclass(frozen=True)
class SampleShard:
    """A rank's shard of what is sampled.

    Attributes:
        spans: Its first index along each dimension, and how many there are.
        mesh: The DTensor's.
        mesh_dims: The dimensions of the mesh whose ranks each hold a share.
    """

    spans: tuple[tuple[int, int], ...]
    mesh: DeviceMesh
    mesh_dims: tuple[int, ...]

    @classmethod
    def of(cls, param: DTensor, is_flat: bool) -> SampleShard | None:
        """A parameter's shard, of one dimension if ``is_flat``; None where that is not one block of it."""
        from torch.distributed.tensor import Shard

        mesh = param.device_mesh
        cut: dict[int, Any] = {
            index: placement
            for index, placement in enumerate(param.placements)
            if not placement.is_replicate() and mesh.size(index) > 1
        }
        if any(type(placement) is not Shard for placement in cut.values()):
            return None
        shape, offsets = torch_private.local_shape_and_offset(param)
        spans = tuple(zip(offsets, shape, strict=True))
        if is_flat:
            if any(placement.dim for placement in cut.values()):
                return None
            row = param.shape[1:].numel()
            spans = ((spans[0][0] * row, spans[0][1] * row),)
        return cls(spans, mesh, tuple(cut))

    def indices(self, sampled: Index) -> tuple[Index, Index]:
        """Where the elements that it holds of a sample lie, in the shard and in the sample.

        Args:
            sampled: Where the sample lies in the whole.
        """
        pairs = [_within(one, *span) for one, span in zip(sampled, self.spans, strict=True)]
        return tuple(here for here, _ in pairs), tuple(there for _, there in pairs)

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of what all ranks give, in place; the same on each."""
        for index in self.mesh_dims:
            torch.distributed.all_reduce(values, group=self.mesh.get_group(index))
        return values


def _within(sampled: slice, first: int, count: int) -> tuple[slice, slice]:
    """Of evenly spaced indices those within a span: relative to its beginning, and their numbers."""
    start, stop, stride = sampled.start, min(sampled.stop, first + count), sampled.step
    begin = max(0, -((start - first) // stride))
    end = max(begin, -((start - stop) // stride))
    at = start + begin * stride - first
    return slice(at, at + (end - begin) * stride, stride), slice(begin, end)
