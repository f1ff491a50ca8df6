"""Which Triton kernel takes a tensor, and as what shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from ..interface import Dims
from ..layout import Rows, geometry_of, layout

Kind = Literal["full", "rows", "columns", "spread"]

ROWS_IN_ONE_PROGRAM = 1 << 14
"""Longer rows than this, where there are few, are shared out among programs."""
FEW = 128
"""Programs below which a tensor would leave most of a device idle."""
LONGEST_STRIP = 1 << 12
STRIP = 32
"""Columns that a program of ``update_columns`` does."""
RUN = 128
"""How a long run is folded for its sum: as rows of so many elements."""
MOMENTUM_BLOCK = 256


class Geometry(NamedTuple):
    """How a kernel sees a tensor.

    Attributes:
        kind: Which kernel: ``"spread"`` is what sums first and steps in a second launch.
        pre: Slices.
        red: Rows of a slice (elements of a row for ``"rows"``).
        post: Elements of a row.
        pitch: Elements from one row to the next.
        slice_count: Elements of a slice.
        width: Elements that share a second moment by row.
        by_row: Whether second moments are kept by row,
        by_column: and whether by column. Both: factored.
    """

    kind: Kind
    pre: int
    red: int
    post: int
    pitch: int
    slice_count: int
    width: int
    by_row: bool
    by_column: bool

    @property
    def is_aligned(self) -> bool:
        """Whether rows begin at multiples of 16 elements, whatever is loaded 16 bytes at a time."""
        inner = self.red if self.kind == "rows" else self.post
        flat = self.kind in ("full", "spread") and self.pitch == self.post
        return flat or (inner % 16 == 0 and self.pitch % 16 == 0)

    @property
    def slice_pitch(self) -> int:
        """Elements from one slice to the next."""
        folded = self.kind == "spread" and not self.by_column
        return self.slice_count if folded else self.red * self.pitch

    @property
    def is_summed_aligned(self) -> bool:
        """The same where ``"spread"`` sums by rows and columns of a slice."""
        return all(size % 16 == 0 for size in (self.post, self.pitch, self.slice_pitch))

    @property
    def is_pitched(self) -> bool:
        """Whether there are gaps between rows."""
        return self.pitch != (self.red if self.kind == "rows" else self.post)


def geometry(
    param: Tensor, averaged_dims: Sequence[Dims], codes: bool = False, precomputed: bool = False
) -> Geometry | None:
    """How the kernels see a parameter, or None if none of them can take it.

    Args:
        param: A real parameter, or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.
        codes: Whether its first moment is kept as 8-bit codes.
        precomputed: Its second moments are made already, and only read.
    """
    if codes and not param.is_contiguous():
        return None
    if len(averaged_dims) == 1 and all(param.shape[dim] == 1 for dim in averaged_dims[0]):
        averaged_dims = ((),)
    found = _three_dimensional(param, averaged_dims)
    if found is None:
        return None
    pre, red, post, pitch = found
    if len(averaged_dims) == 2:
        return Geometry("spread", pre, red, post, pitch, red * post, post, True, True)
    if precomputed:
        return _given(averaged_dims[0], pre, red, post, pitch)
    if not any(averaged_dims):
        return Geometry("full", pre, red, post, pitch, red * post, post, False, False)
    if post == 1:
        return _rows(pre, red, pitch if pitch != post else red, codes)
    strips = pre * -(-post // STRIP)
    if codes or (strips < FEW and red > LONGEST_STRIP):
        return Geometry("spread", pre, red, post, pitch, red * post, post, False, True)
    return Geometry("columns", pre, red, post, pitch, red * post, post, False, True)


def _given(dims: Dims, pre: int, red: int, post: int, pitch: int) -> Geometry:
    """What only takes the step: one number for each element, each row or each column."""
    if not dims:
        return Geometry("spread", pre * red, 1, post, pitch, post, post, False, True)
    if post == 1:
        return Geometry("spread", pre, 1, red, pitch if pitch != post else red, red, red, True, False)
    return Geometry("spread", pre, red, post, pitch, red * post, post, False, True)


def _rows(pre: int, red: int, pitch: int, codes: bool) -> Geometry | None:
    shared_out = pre < FEW and red > ROWS_IN_ONE_PROGRAM and pitch == red
    if shared_out or (codes and red % MOMENTUM_BLOCK):
        return Geometry("spread", pre, -(-red // RUN), RUN, RUN, red, red, True, False)
    return Geometry("rows", pre, red, 1, pitch, red, red, True, False)


def _three_dimensional(param: Tensor, dims: Sequence[Dims]) -> tuple[int, int, int, int] | None:
    """``pre, red, post`` and the pitch of rows; for ``"rows"`` the pitch is that of the rows of ``red`` elements."""
    if len(dims) == 2:
        (row_dim,) = dims[1]
        shape = param.shape
        whole = math.prod(shape[:row_dim]), shape[row_dim], math.prod(shape[row_dim + 1 :])
        return _with_pitch(param, *whole)
    if not _has_holes(param):
        found = layout(param, dims[0])
        if found is None:
            return None
        if not any(dims):
            return 1, 1, param.numel(), param.numel()
        return found.pre, found.red, found.post, found.post
    with_gaps = geometry_of(param, dims)
    if with_gaps is None:
        return None
    _, pre, red, post, pitch = with_gaps
    return (pre, red, post, pitch) if any(dims) else (1, pre, post, pitch)


def _with_pitch(param: Tensor, pre: int, red: int, post: int) -> tuple[int, int, int, int] | None:
    if param.is_contiguous():
        return pre, red, post, post
    rows = Rows.of(param.shape, param.stride())
    return None if rows is None or rows.width != post else (pre, red, post, rows.pitch)


def _has_holes(param: Tensor) -> bool:
    return layout(param, ()) is None
