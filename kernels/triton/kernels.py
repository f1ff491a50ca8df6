"""Triton kernels of the update. Each works on a table of tensors, one launch for all of them.

A second moment averaged over adjacent dimensions is a reduction over the middle of a view ``[pre, red, post]``.
``update_rows`` (``post == 1``) and ``update_columns`` do everything in one launch. What is factored, or too long for
one program, goes through ``sum_squares``, ``finish_sums`` and ``update_spread``. The plain reference of all of them is
``reference_update``, whose order of operations they keep.

Numbers that are Python floats arrive as the bits of a float64, because Triton would pass a float32; those that are
tensors arrive as pointers, so that the host never waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    denominator_of,
    gradient,
    is_skipped,
    load,
    next_second_moment,
    number,
    step_numbers,
    update_tile,
)
from .table import (
    COLUMN_SUMS,
    COLUMNS_MAX,
    COLUMNS_SQ,
    GRAD,
    PITCH,
    POST,
    PRE,
    RED,
    ROW_MEANS,
    ROW_SUMS,
    ROWS_MAX,
    ROWS_SQ,
    SLICE_COUNT,
    SLICE_PITCH,
    WIDTH,
    field,
    pointer,
    size,
    work,
)


@triton.jit(do_not_specialize=["beta1", "beta2"])
def advance_steps(
    addresses, count, corrections, beta1, beta2, found_inf, STEP_DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Count a step of each parameter, and write its bias corrections.

    Args:
        addresses: Addresses of the step counts, int64 ``[count]``.
        corrections: float64 ``[count, 2]``; receives ``1 - beta1**t`` and ``sqrt(1 - beta2**t)``.
        found_inf: None, or a number that leaves the counts as they are unless it is zero.
        count, beta1, beta2, STEP_DTYPE, BLOCK: Their number, the decays, their precision, and counts in a program.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = index < count
    address = tl.load(addresses + index, mask=known, other=0).to(tl.pointer_type(STEP_DTYPE))
    step = tl.load(address, mask=known, other=0)
    if found_inf is None:
        step += 1
    else:
        step += tl.where(tl.load(found_inf) != 0, 0, 1)
    tl.store(address, step, mask=known)
    count_left = step.to(tl.int64)
    first = tl.zeros((BLOCK,), tl.float64) + number(beta1)
    second = tl.zeros((BLOCK,), tl.float64) + number(beta2)
    power1 = tl.zeros((BLOCK,), tl.float64) + 1
    power2 = tl.zeros((BLOCK,), tl.float64) + 1
    for _ in range(32):
        odd = (count_left & 1) == 1
        power1 = tl.where(odd, power1 * first, power1)
        power2 = tl.where(odd, power2 * second, power2)
        first *= first
        second *= second
        count_left = count_left >> 1
    tl.store(corrections + 2 * index, 1 - power1, mask=known)
    tl.store(corrections + 2 * index + 1, tl.sqrt(1 - power2), mask=known)


@triton.jit
def _full_tile(
    row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ROUNDS: tl.constexpr, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    flat = start + tl.arange(0, LINES)[:, None] * 256 + tl.arange(0, 256)[None, :]
    blocks = start // 256 + tl.arange(0, LINES)[:, None]
    mask = flat < count if MASKED else None
    block_mask = blocks * 256 < count if MASKED else None
    offsets = flat
    if PITCHED:
        width = field(row, POST)
        offsets = flat // width * field(row, PITCH) + flat % width
    grads = pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    grad = gradient(load(grads + offsets, mask), grad_scale, MAXIMIZE, COMPUTE)
    second = next_second_moment(row, ROWS_SQ, ROWS_MAX, flat, mask, grad * grad, beta2, COMPUTE, AMSGRAD, ALIGNED,
                                False)  # fmt: skip
    denominator = denominator_of(second, root, eps, COMPUTE)
    update_tile(row, grad, denominator, offsets, mask, blocks, block_mask, decay, step_size, beta1,
           PARAM_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, ROUNDS, ALIGNED, LINES, 256)  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_full(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ROUNDS: tl.constexpr, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Update tensors with a second moment for every element, in tiles of ``[LINES, 256]`` consecutive elements.

    Args:
        table, programs: int64 ``[tensors, FIELDS]``, and int32 ``[programs, 2]`` of a tensor and the number of a tile.
        lr, beta1, beta2, eps, weight_decay: Hyperparameters, as bits or pointers.
        grad_scale, found_inf: None or pointers: what gradients are divided by, and not zero to skip the step.
        PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, STEP_DTYPE: Precisions of what the table points to.
        COMPUTE: Precision of the arithmetic and of second moments.
        AMSGRAD, MAXIMIZE, ROUNDS: Flags of the step; ``ROUNDS`` for stochastic rounding.
        PITCHED, ALIGNED: There are gaps between rows; addresses and rows are multiples of 16 bytes.
        LINES: Lines of 256 elements of a tile.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    start = part * (LINES * 256)
    count = field(row, PRE) * field(row, RED) * field(row, POST)
    decay, step_size, root = step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = number(beta1), number(beta2), number(eps)
    if start + LINES * 256 <= count:
        _full_tile(row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                   ROUNDS, PITCHED, ALIGNED, LINES, False)  # fmt: skip
    else:
        _full_tile(row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                   ROUNDS, PITCHED, ALIGNED, LINES, True)  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_rows(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update tensors with one second moment for each row of ``[pre, red]``; a program does ``LINES`` rows.

    Args:
        WHOLE: No row is longer than ``COLUMNS``: the gradient is read once and stays in registers. Longer rows are
            read again from cache.
        LINES, COLUMNS: Size of a tile. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    decay, step_size, root = step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = number(beta1), number(beta2), number(eps)
    red, pitch = size(row, RED, ALIGNED), size(row, PITCH, ALIGNED)
    line = part * LINES + tl.arange(0, LINES)
    inside = line < field(row, PRE)
    first = line[:, None] * pitch
    column = tl.arange(0, COLUMNS)[None, :]
    block = tl.arange(0, COLUMNS // 256 if MOMENT_DTYPE == tl.int8 else 1)[None, :]
    grads = pointer(row, GRAD, GRAD_DTYPE, ALIGNED)

    mask = inside[:, None] & (column < red)
    grad = gradient(tl.load(grads + first + column, mask=mask, other=0), grad_scale, MAXIMIZE, COMPUTE)
    squares = grad * grad
    if not WHOLE:
        for start in range(COLUMNS, red, COLUMNS):
            loaded = tl.load(grads + first + start + column, mask=inside[:, None] & (start + column < red), other=0)
            more = gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
            squares += more * more
    second = next_second_moment(row, ROWS_SQ, ROWS_MAX, line, inside, tl.sum(squares, axis=1) / red.to(COMPUTE), beta2,
                                COMPUTE, AMSGRAD, False, True)  # fmt: skip
    denominator = denominator_of(second, root, eps, COMPUTE)[:, None] + tl.zeros((LINES, COLUMNS), COMPUTE)

    update_tile(row, grad, denominator, first + column, mask, line[:, None] * (red // 256) + block,
           inside[:, None] & (block * 256 < red), decay, step_size, beta1,
           PARAM_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, ROUNDS, ALIGNED, LINES, COLUMNS)  # fmt: skip
    if not WHOLE:
        for start in range(COLUMNS, red, COLUMNS):
            mask = inside[:, None] & (start + column < red)
            offsets = first + start + column
            grad = gradient(load(grads + offsets, mask), grad_scale, MAXIMIZE, COMPUTE)
            here = start // 256 + block
            update_tile(row, grad, denominator, offsets, mask, line[:, None] * (red // 256) + here,
                   inside[:, None] & (here * 256 < red), decay, step_size, beta1,
                   PARAM_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, ROUNDS, ALIGNED, LINES, COLUMNS)  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_columns(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update tensors with one second moment for each column of ``[red, post]``; a program does a strip of columns.

    The strip's gradient is read twice, the second time from cache: launch settings keep the strips that are under
    work at the same time small enough for it.

    Args:
        LINES, COLUMNS: Rows read at a time, and columns of the strip. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    decay, step_size, root = step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = number(beta1), number(beta2), number(eps)
    red, post, pitch = field(row, RED), size(row, POST, ALIGNED), size(row, PITCH, ALIGNED)
    strips = (post + COLUMNS - 1) // COLUMNS
    slice_index = part // strips
    column = (part % strips) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < post
    line = tl.arange(0, LINES)[:, None]
    first = slice_index * red * pitch + line * pitch + column[None, :]
    grads = pointer(row, GRAD, GRAD_DTYPE, ALIGNED)

    squares = tl.zeros((LINES, COLUMNS), COMPUTE)
    for start in range(0, red, LINES):
        mask = (start + line < red) & inside[None, :]
        loaded = tl.load(grads + first + start * pitch, mask=mask, other=0, eviction_policy="evict_last")
        grad = gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
        squares += grad * grad
    second = next_second_moment(row, COLUMNS_SQ, COLUMNS_MAX, slice_index * post + column, inside,
                                tl.sum(squares, axis=0) / red.to(COMPUTE), beta2, COMPUTE, AMSGRAD, False,
                                True)  # fmt: skip
    denominator = denominator_of(second, root, eps, COMPUTE)[None, :] + tl.zeros((LINES, COLUMNS), COMPUTE)

    for start in range(0, red, LINES):
        mask = (start + line < red) & inside[None, :]
        offsets = first + start * pitch
        grad = gradient(load(grads + offsets, mask), grad_scale, MAXIMIZE, COMPUTE)
        update_tile(row, grad, denominator, offsets, mask, None, None, decay, step_size, beta1,
               PARAM_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, ROUNDS, ALIGNED, LINES, COLUMNS)  # fmt: skip


@triton.jit
def sum_squares(
    table, programs, grad_scale, found_inf,
    GRAD_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the squared gradients of one tile of ``[red, post]``, by row and by column, into scratch memory.

    Scratch of a tensor: ``[pre * red, column tiles]`` sums by row, ``[pre, row tiles, post]`` sums by column.

    Args:
        LINES, COLUMNS: Size of a tile. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    red, post, pitch = field(row, RED), size(row, POST, ALIGNED), size(row, PITCH, ALIGNED)
    slice_pitch = size(row, SLICE_PITCH, ALIGNED)
    row_tiles, column_tiles = (red + LINES - 1) // LINES, (post + COLUMNS - 1) // COLUMNS
    column_tile = part % column_tiles
    row_tile = part // column_tiles % row_tiles
    slice_index = part // column_tiles // row_tiles
    line = row_tile * LINES + tl.arange(0, LINES)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = line[:, None] * pitch + column[None, :]
    offsets = slice_index * slice_pitch + inner
    mask = (line[:, None] < red) & (column[None, :] < post) & (inner < slice_pitch)
    grads = pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    grad = gradient(load(grads + offsets, mask), grad_scale, False, COMPUTE)
    squares = grad * grad
    if field(row, ROW_SUMS) != 0:
        row_sums = pointer(row, ROW_SUMS, COMPUTE, False)
        where = (slice_index * red + line) * column_tiles + column_tile
        tl.store(row_sums + where, tl.sum(squares, axis=1), mask=line < red)
    if field(row, COLUMN_SUMS) != 0:
        column_sums = pointer(row, COLUMN_SUMS, COMPUTE, False)
        where = (slice_index * row_tiles + row_tile) * post + column
        tl.store(column_sums + where, tl.sum(squares, axis=0), mask=column < post)


@triton.jit(do_not_specialize=["beta2"])
def finish_sums(
    table, programs, beta2, found_inf,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute second moments from the sums of ``sum_squares``; a program does ``BLOCK``, by row or by column.

    Args:
        LINES, COLUMNS: Those of ``sum_squares``.
        BLOCK: Second moments of a program. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    beta2 = number(beta2)
    pre, red, post = field(row, PRE), field(row, RED), field(row, POST)
    row_tiles, column_tiles = (red + LINES - 1) // LINES, (post + COLUMNS - 1) // COLUMNS
    rows = pre * red if field(row, ROW_SUMS) != 0 else pre * 0
    row_parts = (rows + BLOCK - 1) // BLOCK
    total = tl.zeros((BLOCK,), COMPUTE)
    if part < row_parts:
        row_sums = pointer(row, ROW_SUMS, COMPUTE, False)
        index = part * BLOCK + tl.arange(0, BLOCK)
        inside = index < rows
        for tile in range(0, column_tiles):
            total += tl.load(row_sums + index * column_tiles + tile, mask=inside, other=0)
        next_second_moment(
            row, ROWS_SQ, ROWS_MAX, index, inside, total / post.to(COMPUTE), beta2, COMPUTE, AMSGRAD, False, False
        )
    else:
        column_sums = pointer(row, COLUMN_SUMS, COMPUTE, False)
        index = (part - row_parts) * BLOCK + tl.arange(0, BLOCK)
        inside = index < pre * post
        first = index // post * row_tiles * post + index % post
        for tile in range(0, row_tiles):
            total += tl.load(column_sums + first + tile * post, mask=inside, other=0)
        next_second_moment(
            row, COLUMNS_SQ, COLUMNS_MAX, index, inside, total / red.to(COMPUTE), beta2, COMPUTE, AMSGRAD, False, False
        )


@triton.jit(do_not_specialize=["beta2"])
def finish_slices(
    table, programs, beta2, found_inf,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute what needs a whole slice of ``[red, post]``: the mean of the rows if factored, or one mean of all.

    Args:
        LINES: That of ``sum_squares``.
        BLOCK: Numbers that are read at a time. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    beta2 = number(beta2)
    red, post = field(row, RED), field(row, POST)
    factored = field(row, ROW_SUMS) != 0
    count = red if factored else (red + LINES - 1) // LINES * post
    values = pointer(row, ROWS_SQ, COMPUTE, False) if factored else pointer(row, COLUMN_SUMS, COMPUTE, False)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + part * count + index, mask=index < count, other=0)
    mean = tl.sum(total, axis=0) / (red if factored else field(row, SLICE_COUNT)).to(COMPUTE)
    if factored:
        tl.store(pointer(row, ROW_MEANS, COMPUTE, False) + part, mean)
    else:
        index = part + tl.arange(0, 1)
        next_second_moment(row, ROWS_SQ, ROWS_MAX, index, index >= 0, mean + tl.zeros((1,), COMPUTE), beta2,
                           COMPUTE, AMSGRAD, False, False)  # fmt: skip


@triton.jit
def _spread_tile(
    row, start, count, decay, step_size, root, beta1, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    lane = tl.arange(0, LINES)[:, None] * 256 + tl.arange(0, 256)[None, :]
    flat = start + lane
    blocks = start // 256 + tl.arange(0, LINES)[:, None]
    mask = flat < count if MASKED else None
    block_mask = blocks * 256 < count if MASKED else None
    red, width = field(row, RED), field(row, WIDTH)
    first_line = start // width
    first_slice = first_line // red
    column = (start - first_line * width).to(INDEX) + lane.to(INDEX)
    line = column // width.to(INDEX)
    column -= line * width.to(INDEX)
    slice_index = first_slice + ((first_line - first_slice * red).to(INDEX) + line) // red.to(INDEX)
    line += first_line
    rows = pointer(row, ROWS_MAX if AMSGRAD else ROWS_SQ, COMPUTE, False)
    columns = pointer(row, COLUMNS_MAX if AMSGRAD else COLUMNS_SQ, COMPUTE, False)
    means = pointer(row, ROW_MEANS, COMPUTE, False)
    has_rows = flat < tl.where(field(row, ROWS_SQ) != 0, count, 0)
    has_columns = flat < tl.where(field(row, COLUMNS_SQ) != 0, count, 0)
    factored = flat < tl.where(field(row, ROW_MEANS) != 0, count, 0)
    second = tl.load(rows + line, mask=has_rows, other=1)
    mean = tl.load(means + slice_index, mask=factored, other=1)
    smallest: tl.constexpr = 2.2250738585072014e-308 if COMPUTE == tl.float64 else 1.1754943508222875e-38
    mean = tl.maximum(mean, smallest, propagate_nan=tl.PropagateNan.ALL)
    second = second / mean if COMPUTE == tl.float64 else tl.div_rn(second, mean)
    second *= tl.load(columns + slice_index * width + column, mask=has_columns, other=1)
    offsets = line.to(tl.int64) * field(row, PITCH) + column if PITCHED else flat
    grads = pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    grad = gradient(load(grads + offsets, mask), grad_scale, MAXIMIZE, COMPUTE)
    denominator = denominator_of(second, root, eps, COMPUTE)
    update_tile(row, grad, denominator, offsets, mask, blocks, block_mask, decay, step_size, beta1,
           PARAM_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, ROUNDS, ALIGNED, LINES, 256)  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_spread(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Update tensors from finished second moments by row, by column or both, in tiles of ``[LINES, 256]`` elements.

    Args:
        WIDE: A tile's indices within rows and slices may need 64 bits. All others are those of ``update_full``.
    """
    if is_skipped(found_inf):
        return
    row, part = work(table, programs)
    start = part * (LINES * 256)
    count = field(row, PRE) * field(row, SLICE_COUNT)
    decay, step_size, root = step_numbers(row, lr, weight_decay)
    beta1, eps = number(beta1), number(eps)
    if start + LINES * 256 <= count:
        _spread_tile(row, start, count, decay, step_size, root, beta1, eps, grad_scale,
                     PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                     ROUNDS, PITCHED, ALIGNED, WIDE, LINES, False)  # fmt: skip
    else:
        _spread_tile(row, start, count, decay, step_size, root, beta1, eps, grad_scale,
                     PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                     ROUNDS, PITCHED, ALIGNED, WIDE, LINES, True)  # fmt: skip
