"""Triton kernels of the update. Each works on a table of tensors, one launch for all of them.

A second moment averaged over adjacent dimensions is a reduction over the middle of a view ``[pre, red, post]``. A
program of ``update_rows`` (``post == 1``) sums and updates whole rows. Columns, what is factored and rows that are too
long for one program are shared among the programs of ``update_spread``. The plain reference of all of them is
``reference_update``, whose order of operations they keep.

Columns of the table, and what kernels share, come first; ``COMPUTE`` is the precision of their arithmetic.

Numbers that are Python floats arrive as the bits of a float64, because Triton would pass a float32; those that are
tensors arrive as pointers, so that the host never waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..float8 import DROPPED, LARGEST, NOT_FINITE, OFFSET

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

COLUMNS_FINISHED = tl.constexpr(32)  # second moments by column that a program finishes

# Stages of ``update_spread``, and the numbers that stand for the work of one of its programs.
SUM = tl.constexpr(0)
FINISH = tl.constexpr(1)
FINISH_SLICE = tl.constexpr(2)
UPDATE = tl.constexpr(3)
PROGRAM = tl.constexpr(9)

_MOMENTUM_BLOCK = tl.constexpr(256)
_MOMENTUM_CODES = tl.constexpr(127.0)
# Codes of second moments.
_OFFSET = tl.constexpr(OFFSET)
_DROPPED = tl.constexpr(DROPPED)
_LARGEST = tl.constexpr(LARGEST)
_NOT_FINITE = tl.constexpr(NOT_FINITE)


@triton.jit
def _field(row, FIELD: tl.constexpr, ALIGNED: tl.constexpr = 0):
    """Return one number of a tensor's row of the table; ``ALIGNED``: what it is a multiple of, 0 for nothing."""
    value = tl.load(row + FIELD)
    if ALIGNED != 0:
        # Here and not in a caller: up to Triton 3.7 a caller's tl.multiple_of is lost when this call is inlined.
        value = tl.multiple_of(value, ALIGNED)
    return value


@triton.jit
def _pointer(row, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return an address in a tensor's row of the table; ``ALIGNED``: a multiple of 16 bytes."""
    address = tl.load(row + FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED != 0:
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
    DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Load second moments and, with ``AMSGRAD``, their maxima; return the addresses of both and both."""
    moments = _pointer(row, MOMENTS, DTYPE, ALIGNED) + index
    maxima = _pointer(row, MAXIMA, DTYPE, ALIGNED) + index if AMSGRAD else moments
    second = _load(moments, mask, "")
    return moments, maxima, second, _load(maxima, mask, "") if AMSGRAD else second


@triton.jit
def _average(second, mean_square, beta2):
    """Return a second moment after a step."""
    COMPUTE: tl.constexpr = mean_square.dtype
    return second * beta2.to(COMPUTE) + mean_square * (1 - beta2).to(COMPUTE)


@triton.jit
def _next_second_moment(
    moments, maxima, second, largest, mask, mean_square, beta2, AMSGRAD: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Update what ``_second_moments`` has loaded, and return what the update divides by.

    ``SHARED``: several warps have loaded the same second moment and go on to divide by it, while one of them stores it.
    """
    second = _average(second, mean_square, beta2)
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
def _step_noise(row, STEP_DTYPE: tl.constexpr):
    """Return a number that sets the random bits of a step apart from those of others."""
    step = tl.load(_pointer(row, STEP, STEP_DTYPE, False)).to(tl.int64)
    return step.to(tl.uint32) * 0x9E3779B9


@triton.jit
def _noise(row, STEP_DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """Return a number that sets a tensor's random bits in this step apart from others."""
    if ROUNDS:
        return _field(row, SEED).to(tl.uint32) + _step_noise(row, STEP_DTYPE)
    else:
        return 0


@triton.jit
def _random_bits(index, noise):
    """Return 32 well-mixed bits for an element's index, or for another number of its own."""
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
def _decoded_second(codes):
    """Return the second moments that codes stand for, in float32."""
    value = ((codes.to(tl.uint32) + _OFFSET) << _DROPPED).to(tl.float32, bitcast=True)
    return tl.where(codes == 0, 0.0, tl.where(codes == _NOT_FINITE, float("inf"), value))


@triton.jit
def _encoded_second(second, param, noise):
    """Return codes of second moments, rounded at random: parameter and step decide which way."""
    value = second.to(tl.float32)
    random = _random_bits(param.to(tl.float32).to(tl.uint32, bitcast=True) >> 16 << 16, noise)
    bits = value.to(tl.uint32, bitcast=True) + (random >> (32 - _DROPPED))
    code = tl.minimum(tl.maximum((bits >> _DROPPED).to(tl.int32) - _OFFSET, 1), _LARGEST)
    code = tl.where(value == 0, 0, tl.where(value < float("inf"), code, _NOT_FINITE))
    return code.to(tl.uint8)


@triton.jit
def _next_codes(moments, codes, mask, param, mean_square, beta2, noise):
    """Update codes that ``_second_moments`` has loaded; return the second moment as it was before it was rounded."""
    second = _average(_decoded_second(codes).to(mean_square.dtype), mean_square, beta2)
    tl.store(moments, _encoded_second(second, param, noise), mask=mask)
    return second


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


@triton.jit(do_not_specialize=["count", "counter_count", "beta1", "beta2"])
def advance_steps(
    addresses, count, corrections, counters, counter_count, beta1, beta2, found_inf,
    STEP_DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count a step of each parameter, write its bias corrections, and set the counters of ``update_spread`` to zero.

    Args:
        addresses: Addresses of the step counts, int64 ``[count]``.
        corrections: float64 ``[count, 2]``; receives ``1 - beta1**t`` and ``sqrt(1 - beta2**t)``.
        counters, counter_count: int32, and how many.
        found_inf: None, or a number that leaves the counts as they are unless it is zero.
        count, beta1, beta2, STEP_DTYPE, BLOCK: Their number, the decays, their precision, and counts in a program.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counters + index, tl.zeros((BLOCK,), tl.int32), mask=index < counter_count)
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
def _positions(start, width, LINES: tl.constexpr, WIDE: tl.constexpr):
    """Return the row of a tile's first element, and rows after it and columns of all, of lines of 256 elements.

    ``WIDE``: a row's length needs 64 bits; else there is one division of 64 bits for a tile.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    first = start // width
    column = (start - first * width).to(INDEX) + tl.arange(0, LINES)[:, None] * 256 + tl.arange(0, 256)[None, :]
    line = column // width.to(INDEX)
    return first, line, column - line * width.to(INDEX)


@triton.jit
def _full_tile(
    row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, SECOND_DTYPE: tl.constexpr,
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
        first, line, column = _positions(start, _field(row, POST), LINES, WIDE)
        offsets = (first + line) * _field(row, PITCH) + column
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    noise = _noise(row, STEP_DTYPE, ROUNDS)
    code_noise = _step_noise(row, STEP_DTYPE) if SECOND_DTYPE == tl.uint8 else 0
    loaded = _load(grads + offsets, mask, "")
    seconds, maxima, second, largest = _second_moments(
        row, ROWS_SQ, ROWS_MAX, flat, mask, SECOND_DTYPE, AMSGRAD, ALIGNED
    )
    exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "")

    grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
    if SECOND_DTYPE == tl.uint8:
        second = _next_codes(seconds, second, mask, param, grad * grad, beta2, code_noise)
    else:
        second = _next_second_moment(seconds, maxima, second, largest, mask, grad * grad, beta2, AMSGRAD, False)
    denominator = _denominator_of(second, root, eps)
    _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
                 decay, step_size, beta1, noise, ROUNDS, "")  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_full(
    table, programs, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, SECOND_DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr,
    ROUNDS: tl.constexpr, PITCHED: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Update tensors with a second moment for every element, in tiles of ``[LINES, 256]`` consecutive elements.

    Args:
        table, programs: int64 ``[tensors, FIELDS]``, and int32 ``[programs, 2]`` of a tensor and the number of a tile.
        lr, beta1, beta2, eps, weight_decay: Hyperparameters, as bits or pointers.
        grad_scale, found_inf: None or pointers: what gradients are divided by, and not zero to skip the step.
        PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, STEP_DTYPE: Precisions of what the table points to.
        SECOND_DTYPE: That of second moments: ``COMPUTE``, or uint8 for codes, which have no ``AMSGRAD``.
        COMPUTE: Precision of the arithmetic.
        AMSGRAD, MAXIMIZE, ROUNDS: Flags of the step; ``ROUNDS`` for stochastic rounding.
        PITCHED: There are gaps between rows.
        ALIGNED: Elements that lengths of rows are multiples of, as all addresses are of 16 bytes; or 0.
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
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, SECOND_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                   ROUNDS, PITCHED, ALIGNED, WIDE, LINES, False)  # fmt: skip
    else:
        _full_tile(row, start, count, decay, step_size, root, beta1, beta2, eps, grad_scale,
                   PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, SECOND_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
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


@triton.jit
def _sum_squares(
    row, part, first_slice, first_column, columns, grad_scale,
    GRAD_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    SUM_LINES: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the squared gradients of one tile of a slab, by row and by column, into scratch memory.

    Scratch of a tensor: ``[pre * red, column tiles]`` sums by row, ``[pre, row tiles, post]`` sums by column.
    """
    red, post, pitch = _field(row, RED), _field(row, POST, ALIGNED), _field(row, PITCH, ALIGNED)
    slice_pitch = _field(row, SLICE_PITCH, ALIGNED)
    row_tiles, all_column_tiles = (red + SUM_LINES - 1) // SUM_LINES, (post + SUM_COLUMNS - 1) // SUM_COLUMNS
    column_tiles = (tl.where(columns == _field(row, WIDTH), post, columns) + SUM_COLUMNS - 1) // SUM_COLUMNS
    column_tile = first_column // SUM_COLUMNS + part % column_tiles
    row_tile = part // column_tiles % row_tiles
    slice_index = first_slice + part // column_tiles // row_tiles
    line = row_tile * SUM_LINES + tl.arange(0, SUM_LINES)
    column = column_tile * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
    inner = line[:, None] * pitch + column[None, :]
    offsets = slice_index * slice_pitch + inner
    mask = (line[:, None] < red) & (column[None, :] < post) & (inner < slice_pitch)
    grads = _pointer(row, GRAD, GRAD_DTYPE, ALIGNED)
    grad = _gradient(_load(grads + offsets, mask, "evict_last"), grad_scale, False, COMPUTE)
    squares = grad * grad
    if _field(row, ROW_SUMS) != 0:
        row_sums = _pointer(row, ROW_SUMS, COMPUTE, False)
        where = (slice_index * red + line) * all_column_tiles + column_tile
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


@triton.jit
def _finish_sums(
    row, part, first_slice, slices, first_column, columns, beta2,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr,
    SUM_LINES: tl.constexpr, SUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute second moments of a slab from its sums; a program does ``BLOCK`` by row, or few by column.

    A column has more sums than a row: those of many row tiles are read together.
    """
    red, post = _field(row, RED), _field(row, POST)
    row_tiles, column_tiles = (red + SUM_LINES - 1) // SUM_LINES, (post + SUM_COLUMNS - 1) // SUM_COLUMNS
    rows = slices * red if _field(row, ROW_SUMS) != 0 else red * 0
    row_parts = (rows + BLOCK - 1) // BLOCK
    if part < row_parts:
        row_sums = _pointer(row, ROW_SUMS, COMPUTE, False)
        line = part * BLOCK + tl.arange(0, BLOCK)
        known = line < rows
        line += first_slice * red
        total = tl.zeros((BLOCK,), COMPUTE)
        for tile in range(0, column_tiles):
            total += tl.load(row_sums + line * column_tiles + tile, mask=known, other=0)
        _finish(row, ROWS_SQ, ROWS_MAX, line, known, _quotient(total, post.to(COMPUTE)), beta2, AMSGRAD)
    else:
        column_sums = _pointer(row, COLUMN_SUMS, COMPUTE, False)
        number = (part - row_parts) * COLUMNS_FINISHED + tl.arange(0, COLUMNS_FINISHED)
        inside = number < slices * columns
        slice_index, column = first_slice + number // columns, first_column + number % columns
        first = (slice_index * row_tiles * post + column)[None, :]
        ROW_TILES: tl.constexpr = BLOCK // COLUMNS_FINISHED
        row_tile = tl.arange(0, ROW_TILES)[:, None]
        sums = tl.zeros((ROW_TILES, COLUMNS_FINISHED), COMPUTE)
        for start in range(0, row_tiles, ROW_TILES):
            within = inside[None, :] & (start + row_tile < row_tiles)
            sums += tl.load(column_sums + first + (start + row_tile) * post, mask=within, other=0)
        mean_square = _quotient(tl.sum(sums, axis=0), red.to(COMPUTE))
        _finish(row, COLUMNS_SQ, COLUMNS_MAX, slice_index * post + column, inside, mean_square, beta2, AMSGRAD)


@triton.jit
def _finish_slice(
    row, slice_index, beta2, COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, SUM_LINES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute what needs a whole slice of ``[red, post]``: the mean of the rows if factored, or one mean of all."""
    red, post = _field(row, RED), _field(row, POST)
    factored = _field(row, ROW_SUMS) != 0
    count = red if factored else (red + SUM_LINES - 1) // SUM_LINES * post
    values = _pointer(row, ROWS_SQ, COMPUTE, False) if factored else _pointer(row, COLUMN_SUMS, COMPUTE, False)
    total = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(values + slice_index * count + index, mask=index < count, other=0)
    mean = _quotient(tl.sum(total, axis=0), (red if factored else _field(row, SLICE_COUNT)).to(COMPUTE))
    if factored:
        tl.store(_pointer(row, ROW_MEANS, COMPUTE, False) + slice_index, mean)
    else:
        index = slice_index + tl.arange(0, 1)
        mean_square = mean + tl.zeros((1,), COMPUTE)
        _finish(row, ROWS_SQ, ROWS_MAX, index, index >= 0, mean_square, beta2, AMSGRAD)


@triton.jit
def _wait(done, awaited):
    """Wait until so many programs of a slab have announced what they stored."""
    while tl.atomic_add(done, 0, sem="acquire", scope="gpu") < awaited:
        pass


@triton.jit
def _spread_tile(
    row, tile, first_slice, slices, first_column, columns, decay, step_size, root, beta1, eps, grad_scale,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, IN_ROWS: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    inner = tl.arange(0, 256)[None, :]
    width, count = _field(row, WIDTH, ALIGNED if IN_ROWS else 0), _field(row, SLICE_COUNT)
    height = count // width
    pitch = _field(row, PITCH, ALIGNED) if PITCHED else width
    if IN_ROWS:
        across = (columns + 255) // 256
        start = tile * LINES
        first = start // across
        position = (start - first * across).to(INDEX) + tl.arange(0, LINES)[:, None]
        line = position // across.to(INDEX)
        column = (first_column // 256 + position - line * across).to(INDEX) * 256
        place, limit = first + line, slices * height
        mask = (place < limit) & (column + inner < first_column + columns) if MASKED else None
        block_mask = place < limit if MASKED else None
        first += first_slice * height
        offsets = (first + line) * pitch + column + inner
        blocks = (first + line) * (width // 256) + column // 256
    else:
        start = tile * (LINES * 256)
        flat = start + tl.arange(0, LINES)[:, None] * 256 + inner
        blocks = start // 256 + tl.arange(0, LINES)[:, None]
        place, limit = flat, slices * count
        mask = place < limit if MASKED else None
        block_mask = blocks * 256 < limit if MASKED else None
        first, line, column = _positions(start, width, LINES, WIDE)
        offsets = (first + line) * pitch + column if PITCHED else flat
    grads, moments, scales, params = _pointers(row, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, ALIGNED)
    loaded = _load(grads + offsets, mask, "evict_first")
    exp_avg, scale, param = _state(moments, scales, params, offsets, mask, blocks, block_mask, "evict_first")
    noise = _noise(row, STEP_DTYPE, ROUNDS)

    first_of_tile = first // height
    slice_index = first_of_tile + ((first - first_of_tile * height).to(INDEX) + line) // height.to(INDEX)
    rows = _pointer(row, ROWS_MAX if AMSGRAD else ROWS_SQ, COMPUTE, False) + (first + line)
    means = _pointer(row, ROW_MEANS, COMPUTE, False) + slice_index
    averages = _pointer(row, COLUMNS_MAX if AMSGRAD else COLUMNS_SQ, COMPUTE, ALIGNED if IN_ROWS else 0)
    averages += slice_index * width + column
    if IN_ROWS:
        averages += inner
    has_rows = place < tl.where(_field(row, ROWS_SQ) != 0, limit, 0)
    has_means = place < tl.where(_field(row, ROW_MEANS) != 0, limit, 0)
    has_columns = place < tl.where(_field(row, COLUMNS_SQ) != 0, limit, 0)
    if IN_ROWS and MASKED:
        has_columns = has_columns & mask
    second = tl.load(rows, mask=has_rows, other=1)
    mean = tl.load(means, mask=has_means, other=1)
    by_column = tl.load(averages, mask=has_columns, other=1)

    smallest: tl.constexpr = 2.2250738585072014e-308 if COMPUTE == tl.float64 else 1.1754943508222875e-38
    mean = tl.maximum(mean, smallest, propagate_nan=tl.PropagateNan.ALL)
    denominator = _denominator_of(_quotient(second, mean) * by_column, root, eps) + tl.zeros((LINES, 256), COMPUTE)
    grad = _gradient(loaded, grad_scale, MAXIMIZE, COMPUTE)
    _update_tile(grad, denominator, exp_avg, scale, param, moments, scales, params, offsets, mask, blocks, block_mask,
                 decay, step_size, beta1, noise, ROUNDS, "evict_first")  # fmt: skip


@triton.jit(do_not_specialize=["lr", "beta1", "beta2", "eps", "weight_decay"])
def update_spread(
    table, programs, counters, lr, beta1, beta2, eps, weight_decay, grad_scale, found_inf,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    STEP_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, ROUNDS: tl.constexpr,
    PITCHED: tl.constexpr, ALIGNED: tl.constexpr, SUMS_ALIGNED: tl.constexpr, IN_ROWS: tl.constexpr,
    WIDE: tl.constexpr, LINES: tl.constexpr, TILES: tl.constexpr,
    SUM_LINES: tl.constexpr, SUM_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update tensors whose second moments, by row, by column or both, are averages that several programs share.

    The work on a slab, which is a few slices or a strip of the columns of one, has four stages. Programs sum squared
    gradients, finish second moments, finish what needs a whole slice, and update. They take their work in the order in
    which they start, so that all that a program waits for has been taken by one that runs. The list of the work lets
    slabs overlap: hardly any program has to wait, and a gradient is still in the cache when it is read again.

    Args:
        programs: int32 ``[programs, PROGRAM]``, in order: tensor, stage, part of the stage, programs to wait for, first
            slice, slices, first column, columns or 0 for all, slab.
        counters: int32, zeros: programs that have started, and for each slab those that have announced their stores.
            None if second moments are finished already, and there is nothing but updates.
        SUMS_ALIGNED: As ``ALIGNED``, of the gradient alone and its rows as sums read them.
        IN_ROWS: Tiles are lines of up to 256 elements of one row each: what is kept by row is read once for a line.
        TILES: Tiles of ``LINES`` lines that a program updates one after the other.
        SUM_LINES, SUM_COLUMNS: Size of a tile of sums.
        BLOCK: Second moments by row, or numbers of a slice, that are finished at a time. All others are those of
            ``update_full``.
    """
    if _is_skipped(found_inf):
        return
    number = tl.program_id(0) if counters is None else tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
    program = programs + PROGRAM * number.to(tl.int64)
    row = table + tl.load(program).to(tl.int64) * FIELDS
    stage, part, awaited = tl.load(program + 1), tl.load(program + 2).to(tl.int64), tl.load(program + 3)
    first_slice, slices = tl.load(program + 4).to(tl.int64), tl.load(program + 5).to(tl.int64)
    first_column, columns = tl.multiple_of(tl.load(program + 6), 256), tl.load(program + 7)
    if IN_ROWS and ALIGNED != 0:
        columns = tl.multiple_of(columns, ALIGNED)
    # Zero stands for all, which may need 64 bits.
    columns = tl.where(columns == 0, _field(row, WIDTH, ALIGNED if IN_ROWS else 0), columns.to(tl.int64))
    first_column = first_column.to(tl.int64)
    done = None if counters is None else counters + 1 + tl.load(program + 8)
    beta1, beta2, eps = _number(beta1), _number(beta2), _number(eps)
    if stage == UPDATE:
        decay, step_size, root = _step_numbers(row, lr, weight_decay)
        count = slices * _field(row, SLICE_COUNT)
        whole = count  # elements of tiles without an end of a row or of the slab
        if IN_ROWS:
            lines = count // _field(row, WIDTH)
            count = lines * ((columns + 255) // 256 * 256)
            whole = tl.where(columns % 256 == 0, count, 0)
        if done is not None:
            _wait(done, awaited)
        last = tl.minimum(part * TILES + TILES, (count + LINES * 256 - 1) // (LINES * 256))
        for tile in range(part * TILES, last):
            if (tile + 1) * (LINES * 256) <= whole:
                _spread_tile(row, tile, first_slice, slices, first_column, columns, decay, step_size, root, beta1, eps,
                             grad_scale, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                             ROUNDS, PITCHED, ALIGNED, IN_ROWS, WIDE, LINES, False)  # fmt: skip
            else:
                _spread_tile(row, tile, first_slice, slices, first_column, columns, decay, step_size, root, beta1, eps,
                             grad_scale, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, COMPUTE, STEP_DTYPE, AMSGRAD, MAXIMIZE,
                             ROUNDS, PITCHED, ALIGNED, IN_ROWS, WIDE, LINES, True)  # fmt: skip
    elif counters is not None:
        if stage == SUM:
            _sum_squares(row, part, first_slice, first_column, columns, grad_scale,
                         GRAD_DTYPE, COMPUTE, SUMS_ALIGNED, SUM_LINES, SUM_COLUMNS)  # fmt: skip
        else:
            _wait(done, awaited)
            if stage == FINISH:
                _finish_sums(row, part, first_slice, slices, first_column, columns, beta2,
                             COMPUTE, AMSGRAD, SUM_LINES, SUM_COLUMNS, BLOCK)  # fmt: skip
            else:
                _finish_slice(row, first_slice + part, beta2, COMPUTE, AMSGRAD, SUM_LINES, BLOCK)
        tl.debug_barrier()  # all warps have stored what the next line announces
        tl.atomic_add(done, 1, sem="release", scope="gpu")
