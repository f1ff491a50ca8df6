"""The table of a launch: one row for each tensor, and how kernels read it."""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of a table: one row of int64 for each tensor.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SCALE = tl.constexpr(3)
ROWS_SQ = tl.constexpr(4)  # second moment by row, or in full
COLUMNS_SQ = tl.constexpr(5)  # second moment by column
ROWS_MAX = tl.constexpr(6)
COLUMNS_MAX = tl.constexpr(7)
STEP = tl.constexpr(8)
PRE = tl.constexpr(9)
RED = tl.constexpr(10)
POST = tl.constexpr(11)
PITCH = tl.constexpr(12)  # elements from one row of the parameter to the next
SEED = tl.constexpr(13)
ROW_SUMS = tl.constexpr(14)  # scratch
COLUMN_SUMS = tl.constexpr(15)  # scratch
ROW_MEANS = tl.constexpr(16)  # scratch
SLICE_PITCH = tl.constexpr(17)  # elements from one of the ``pre`` slices to the next
SLICE_COUNT = tl.constexpr(18)  # elements of a slice
WIDTH = tl.constexpr(19)  # elements that share a second moment by row
CORRECTIONS = tl.constexpr(20)  # where the corrections of its step lie
FIELDS = tl.constexpr(21)


@triton.jit
def field(row, FIELD: tl.constexpr):
    """Return one number of a tensor's row of the table.

    Args:
        row: The tensor's row of the table.
        FIELD: The field.
    """
    return tl.load(row + FIELD)


@triton.jit
def size(row, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a size or pitch in a tensor's row of the table; ``ALIGNED``: a multiple of 16 elements.

    Args:
        row: The tensor's row of the table.
        FIELD: The field.
        ALIGNED: Whether addresses and sizes are multiples of 16.
    """
    value = tl.load(row + FIELD)
    if ALIGNED:
        # Here and not in a caller: up to Triton 3.7 a caller's tl.multiple_of is lost when this call is inlined.
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def pointer(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address in a tensor's row of the table; ``ALIGNED``: a multiple of 16 bytes.

    Args:
        row: The tensor's row of the table.
        FIELD: The field.
        DTYPE: Precision of the elements there.
        ALIGNED: Whether addresses and sizes are multiples of 16.
    """
    address = tl.load(row + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def work(table, programs):
    """Return the row of the tensor that this program is for, and the number of its tile.

    Args:
        table: The table.
        programs: Pairs of a row and the number of a tile, one for each program.
    """
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    return table + tl.load(program).to(tl.int64) * FIELDS, tl.load(program + 1).to(tl.int64)
