"""Averages over more than one rank: every rank's sums in one buffer, one all-reduce per process group and step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import SharedPiece
from slimadam.kernels.interface import Dims, Scalar
from slimadam.state.rule import reduced_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


BLOCK_ELEMENTS = 1 << 18
"""Elements squared at a time on a CPU, so that they stay in cache."""


class _Item(NamedTuple):
    """Numbers that are summed: where this rank's share is written, and where the sum of all lies then."""

    first: Tensor
    last: Tensor


class BucketedAllReduce:
    """The sums of every piece of a step that needs other ranks'; its memory is allocated once.

    Args:
        pieces: They, in the same order on every rank.
    """

    def __init__(self, pieces: Sequence[SharedPiece]) -> None:
        self.pieces = list(pieces)
        moments = [moment for piece in pieces for moment in piece.moments]
        self._dtype = reduce(torch.promote_types, (moment.stored.dtype for moment in moments))
        self._device = moments[0].stored.device
        self._sum = add_squares if self._device.type == "cpu" else write_norms
        wanted: list[tuple[tuple[int, ...], tuple[ProcessGroup, ...]]] = []
        for piece in pieces:
            wanted += [(tuple(moment.stored.shape), moment.groups) for moment in piece.moments]
            if piece.row_groups:
                groups = tuple(dict.fromkeys([*piece.moments[0].groups, *piece.row_groups]))
                wanted.append((_mean_shape(piece), groups))
        self._groups = list(dict.fromkeys(group for _, groups in wanted for group in groups))
        self._reductions, items = self._allocate(wanted)
        self._sums: list[list[_Item]] = []
        self._means: list[_Item | None] = []
        for piece in pieces:
            self._sums.append([next(items) for _ in piece.moments])
            self._means.append(next(items) if piece.row_groups else None)

    def fits(self, pieces: Sequence[SharedPiece]) -> bool:
        """Whether it was made for these."""
        return len(pieces) == len(self.pieces) and all(map(_is_same, pieces, self.pieces))

    def start(self, grads: Sequence[Tensor], beta2s: Sequence[Scalar], clip_factor: Tensor | None = None) -> None:
        """Sum this rank's squares, and send for the sums of the others.

        Args:
            grads: This rank's gradient of each piece.
            beta2s: Decay of the second moment of each.
            clip_factor: What every gradient is multiplied by.
        """
        for buffer in self._buffers:
            buffer.zero_()
        for piece, grad, sums in zip(self.pieces, grads, self._sums, strict=True):
            if grad.numel():
                dims = [moment.dims for moment in piece.moments]
                self._sum(grad, dims, [piece.rule.own(item.first) for item in sums])
        if self._sum is write_norms:
            torch._foreach_mul_(self._buffers, self._buffers)
        if clip_factor is not None:
            factor = clip_factor.to(self._device, self._dtype)
            for _ in range(2):  # the square of a small factor would underflow
                torch._foreach_mul_(self._buffers, factor)
        for piece, beta2, sums, mean in zip(self.pieces, beta2s, self._sums, self._means, strict=True):
            if mean is not None:
                _mean_of_rows(piece, sums[0].first, float(beta2), mean.first)
        for reduction in self._reductions:
            if reduction.is_ready:
                reduction.start()

    def finish(self, beta2s: Sequence[Scalar]) -> None:
        """Wait for the sums, and make the second moments from them."""
        for reduction in self._reductions:
            reduction.finish()
        stored, sums, decays, weights = [], [], [], []
        for piece, beta2, items in zip(self.pieces, beta2s, self._sums, strict=True):
            for moment, item in zip(piece.moments, items, strict=True):
                stored.append(moment.stored)
                sums.append(item.last)
                decays.append(float(beta2))
                weights.append((1 - float(beta2)) / moment.averaged)
        torch._foreach_mul_(stored, decays)
        torch._foreach_mul_(sums, weights)
        torch._foreach_add_(stored, sums)
        maxima = [
            (one.maximum, one.stored) for piece in self.pieces for one in piece.moments if one.maximum is not None
        ]
        for maximum, stored_moment in maxima:
            torch.maximum(maximum, stored_moment, out=maximum)
        for piece, mean in zip(self.pieces, self._means, strict=True):
            if piece.relative_rows is not None:
                _set_relative_rows(piece, None if mean is None else mean.last)

    def _allocate(
        self, wanted: Sequence[tuple[tuple[int, ...], tuple[ProcessGroup, ...]]]
    ) -> tuple[list[_Reduction], Iterator[_Item]]:
        """A buffer for each group, and one for sums that stay here; and where in them each item lies."""
        sizes: dict[ProcessGroup | None, int] = dict.fromkeys([*self._groups, None], 0)
        places = []
        for shape, groups in wanted:
            stages: list[ProcessGroup | None] = [*sorted(groups, key=self._groups.index)] or [None]
            places.append([(stage, sizes[stage]) for stage in stages])
            for stage in stages:
                sizes[stage] += math.prod(shape)
        buffers = {group: torch.zeros(size, dtype=self._dtype, device=self._device) for group, size in sizes.items()}
        self._buffers = list(buffers.values())
        reductions = {group: _Reduction(group, buffers[group]) for group in self._groups}
        items = []
        for (shape, _), place in zip(wanted, places, strict=True):
            views = [buffers[stage][start : start + math.prod(shape)].view(shape) for stage, start in place]
            for (stage, _), (following, _), source, target in zip(place, place[1:], views, views[1:], strict=False):
                reductions[cast("ProcessGroup", stage)].hand_on(source, target)
                reductions[cast("ProcessGroup", following)].is_ready = False
            items.append(_Item(views[0], views[-1]))
        return list(reductions.values()), iter(items)


class _Reduction:
    """The all-reduce of one process group."""

    def __init__(self, group: ProcessGroup, buffer: Tensor) -> None:
        self.is_ready = True
        self._group, self._buffer = group, buffer
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._work: Work | None = None

    def hand_on(self, source: Tensor, target: Tensor) -> None:
        """Have sums copied to the buffer of the group that adds to them next."""
        self._sources.append(source)
        self._targets.append(target)

    def start(self) -> None:
        self._work = torch.distributed.all_reduce(self._buffer, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait for the sums, having sent for them if what they wait for has come only now."""
        if self._work is None:
            self.start()
        assert self._work is not None
        self._work.wait()
        self._work = None
        if self._sources:
            torch._foreach_copy_(self._targets, self._sources)


def write_norms(grad: Tensor, averaged_dims: Sequence[Dims], targets: Sequence[Tensor]) -> None:
    """Write the roots of what :func:`add_squares` adds; one launch for each, and no memory."""
    for dims, target in zip(averaged_dims, targets, strict=True):
        torch.linalg.vector_norm(grad, dim=dims, keepdim=True, dtype=target.dtype, out=target)


def add_squares(grad: Tensor, averaged_dims: Sequence[Dims], targets: Sequence[Tensor]) -> None:
    """Add the sums of ``grad**2`` over each set of dimensions, by blocks that are read from memory once.

    Args:
        grad: Real, with elements, of at least one dimension.
        averaged_dims: The dimensions of each sum.
        targets: What it is added to, with size 1 in them.
    """
    count = grad.shape[0]
    in_a_row = grad.numel() // count
    if in_a_row > BLOCK_ELEMENTS and grad.dim() > 1:
        inner = [tuple(dim - 1 for dim in dims if dim) for dims in averaged_dims]
        for index in range(count):
            places = [target[0 if 0 in dims else index] for dims, target in zip(averaged_dims, targets, strict=True)]
            add_squares(grad[index], inner, places)
        return
    rows = max(1, BLOCK_ELEMENTS // in_a_row)
    for start in range(0, count, rows):
        block = grad[start : start + rows].to(targets[0].dtype).square()
        for dims, target in zip(averaged_dims, targets, strict=True):
            place = target if 0 in dims else target[start : start + rows]
            place.add_(block.sum(dims, keepdim=True) if dims else block)


def _mean_shape(piece: SharedPiece) -> tuple[int, ...]:
    """Shape of the mean of a factored piece's rows."""
    (row_dim,) = piece.moments[1].dims
    return reduced_shape(tuple(piece.moments[0].stored.shape), (row_dim,))


def _mean_of_rows(piece: SharedPiece, sums: Tensor, beta2: float, target: Tensor) -> None:
    """This rank's share of the mean of the rows after the step, which is linear in rows before it and in squares."""
    rows, columns = piece.moments
    old = rows.stored.sum(columns.dims, keepdim=True).mul_(beta2 / (columns.averaged * piece.replicas))
    new = sums.sum(columns.dims, keepdim=True)
    torch.add(old, new, alpha=(1 - beta2) / (columns.averaged * rows.averaged), out=target)


def _set_relative_rows(piece: SharedPiece, mean: Tensor | None) -> None:
    rows, columns = piece.moments
    assert piece.relative_rows is not None
    if mean is None:
        mean = rows.stored.mean(columns.dims, keepdim=True)
    torch.div(rows.stored, mean.clamp_min(torch.finfo(mean.dtype).tiny), out=piece.relative_rows)


def _is_same(one: object, other: object) -> bool:
    return one is other
