"""Bucketed all-reduce of averages over several ranks: one collective per process group and step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import SharedPart
from slimadam.kernels.interface import Dims, Scalar
from slimadam.state.second_moment import reduced_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


BLOCK_ELEMENTS = 1 << 18
"""Elements squared at a time on a CPU, so that they stay in cache."""


class _Item(NamedTuple):
    """Numbers to sum: this rank's share is written to ``first``, and the sum over all ranks is in ``last`` then."""

    first: Tensor
    last: Tensor


class BucketedAllReduce:
    """The sums over ranks for every shared part of a step. Its memory is allocated once.

    Args:
        parts: The parts, in the same order on every rank.
    """

    def __init__(self, parts: Sequence[SharedPart]) -> None:
        self._parts = list(parts)
        moments = [moment for part in parts for moment in part.moments]
        self._dtype = reduce(torch.promote_types, (moment.stored.dtype for moment in moments))
        self._device = moments[0].stored.device
        self._sum = add_squares if self._device.type == "cpu" else write_norms
        wanted: list[tuple[tuple[int, ...], Sequence[ProcessGroup]]] = []
        for part in parts:
            wanted += [(tuple(moment.stored.shape), moment.groups) for moment in part.moments]
            if part.row_groups:
                rows, columns = part.moments
                shape = reduced_shape(tuple(rows.stored.shape), columns.dims)
                wanted.append((shape, list(dict.fromkeys([*rows.groups, *part.row_groups]))))
        items = self._allocate(wanted)
        self._sums: list[list[_Item]] = []
        self._means: list[_Item | None] = []
        for part in parts:
            self._sums.append([next(items) for _ in part.moments])
            self._means.append(next(items) if part.row_groups else None)

    def _allocate(self, wanted: Sequence[tuple[tuple[int, ...], Sequence[ProcessGroup]]]) -> Iterator[_Item]:
        """Allocate a buffer for each group and one for sums that stay here, and return where each item lies in them."""
        order = list(dict.fromkeys(group for _, groups in wanted for group in groups))
        sizes: dict[ProcessGroup | None, int] = dict.fromkeys([*order, None], 0)
        places = []
        for shape, groups in wanted:
            stages: list[ProcessGroup | None] = [*sorted(groups, key=order.index)] or [None]
            places.append([(stage, sizes[stage]) for stage in stages])
            for stage in stages:
                sizes[stage] += math.prod(shape)
        buffers = {group: torch.zeros(size, dtype=self._dtype, device=self._device) for group, size in sizes.items()}
        reductions: dict[ProcessGroup | None, _Reduction] = {
            group: _Reduction(group, buffers[group]) for group in order
        }
        items = []
        for (shape, _), place in zip(wanted, places, strict=True):
            views = [buffers[stage][start : start + math.prod(shape)].view(shape) for stage, start in place]
            for number, (source, target) in enumerate(pairwise(views)):
                reductions[place[number][0]].sources.append(source)
                reductions[place[number][0]].targets.append(target)
                reductions[place[number + 1][0]].is_ready = False
            items.append(_Item(views[0], views[-1]))
        self._buffers = list(buffers.values())
        self._reductions = list(reductions.values())
        return iter(items)

    def holds(self, parts: Sequence[SharedPart]) -> bool:
        """Return whether the parts are those that it was made for."""
        return len(parts) == len(self._parts) and all(map(is_, parts, self._parts))

    def start(self, grads: Sequence[Tensor], beta2s: Sequence[Scalar], clip_factor: Tensor | None = None) -> None:
        """Sum this rank's squares, and start the all-reduces.

        Args:
            grads: This rank's gradient of each part.
            beta2s: Decay of the second moment of each part.
            clip_factor: Factor of every gradient.
        """
        for buffer in self._buffers:
            buffer.zero_()
        for part, grad, sums in zip(self._parts, grads, self._sums, strict=True):
            if grad.numel():
                dims = [moment.dims for moment in part.moments]
                self._sum(grad, dims, [part.rule.own(item.first) for item in sums])
        if self._sum is write_norms:
            torch._foreach_mul_(self._buffers, self._buffers)
        if clip_factor is not None:
            factor = clip_factor.to(self._device, self._dtype)
            for _ in range(2):  # the square of a small factor would underflow
                torch._foreach_mul_(self._buffers, factor)
        for part, beta2, sums, mean in zip(self._parts, beta2s, self._sums, self._means, strict=True):
            if mean is not None:
                _mean_of_rows(part, sums[0].first, float(beta2), mean.first)
        for reduction in self._reductions:
            if reduction.is_ready:
                reduction.start()

    def finish(self, beta2s: Sequence[Scalar]) -> None:
        """Wait for the sums, and update the second moments with them; ``beta2s`` as in :meth:`start`."""
        for reduction in self._reductions:
            reduction.finish()
        stored, sums, decays, weights = [], [], [], []
        for part, beta2, items in zip(self._parts, beta2s, self._sums, strict=True):
            for moment, item in zip(part.moments, items, strict=True):
                stored.append(moment.stored)
                sums.append(item.last)
                decays.append(float(beta2))
                weights.append((1 - float(beta2)) / moment.averaged)
        torch._foreach_mul_(stored, decays)
        torch._foreach_mul_(sums, weights)
        torch._foreach_add_(stored, sums)
        for part, mean in zip(self._parts, self._means, strict=True):
            for moment in part.moments:
                if moment.maximum is not None:
                    torch.maximum(moment.maximum, moment.stored, out=moment.maximum)
            if part.relative_rows is not None:
                rows, columns = part.moments
                total = rows.stored.mean(columns.dims, keepdim=True) if mean is None else mean.last
                torch.div(rows.stored, total.clamp_min(torch.finfo(total.dtype).tiny), out=part.relative_rows)


class _Reduction:
    """The all-reduce of one process group.

    Attributes:
        sources: Sums to copy for the next group, which adds to them.
        targets: Their places in the next group's buffer.
        is_ready: False if it waits for the sums of another group.
    """

    def __init__(self, group: ProcessGroup, buffer: Tensor) -> None:
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.is_ready = True
        self._group, self._buffer = group, buffer
        self._work: Work | None = None

    def start(self) -> None:
        self._work = torch.distributed.all_reduce(self._buffer, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait for the sums, after starting now if the all-reduce was not ready before."""
        if self._work is None:
            self.start()
        assert self._work is not None
        self._work.wait()
        self._work = None
        if self.sources:
            torch._foreach_copy_(self.targets, self.sources)


def write_norms(grad: Tensor, averaged_dims: Sequence[Dims], targets: Sequence[Tensor]) -> None:
    """Write the roots of the sums that :func:`add_squares` adds; one launch for each, and no memory.

    Args:
        grad: As in :func:`add_squares`.
        averaged_dims: As in :func:`add_squares`.
        targets: The tensors to write to, with size 1 in the averaged dimensions.
    """
    for dims, target in zip(averaged_dims, targets, strict=True):
        torch.linalg.vector_norm(grad, dim=dims, keepdim=True, dtype=target.dtype, out=target)


def add_squares(grad: Tensor, averaged_dims: Sequence[Dims], targets: Sequence[Tensor]) -> None:
    """Add the sums of ``grad**2`` over each set of dimensions, by blocks that are read from memory once.

    Args:
        grad: Real, with elements, of at least one dimension.
        averaged_dims: The dimensions of each sum.
        targets: The tensors to add to, with size 1 in the averaged dimensions.
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


def _mean_of_rows(part: SharedPart, sums: Tensor, beta2: float, target: Tensor) -> None:
    """Write this rank's share of the mean of the new rows, which is linear in the old rows and in the squares."""
    rows, columns = part.moments
    old = rows.stored.sum(columns.dims, keepdim=True).mul_(beta2 / (columns.averaged * part.replicas))
    new = sums.sum(columns.dims, keepdim=True)
    torch.add(old, new, alpha=(1 - beta2) / (columns.averaged * rows.averaged), out=target)
