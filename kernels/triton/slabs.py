"""The work of ``update_spread``: its division into slabs, and the order in which programs take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import kernels
from .tiling import Tiling

SLAB_BYTES = 10 << 20
"""Gradients of a slab: those of three stay in a cache of 40 MB, an A100's. Where it is smaller, they are read twice."""
SUM_LINES, SUM_COLUMNS = 64, 128
"""Size of a tile of sums; columns must be a multiple of ``RUN`` and divide 256."""
TILES = 8
"""Tiles that a program updates."""
FINISHED_AT_ONCE = 1024
"""Second moments by row, or numbers of a slice, that a program finishes at a time."""
IN_ROWS_FROM = 1 << 10
"""Row length from which lines of 256 elements of one row each waste less than dividing for each element costs."""


def is_in_rows(tiling: Tiling, codes: bool) -> bool:
    """Return whether a tensor is updated in lines of up to 256 elements of one row each.

    Args:
        tiling: Its tiling.
        codes: True if its first moment is kept as 8-bit codes, in blocks that may span two rows.
    """
    return tiling.width % 256 == 0 or (tiling.width >= IN_ROWS_FROM and not codes)


class Slab(NamedTuple):
    """Slices of a tensor, or a strip of the columns of one, that is summed as a whole before it is updated.

    Attributes:
        tensor: Number of the tensor in the table.
        tiling: Its tiling.
        first_slice: Number of the first slice.
        slices: Number of slices.
        first_column: Number of the first column, a multiple of 256.
        columns: Number of columns, ``tiling.width`` for all of them.
    """

    tensor: int
    tiling: Tiling
    first_slice: int
    slices: int
    first_column: int
    columns: int

    def programs(self, lines: int, in_rows: bool) -> tuple[int, int, int, int]:
        """Return the number of programs of each stage.

        Args:
            lines: Lines of 256 elements that a program updates.
            in_rows: True if a line holds elements of one row alone.
        """
        found = self.tiling
        summed = found.post if self.columns == found.width else self.columns
        sums = self.slices * ceil(found.red, SUM_LINES) * ceil(summed, SUM_COLUMNS)
        by_row = ceil(self.slices * found.red, FINISHED_AT_ONCE) if found.by_row else 0
        by_column = ceil(self.slices * self.columns, kernels.COLUMNS_FINISHED.value)
        finish = by_row + by_column if found.by_column else 0
        elements = self.slices * found.slice_count
        if in_rows:
            updates = ceil(elements // found.width * ceil(self.columns, 256), lines * TILES)
        else:
            updates = ceil(elements, lines * TILES * 256)
        return sums, finish, self.slices if found.by_row else 0, updates


def slabs(tensor: int, tiling: Tiling, in_rows: bool, itemsize: int) -> Iterator[Slab]:
    """Yield the slabs of a tensor, of at most :data:`SLAB_BYTES` where its averages allow it.

    Args:
        tensor: Its number in the table.
        tiling: Its tiling.
        in_rows: True if a line of 256 elements holds elements of one row alone.
        itemsize: Bytes of an element of the gradient.
    """
    slice_bytes = tiling.slice_count * itemsize
    if slice_bytes > SLAB_BYTES and in_rows and not tiling.by_row:
        strip = max(SLAB_BYTES // (tiling.red * itemsize) // 256, 1) * 256
        for number in range(tiling.pre):
            for column in range(0, tiling.width, strip):
                yield Slab(tensor, tiling, number, 1, column, min(strip, tiling.width - column))
        return
    # Elsewhere tiles begin at multiples of 256 elements, wherever slices do.
    several = max(SLAB_BYTES // slice_bytes, 1) if in_rows else tiling.pre
    for first in range(0, tiling.pre, several):
        yield Slab(tensor, tiling, first, min(several, tiling.pre - first), 0, tiling.width)


def work(tensors: Sequence[tuple[int, Tiling]], lines: int, in_rows: bool, itemsize: int) -> tuple[Tensor, int]:
    """Return int32 ``[programs, PROGRAM]``, what each program does in the order in which they start, and the slabs.

    While one batch of slabs is summed, the second moments of the batch before it are finished, and then that before
    is updated: what a program waits for was begun long before, and gradients are read again soon.

    Args:
        tensors: The number of each tensor in the table, and its tiling.
        lines: Lines of 256 elements that a program updates.
        in_rows: True if a line holds elements of one row alone.
        itemsize: Bytes of an element of the gradients.
    """
    found = [slab for number, tiling in tensors for slab in slabs(number, tiling, in_rows, itemsize)]
    stages = [_stages(slab, number, lines, in_rows) for number, slab in enumerate(found)]
    ordered: list[Tensor] = []
    batches = [*_batches(found, itemsize), [], []]
    before: list[int] = []
    last: list[int] = []
    for batch in batches:
        ordered += [stages[number][kernels.FINISH.value] for number in last]
        ordered += [stages[number][kernels.SUM.value] for number in batch]
        ordered += [stages[number][kernels.FINISH_SLICE.value] for number in last]
        ordered += [stages[number][kernels.UPDATE.value] for number in before]
        before, last = last, batch
    return torch.cat(ordered), len(found)


def updates(tensors: Iterable[tuple[int, Tiling]], lines: int, in_rows: bool) -> Tensor:
    """Return int32 ``[programs, PROGRAM]`` for tensors whose second moments are finished.

    Args:
        tensors: As for :func:`work`.
        lines: As for :func:`work`.
        in_rows: As for :func:`work`.
    """
    whole = [Slab(number, tiling, 0, tiling.pre, 0, tiling.width) for number, tiling in tensors]
    return torch.cat([_stages(slab, 0, lines, in_rows)[kernels.UPDATE.value] for slab in whole])


def _batches(found: Sequence[Slab], itemsize: int) -> Iterator[list[int]]:
    batch, size = [], 0
    for number, slab in enumerate(found):
        batch.append(number)
        size += slab.slices * slab.tiling.slice_count // slab.tiling.width * slab.columns * itemsize
        if size >= SLAB_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _stages(slab: Slab, number: int, lines: int, in_rows: bool) -> list[Tensor]:
    """Return the programs of each stage, which wait for all of the stages before."""
    stages, awaited = [], 0
    columns = 0 if slab.columns == slab.tiling.width else slab.columns
    place = [slab.first_slice, slab.slices, slab.first_column, columns, number]
    for stage, count in enumerate(slab.programs(lines, in_rows)):
        programs = torch.tensor([slab.tensor, stage, 0, awaited, *place], dtype=torch.int32, device="cpu")
        programs = programs.repeat(count, 1)
        programs[:, 2] = torch.arange(count, device="cpu")
        stages.append(programs)
        awaited += count
    return stages


def ceil(count: int, size: int) -> int:
    """Return the number of pieces of a size that hold a count.

    Args:
        count: The count.
        size: The size.
    """
    return -(-count // size)
