"""The choice of a Triton kernel for a tensor, and the shape in which it sees the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from ..interface import Dims
from ..layout import layout

Kind = Literal["full", "rows", "spread"]

ROWS_IN_ONE_PROGRAM = 1 << 14
"""Rows longer than this, where there are few, are shared out among programs."""
FEW = 128
"""Programs below which a tensor would leave most of a device idle."""
RUN = 128
"""Elements of a row into which a long run is folded for its sum."""
MOMENTUM_BLOCK = 256


class Tiling(NamedTuple):
    """The kernel for a tensor, and the sizes that it works with.

    Attributes:
        kind: The kernel; with ``"spread"`` programs share their sums.
        pre: Number of slices.
        red: Number of rows in a slice (elements of a row for ``"rows"``).
        post: Number of elements in a row.
        pitch: Number of elements from one row to the next.
        slice_count: Number of elements in a slice.
        width: Number of elements that share a second moment by row.
        by_row: True if second moments are kept by row.
        by_column: True if second moments are kept by column; both are true if factored.
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
    def slice_pitch(self) -> int:
        """Number of elements from one slice to the next."""
        folded = self.kind == "spread" and not self.by_column
        return self.slice_count if folded else self.red * self.pitch

    @property
    def is_pitched(self) -> bool:
        """True if there are gaps between rows."""
        return self.pitch != (self.red if self.kind == "rows" else self.post)


def tiling(
    param: Tensor, averaged_dims: Sequence[Dims], codes: bool = False, precomputed: bool = False
) -> Tiling | None:
    """Return the tiling of a parameter, or None if no kernel supports it.

    Args:
        param: A real parameter, or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.
        codes: True if its first moment is kept as 8-bit codes.
        precomputed: True if its second moments are computed already, and only read.
    """
    if codes and not param.is_contiguous():
        return None
    if len(averaged_dims) == 1 and all(param.shape[dim] == 1 for dim in averaged_dims[0]):
        averaged_dims = ((),)
    found = layout(param, averaged_dims)
    if found is None:
        return None
    _, pre, red, post, pitch = found
    if len(averaged_dims) == 2:
        return Tiling("spread", pre, red, post, pitch, red * post, post, True, True)
    if not any(averaged_dims):
        if pitch == post:
            pre, post, pitch = 1, pre * post, pre * post
        # A precomputed one is read as a second moment by column, of slices of one row.
        slices = (pre, 1) if precomputed else (1, pre)
        return Tiling(
            "spread" if precomputed else "full", *slices, post, pitch, slices[1] * post, post, False, precomputed
        )
    if post == 1 and precomputed:
        return Tiling("spread", pre, 1, red, pitch, red, red, True, False)
    if post == 1:
        shared_out = pre < FEW and red > ROWS_IN_ONE_PROGRAM and pitch == red
        if shared_out or (codes and red % MOMENTUM_BLOCK):
            return Tiling("spread", pre, -(-red // RUN), RUN, RUN, red, red, True, False)
        return Tiling("rows", pre, red, 1, pitch, red, red, True, False)
    return Tiling("spread", pre, red, post, pitch, red * post, post, False, True)
