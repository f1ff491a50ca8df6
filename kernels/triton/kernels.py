"""Triton kernels of the update. Each works on a table of tensors, one launch for all of them.

A second moment averaged over adjacent dimensions is a reduction over the middle of a view ``[pre, red, post]``.
``update_rows`` (``post == 1``) and ``update_columns`` do everything in one launch. What is factored, or too long for
one program, goes through ``sum_squares``, ``finish_sums`` and ``update_spread``. The plain reference of all of them is
``reference_update``, whose order of operations they keep.

Columns of the table, and what kernels share, come first; ``COMPUTE`` is the precision of their arithmetic.

Numbers that are Python floats arrive as the bits of a float64, because Triton would pass a float32; those that are
tensors arrive as pointers, so that the host never waits for the device.
"""

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

COLUMNS_FINISHED = tl.constexpr(32)  # second moments by column of a program of ``finish_sums``

_MOMENTUM_BLOCK = tl.constexpr(256)
_MOMENTUM_CODES = tl.constexpr(127.0)


@triton.jit
def _field(row, FIELD: tl.constexpr, ALIGNED: tl.constexpr = False):
    """Return one number of a tensor's row of the table; ``ALIGNED``: a multiple of 16."""
    value = tl.load(row + FIELD)
    if ALIGNED:
        # Here and not in a caller: up to Triton 3.7 a caller's tl.multiple_of is lost when this call is inlined.
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def _pointer(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address in a tensor's row of the table; ``ALIGNED``: a multiple of 16 bytes."""
    address = tl.load(row + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _work(table, programs):
    """Return the row of the tensor that this program is for, and the number of its tile."""
    program = programs + 2 * tl.program_id(0).to(tl.int64)
    return table + tl.load(program).to(tl.int64) * FIELDS, tl.load(program + 1).to(tl.int64)


@triton.jit
def _number(value):
    """Return in float64 a number that comes as the bits of a float64 or as a pointer."""
    if value.dtype.is_ptr():
        return tl.load(value).to(tl.float64)
    return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _step_numbers(row, lr, weight_decay):
    """Return decay factor, step size and root of the bias correction of one tensor, in float64."""
    lr = _number(lr)
    corrections = _pointer(row, CORRECTIONS, tl.float64, False)
    return 1 - lr * _number(weight_decay), lr / tl.load(corrections), tl.load(corrections + 1)


@triton.jit
def _load(pointers, mask, EVICTION: tl.constexpr):
    """Load, with 0 where ``mask`` is false; None: everything is inside."""
    if mask is None:
        return tl.load(pointers, eviction_policy=EVICTION)
    else:
        return tl.load(pointers, mask=mask, other=0, eviction_policy=EVICTION)


@triton.jit
def _quotient(numerator, denominator):
    """Return a quotient to the last bit; on a GPU ``/`` is that in float64 alone."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def _is_skipped(found_inf):
    """Return whether ``GradScaler`` found a gradient that is not finite."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def _gradient(loaded, grad_scale, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """Return a gradient in the precision of the arithmetic, unscaled, of the function to minimize."""
    grad = loaded.to(COMPUTE)
    if grad_scale is not None:
        grad = _quotient(grad, tl.load(grad_scale).to(COMPUTE))
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def _pointers(
    row, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Return where a tensor's gradient, first moment, its scales and the parameter begin."""
    grads = _pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    moments = _pointer(row, EXP_AVG, MOMENT_DTYPE, ALIGNED)
    scales = _pointer(row, EXP_AVG_SCALE, tl.uint8, False)
    return grads, moments, scales, _pointer(row, PARAM, PARAM_DTYPE, ALIGNED)


@triton.jit
def _second_moments(
    row, MOMENTS: tl.constexpr, MAXIMA: tl.constexpr, index, mask,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Load second moments and, with ``AMSGRAD``, their maxima; return the addresses of both and both."""
    moments = _pointer(row, MOMENTS, COMPUTE, ALIGNED) + index
    maxima = _pointer(row, MAXIMA, COMPUTE, ALIGNED) + index if AMSGRAD else moments
    second = _load(moments, mask, "")
    return moments, maxima, second, _load(maxima, mask, "") if AMSGRAD else second


@triton.jit
def _next_second_moment(
    moments, maxima, second, largest, mask, mean_square, beta2, AMSGRAD: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Update what ``_second_moments`` has loaded, and return what the update divides by.

    ``SHARED``: several warps have loaded the same second moment and go on to divide by it, while one of them stores it.
    """
    COMPUTE: tl.constexpr = mean_square.dtype
    second = second * beta2.to(COMPUTE) + mean_square * (1 - beta2).to(COMPUTE)
    if SHARED:
        tl.debug_barrier()  # else a late warp loads what is stored here already, and lets it decay twice
    tl.store(moments, second, mask=mask)
    if AMSGRAD:
        second = tl.maximum(largest, second, propagate_nan=tl.PropagateNan.ALL)
        tl.store(maxima, second, mask=mask)
    return second


@triton.jit
def _next_first_moment(exp_avg, grad, beta1):
    """Return a first moment after a step."""
    old = exp_avg.to(grad.dtype)
    return old + (1 - beta1).to(grad.dtype) * (grad - old)


@triton.jit
def _denominator_of(second_moment, root, eps):
    """Return ``sqrt(v_hat) + eps``; ``root`` is that of the bias correction."""
    COMPUTE: tl.constexpr = second_moment.dtype
    if COMPUTE == tl.float64:
        return tl.sqrt(second_moment) / root + eps
    else:
        return tl.div_rn(tl.sqrt_rn(second_moment), root.to(COMPUTE)) + eps.to(COMPUTE)


@triton.jit
def _stepped(param, exp_avg, denominator, decay, step_size):
    """Return a parameter after weight decay and step."""
    COMPUTE: tl.constexpr = denominator.dtype
    decayed = param.to(COMPUTE) * decay.to(COMPUTE)
    return decayed - step_size.to(COMPUTE) * _quotient(exp_avg, denominator)


@triton.jit
def _noise(row, STEP_DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """Return a number that sets a tensor's random bits in this step apart from others."""
    if ROUNDS:
        step = tl.load(_pointer(row, STEP, STEP_DTYPE, False)).to(tl.int64)
        return _field(row, SEED).to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9
    else:
        return 0


@triton.jit
def _random_bits(index, noise):
    """Return 32 well-mixed bits for an element's index."""
    mixed = index.to(tl.uint32) ^ noise
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return mixed ^ (mixed >> 16)


@triton.jit
def _as_stored(value, index, noise, PARAM_DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """Return a parameter in the precision it is kept in; with ``ROUNDS`` rounded up or down at random."""
    if ROUNDS:
        bits = (value.to(tl.uint32, bitcast=True) + (_random_bits(index, noise) & 0xFFFF)) & 0xFFFF0000
        finite = tl.abs(value) < float("inf")
        return tl.where(finite, bits.to(tl.float32, bitcast=True), value).to(PARAM_DTYPE)
    elif PARAM_DTYPE == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(PARAM_DTYPE)


@triton.jit
def _in_blocks(tile):
    """Return ``[rows, columns]`` as ``[rows, columns // 256, 256]``."""
    return tl.reshape(tile, (tile.shape[0], tile.shape[1] // _MOMENTUM_BLOCK, _MOMENTUM_BLOCK))


@triton.jit
def _decoded(codes, scales):
    """Return float32 ``[rows, columns]`` from codes of that shape and scales ``[rows, columns // 256]``."""
    root = _in_blocks(codes).to(tl.float32) / _MOMENTUM_CODES
    scale = (scales.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    value = tl.where(root < 0, -root, root) * root * tl.expand_dims(scale, 2)
    return tl.reshape(value, codes.shape)


@triton.jit
def _encoded(value, grad):
    """Return codes ``[rows, columns]`` and scales ``[rows, columns // 256]`` of float32 values."""
    blocks = _in_blocks(value)
    moving = _in_blocks(grad) != 0
    size = tl.abs(blocks)
    largest = tl.max(tl.where(size == size, size, float("inf")), axis=2)
    exponent = (largest.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    root = tl.sqrt_rn(size / tl.expand_dims(tl.where(scale > 0, scale, 1.0), 2)) * _MOMENTUM_CODES
    root = tl.where(root <= _MOMENTUM_CODES, root, 0.0)
    nearest = (root + 12582912.0) - 12582912.0
    code = tl.where(moving, nearest, tl.floor(root))
    code = tl.where(blocks < 0, -code, code).to(tl.int8)
    return tl.reshape(code, value.shape), exponent.to(tl.uint8)


@triton.jit
def _state(moments, scales, params, offsets, mask, blocks, block_mask, EVICTION: tl.constexpr):
    """Load first moments, their scales and parameters of one tile.

    ``offsets`` are the positions of its elements, and ``blocks`` those of its blocks of codes; a mask of None: all.
    ``EVICTION``: the cache's policy for what is read once, where the gradient is read twice.
    """
    exp_avg = _load(moments + offsets, mask, EVICTION)
    scale = _load(scales + blocks, block_mask, "") if exp_avg.dtype == tl.int8 else exp_avg
    return exp_avg, scale, _load(params + offsets, mask, EVICTION)


@triton.jit
def _update_tile(
    grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
    decay, step_size, beta1, noise, ROUNDS: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Update first moment and parameter of one tile, as ``_state`` has loaded them."""
    MOMENT_DTYPE: tl.constexpr = exp_avg.dtype
    if MOMENT_DTYPE == tl.int8:
        exp_avg = _next_first_moment(_decoded(exp_avg, scale), grad, beta1)
        codes, new_scales = _encoded(exp_avg, grad)
        tl.store(moments + offsets, codes, mask=mask, eviction_policy=EVICTION)
        tl.store(scales + blocks, new_scales, mask=block_mask)
    elif MOMENT_DTYPE == tl.float64:
        exp_avg = _next_first_moment(exp_avg, grad, beta1)
        tl.store(moments + offsets, exp_avg, mask=mask, eviction_policy=EVICTION)
    else:
        kept = _next_first_moment(exp_avg, grad, beta1).to(tl.float32).to(MOMENT_DTYPE)
        tl.store(moments + offsets, kept, mask=mask, eviction_policy=EVICTION)
        exp_avg = kept.to(grad.dtype)
    moved = _stepped(param, exp_avg, denominator, decay, step_size)
    stored = _as_stored(moved, offsets, noise, param.dtype, ROUNDS)
    tl.store(params + offsets, stored, mask=mask, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["count", "beta1", "beta2"])
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
    first = tl.zeros((BLOCK,), tl.float64) + _number(beta1)
    second = tl.zeros((BLOCK,), tl.float64) + _number(beta2)
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
def _positions(start, width, LINES: tl.constexpr, WITHIN: tl.constexpr, WIDE: tl.constexpr):
    """Return the row of a tile's first element, and rows after it and columns of all, of lines of 256 elements.

    ``WITHIN``: no line spans two rows; those of its first element stand for it, ``[LINES, 1]``. ``WIDE``: a row's
    length needs 64 bits; else there is one division of 64 bits for a tile.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    first = start // width
    column = (start - first * width).to(INDEX) + tl.arange(0, LINES)[:, None] * 256
    if not WITHIN:
        column += tl.arange(0, 256)[None, :]
    line = column // width.to(INDEX)
    return first, line, column - line * width.to(INDEX)


@triton.jit
def _full_tile(
    row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ROUNDS: tl.constexpr, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    flat = start + tl.arange(0, LINES)[:, None] * 256 + tl.arange(0, 256)[None, :]
    blocks = start // 256 + tl.arange(0, LINES)[:, None]
    mask = flat < count if MASKED else None
    block_mask = blocks * 256 < count if MASKED else None
    offsets = flat
    if PITCHED:
        first, line, column = _positions(start, _field(row, POST), LINES, False, WIDE)
        offsets = (first + line) * _field(row, PITCH) + column
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    noise = _noise(row, STEP_DTYPE, ROUNDS)
    loaded = _load(grads + offsets, mask, "")
    seconds, maxima, second, largest = _second_moments(row, ROWS_SQ, ROWS_MAX, flat, mask, COMPUTE, AMSGRAD, ALIGNED)
    exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "")

    grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
    second = _next_second_moment(seconds, maxima, second, largest, mask, grad * grad, beta2, AMSGRAD, False)
    denominator = _denominator_of(second, root, eps)
    _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
                 decay, step_size, beta1, noise, ROUNDS, "")  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_full(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ROUNDS: tl.constexpr, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
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
        WIDE: Positions within rows and slices may need 64 bits.
        LINES: Lines of 256 elements of a tile.
    """
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    start = part * (LINES * 256)
    count = _field(row, PRE) * _field(row, RED) * _field(row, POST)
    decay, step_size, root = _step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = _number(beta1), _number(beta2), _number(eps)
    if start + LINES * 256 <= count:
        _full_tile(row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                   ROUNDS, PITCHED, ALIGNED, WIDE, LINES, False)  # fmt: skip
    else:
        _full_tile(row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                   ROUNDS, PITCHED, ALIGNED, WIDE, LINES, True)  # fmt: skip


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
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    decay, step_size, root = _step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = _number(beta1), _number(beta2), _number(eps)
    red, pitch = _field(row, RED, ALIGNED), _field(row, PITCH, ALIGNED)
    line = part * LINES + tl.arange(0, LINES)
    inside = line < _field(row, PRE)
    first = line[:, None] * pitch
    column = tl.arange(0, COLUMNS)[None, :]
    block = tl.arange(0, COLUMNS // 256 if MOMENT_DTYPE == tl.int8 else 1)[None, :]
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    noise = _noise(row, STEP_DTYPE, ROUNDS)

    offsets = first + column
    mask = inside[:, None] & (column < red)
    blocks = line[:, None] * (red // 256) + block
    block_mask = inside[:, None] & (block * 256 < red)
    loaded = _load(grads + offsets, mask, "")
    seconds, maxima, second, largest = _second_moments(row, ROWS_SQ, ROWS_MAX, line, inside, COMPUTE, AMSGRAD, False)
    exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "")

    grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
    squares = grad * grad
    if not WHOLE:
        for start in range(COLUMNS, red, COLUMNS):
            more = _load(grads + offsets + start, inside[:, None] & (start + column < red), "")
            more = _gradient(more, grad_scale, MAXIMIZE, COMPUTE)
            squares += more * more
    mean_square = _quotient(tl.sum(squares, axis=1), red.to(COMPUTE))
    second = _next_second_moment(seconds, maxima, second, largest, inside, mean_square, beta2, AMSGRAD, True)
    denominator = _denominator_of(second, root, eps)[:, None] + tl.zeros((LINES, COLUMNS), COMPUTE)
    _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
                 decay, step_size, beta1, noise, ROUNDS, "")  # fmt: skip
    if not WHOLE:
        for start in range(COLUMNS, red, COLUMNS):
            offsets = first + start + column
            mask = inside[:, None] & (start + column < red)
            blocks = line[:, None] * (red // 256) + start // 256 + block
            block_mask = inside[:, None] & (start + block * 256 < red)
            loaded = _load(grads + offsets, mask, "")
            exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "")
            grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
            _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks,
                         block_mask, decay, step_size, beta1, noise, ROUNDS, "")  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_columns(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    ALIGNED: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update tensors with one second moment for each column of ``[red, post]``; a program does a strip of columns.

    The strip's gradient is read twice, the second time from cache: launch settings keep the strips that are under
    work at the same time small enough for it, and what is read once is the first to leave it.

    Args:
        LINES, COLUMNS: Rows read at a time, and columns of the strip. All others are those of ``update_full``.
    """
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    decay, step_size, root = _step_numbers(row, lr, weight_decay)
    beta1, beta2, eps = _number(beta1), _number(beta2), _number(eps)
    red, post, pitch = _field(row, RED), _field(row, POST, ALIGNED), _field(row, PITCH, ALIGNED)
    strips = (post + COLUMNS - 1) // COLUMNS
    slice_index = part // strips
    column = (part % strips) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < post
    line = tl.arange(0, LINES)[:, None]
    first = slice_index * red * pitch + line * pitch + column[None, :]
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    noise = _noise(row, STEP_DTYPE, ROUNDS)
    index = slice_index * post + column
    seconds, maxima, second, largest = _second_moments(
        row, COLUMNS_SQ, COLUMNS_MAX, index, inside, COMPUTE, AMSGRAD, False
    )  # fmt: skip

    squares = tl.zeros((LINES, COLUMNS), COMPUTE)
    for start in range(0, red, LINES):
        mask = (start + line < red) & inside[None, :]
        loaded = _load(grads + first + start * pitch, mask, "evict_last")
        grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
        squares += grad * grad
    mean_square = _quotient(tl.sum(squares, axis=0), red.to(COMPUTE))
    second = _next_second_moment(seconds, maxima, second, largest, inside, mean_square, beta2, AMSGRAD, True)
    denominator = _denominator_of(second, root, eps)[None, :] + tl.zeros((LINES, COLUMNS), COMPUTE)

    for start in range(0, red, LINES):
        mask = (start + line < red) & inside[None, :]
        offsets = first + start * pitch
        loaded = _load(grads + offsets, mask, "evict_first")
        exp_avg, scale, param = _state(moments, scales, params, offsets, mask, 0, None, "evict_first")
        grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
        _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, 0, None,
                     decay, step_size, beta1, noise, ROUNDS, "evict_first")  # fmt: skip


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
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    red, post, pitch = _field(row, RED), _field(row, POST, ALIGNED), _field(row, PITCH, ALIGNED)
    slice_pitch = _field(row, SLICE_PITCH, ALIGNED)
    row_tiles, column_tiles = (red + LINES - 1) // LINES, (post + COLUMNS - 1) // COLUMNS
    column_tile = part % column_tiles
    row_tile = part // column_tiles % row_tiles
    slice_index = part // column_tiles // row_tiles
    line = row_tile * LINES + tl.arange(0, LINES)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inner = line[:, None] * pitch + column[None, :]
    offsets = slice_index * slice_pitch + inner
    mask = (line[:, None] < red) & (column[None, :] < post) & (inner < slice_pitch)
    grads = _pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    grad = _gradient(_load(grads + offsets, mask, ""), grad_scale, False, COMPUTE)
    squares = grad * grad
    if _field(row, ROW_SUMS) != 0:
        row_sums = _pointer(row, ROW_SUMS, COMPUTE, False)
        where = (slice_index * red + line) * column_tiles + column_tile
        tl.store(row_sums + where, tl.sum(squares, axis=1), mask=line < red)
    if _field(row, COLUMN_SUMS) != 0:
        column_sums = _pointer(row, COLUMN_SUMS, COMPUTE, False)
        where = (slice_index * row_tiles + row_tile) * post + column
        tl.store(column_sums + where, tl.sum(squares, axis=0), mask=column < post)


@triton.jit
def _finish(
    row, MOMENTS: tl.constexpr, MAXIMA: tl.constexpr, index, mask, mean_square, beta2, AMSGRAD: tl.constexpr
):  # fmt: skip
    """Update second moments, once the means of squares are known."""
    COMPUTE: tl.constexpr = mean_square.dtype
    moments, maxima, second, largest = _second_moments(row, MOMENTS, MAXIMA, index, mask, COMPUTE, AMSGRAD, False)
    _next_second_moment(moments, maxima, second, largest, mask, mean_square, beta2, AMSGRAD, False)


@triton.jit(do_not_specialize=["beta2"])
def finish_sums(
    table, programs, beta2, found_inf,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute second moments from the sums of ``sum_squares``; a program does ``BLOCK`` by row, or few by column.

    A column has more sums than a row: those of many row tiles are read together.

    Args:
        LINES, COLUMNS: Those of ``sum_squares``.
        BLOCK: Second moments by row of a program. All others are those of ``update_full``.
    """
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    beta2 = _number(beta2)
    pre, red, post = _field(row, PRE), _field(row, RED), _field(row, POST)
    row_tiles, column_tiles = (red + LINES - 1) // LINES, (post + COLUMNS - 1) // COLUMNS
    rows = pre * red if _field(row, ROW_SUMS) != 0 else pre * 0
    row_parts = (rows + BLOCK - 1) // BLOCK
    if part < row_parts:
        row_sums = _pointer(row, ROW_SUMS, COMPUTE, False)
        line = part * BLOCK + tl.arange(0, BLOCK)
        known = line < rows
        total = tl.zeros((BLOCK,), COMPUTE)
        for tile in range(0, column_tiles):
            total += tl.load(row_sums + line * column_tiles + tile, mask=known, other=0)
        _finish(row, ROWS_SQ, ROWS_MAX, line, known, _quotient(total, post.to(COMPUTE)), beta2, AMSGRAD)
    else:
        column_sums = _pointer(row, COLUMN_SUMS, COMPUTE, False)
        column = (part - row_parts) * COLUMNS_FINISHED + tl.arange(0, COLUMNS_FINISHED)
        inside = column < pre * post
        first = (column // post * row_tiles * post + column % post)[None, :]
        TILES: tl.constexpr = BLOCK * 4 // COLUMNS_FINISHED
        row_tile = tl.arange(0, TILES)[:, None]
        sums = tl.zeros((TILES, COLUMNS_FINISHED), COMPUTE)
        for start in range(0, row_tiles, TILES):
            within = inside[None, :] & (start + row_tile < row_tiles)
            sums += tl.load(column_sums + first + (start + row_tile) * post, mask=within, other=0)
        mean_square = _quotient(tl.sum(sums, axis=0), red.to(COMPUTE))
        _finish(row, COLUMNS_SQ, COLUMNS_MAX, column, inside, mean_square, beta2, AMSGRAD)


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
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    beta2 = _number(beta2)
    red, post = _field(row, RED), _field(row, POST)
    factored = _field(row, ROW_SUMS) != 0
    count = red if factored else (red + LINES - 1) // LINES * post
    values = _pointer(row, ROWS_SQ, COMPUTE, False) if factored else _pointer(row, COLUMN_SUMS, COMPUTE, False)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + part * count + index, mask=index < count, other=0)
    mean = _quotient(tl.sum(total, axis=0), (red if factored else _field(row, SLICE_COUNT)).to(COMPUTE))
    if factored:
        tl.store(_pointer(row, ROW_MEANS, COMPUTE, False) + part, mean)
    else:
        index = part + tl.arange(0, 1)
        inside = index >= 0
        mean_square = mean + tl.zeros((1,), COMPUTE)
        _finish(row, ROWS_SQ, ROWS_MAX, index, inside, mean_square, beta2, AMSGRAD)


@triton.jit
def _spread_tile(
    row, start, count, decay, step_size, root, beta1, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WITHIN: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, 256)[None, :]
    flat = start + tl.arange(0, LINES)[:, None] * 256 + inner
    blocks = start // 256 + tl.arange(0, LINES)[:, None]
    mask = flat < count if MASKED else None
    block_mask = blocks * 256 < count if MASKED else None
    width, red = _field(row, WIDTH, WITHIN), _field(row, RED)
    first_line, line, column = _positions(start, width, LINES, WITHIN, WIDE)
    first_slice = first_line // red
    slice_index = first_slice + ((first_line - first_slice * red).to(line.dtype) + line) // red.to(line.dtype)
    line = first_line + line
    offsets = flat
    if PITCHED:
        offsets = line * _field(row, PITCH, ALIGNED and WITHIN) + column + (inner if WITHIN else 0)
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    noise = _noise(row, STEP_DTYPE, ROUNDS)
    rows = _pointer(row, ROWS_MAX if AMSGRAD else ROWS_SQ, COMPUTE, False)
    columns = _pointer(row, COLUMNS_MAX if AMSGRAD else COLUMNS_SQ, COMPUTE, WITHIN)
    means = _pointer(row, ROW_MEANS, COMPUTE, False)
    element = blocks * 256 if WITHIN else flat
    has_rows = element < tl.where(_field(row, ROWS_SQ) != 0, count, 0)
    has_columns = element < tl.where(_field(row, COLUMNS_SQ) != 0, count, 0)
    factored = element < tl.where(_field(row, ROW_MEANS) != 0, count, 0)

    loaded = _load(grads + offsets, mask, "evict_first")
    exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "evict_first")
    second = tl.load(rows + line, mask=has_rows, other=1)
    mean = tl.load(means + slice_index, mask=factored, other=1)
    by_column = columns + (slice_index * width + column)
    if WITHIN:
        by_column, has_columns = by_column + inner, has_columns & (inner >= 0)
    by_column = tl.load(by_column, mask=has_columns, other=1)

    smallest: tl.constexpr = 2.2250738585072014e-308 if COMPUTE == tl.float64 else 1.1754943508222875e-38
    mean = tl.maximum(mean, smallest, propagate_nan=tl.PropagateNan.ALL)
    denominator = _denominator_of(_quotient(second, mean) * by_column, root, eps)
    grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
    _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
                 decay, step_size, beta1, noise, ROUNDS, "evict_first")  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_spread(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WITHIN: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Update tensors from finished second moments by row, by column or both, in tiles of ``[LINES, 256]`` elements.

    Args:
        WITHIN: No line of 256 elements spans two rows: what is kept by row is read once for a line. All others are
            those of ``update_full``.
    """
    if _is_skipped(found_inf):
        return
    row, part = _work(table, programs)
    start = part * (LINES * 256)
    count = _field(row, PRE) * _field(row, SLICE_COUNT)
    decay, step_size, root = _step_numbers(row, lr, weight_decay)
    beta1, eps = _number(beta1), _number(eps)
    if start + LINES * 256 <= count:
        _spread_tile(row, start, count, decay, step_size, root, beta1, eps, grad_scale,
                     PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                     ROUNDS, PITCHED, ALIGNED, WITHIN, WIDE, LINES, False)  # fmt: skip
    else:
        _spread_tile(row, start, count, decay, step_size, root, beta1, eps, grad_scale,
                     PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                     ROUNDS, PITCHED, ALIGNED, WITHIN, WIDE, LINES, True)  # fmt: skip
