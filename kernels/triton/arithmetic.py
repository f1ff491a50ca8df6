"""The arithmetic of the Triton kernels, and how they load and store what it works on.

Numbers that are Python floats arrive as the bits of a float64, because Triton would pass a float32; those that are
tensors arrive as pointers, so that the host never waits for the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import CORRECTIONS, EXP_AVG, EXP_AVG_SCALE, PARAM, SEED, STEP, pointer

MOMENTUM_BLOCK = tl.constexpr(256)
MOMENTUM_CODES = tl.constexpr(127.0)


@triton.jit
def number(value):
    """A number that comes as the bits of a float64 or as a pointer, in float64."""
    if value.dtype.is_ptr():
        return tl.load(value).to(tl.float64)
    return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def step_numbers(row, lr, weight_decay):
    """Decay factor, step size and root of the bias correction of one tensor, in float64."""
    lr = number(lr)
    corrections = pointer(row, CORRECTIONS, tl.float64, False)
    return 1 - lr * number(weight_decay), lr / tl.load(corrections), tl.load(corrections + 1)


@triton.jit
def load(pointers, mask):
    """What lies there, and 0 where ``mask`` says no; None: everything is inside."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def is_skipped(found_inf):
    """Whether ``GradScaler`` found a gradient that is not finite."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def gradient(loaded, grad_scale, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """A gradient in the precision of the arithmetic, no longer scaled, of what is minimized."""
    grad = loaded.to(COMPUTE)
    if grad_scale is not None:
        grad = grad / tl.load(grad_scale).to(COMPUTE)
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def averaged(moment, mean_square, beta2):
    """A second moment after a step."""
    return moment * beta2.to(moment.dtype) + mean_square * (1 - beta2).to(moment.dtype)


@triton.jit
def next_second_moment(
    row, MOMENTS: tl.constexpr, MAXIMA: tl.constexpr, index, mask, mean_square, beta2,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Update second moments, and with ``AMSGRAD`` their maxima, and return what the step divides by.

    ``SHARED``: several warps load the same second moment and go on to divide by it, while one of them stores it.
    """
    moments = pointer(row, MOMENTS, COMPUTE, ALIGNED)
    second = averaged(load(moments + index, mask), mean_square, beta2)
    if SHARED:
        tl.debug_barrier()  # else a late warp loads what is stored here already, and lets it decay twice
    tl.store(moments + index, second, mask=mask)
    if AMSGRAD:
        maxima = pointer(row, MAXIMA, COMPUTE, ALIGNED)
        second = tl.maximum(load(maxima + index, mask), second, propagate_nan=tl.PropagateNan.ALL)
        tl.store(maxima + index, second, mask=mask)
    return second


@triton.jit
def next_first_moment(exp_avg, grad, beta1, COMPUTE: tl.constexpr):
    """A first moment after a step."""
    old = exp_avg.to(COMPUTE)
    return old + (1 - beta1).to(COMPUTE) * (grad - old)


@triton.jit
def denominator_of(second_moment, root, eps, COMPUTE: tl.constexpr):
    """What the step divides by."""
    if COMPUTE == tl.float64:
        return tl.sqrt(second_moment) / root + eps
    else:
        return tl.div_rn(tl.sqrt_rn(second_moment), root.to(COMPUTE)) + eps.to(COMPUTE)


@triton.jit
def stepped(param, exp_avg, denominator, decay, step_size, COMPUTE: tl.constexpr):
    """A parameter after weight decay and step."""
    decayed = param.to(COMPUTE) * decay.to(COMPUTE)
    if COMPUTE == tl.float64:
        return decayed - step_size * (exp_avg / denominator)
    else:
        return decayed - step_size.to(COMPUTE) * tl.div_rn(exp_avg, denominator)


@triton.jit
def _random_bits(index, seed, step):
    """32 well-mixed bits of an element's index, a seed and a step."""
    mixed = index.to(tl.uint32) ^ (seed.to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return mixed ^ (mixed >> 16)


@triton.jit
def as_stored(value, index, row, STEP_DTYPE: tl.constexpr, PARAM_DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """A parameter in the precision it is kept in; with ``ROUNDS`` up or down at random."""
    if ROUNDS:
        step = tl.load(tl.load(row + STEP).to(tl.pointer_type(STEP_DTYPE))).to(tl.int64)
        noise = _random_bits(index, tl.load(row + SEED), step) & 0xFFFF
        bits = (value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        finite = tl.abs(value) < float("inf")
        return tl.where(finite, bits.to(tl.float32, bitcast=True), value).to(PARAM_DTYPE)
    elif PARAM_DTYPE == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(PARAM_DTYPE)


@triton.jit
def decoded(codes, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 ``[ROWS, COLUMNS]`` from codes of that shape and scales ``[ROWS, COLUMNS // 256]``."""
    BLOCKS: tl.constexpr = COLUMNS // MOMENTUM_BLOCK
    root = tl.reshape(codes, (ROWS, BLOCKS, MOMENTUM_BLOCK)).to(tl.float32) / MOMENTUM_CODES
    scale = (scales.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    value = tl.where(root < 0, -root, root) * root * tl.expand_dims(scale, 2)
    return tl.reshape(value, (ROWS, COLUMNS))


@triton.jit
def encoded(value, grad, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes ``[ROWS, COLUMNS]`` and scales ``[ROWS, COLUMNS // 256]`` of float32 values."""
    BLOCKS: tl.constexpr = COLUMNS // MOMENTUM_BLOCK
    blocks = tl.reshape(value, (ROWS, BLOCKS, MOMENTUM_BLOCK))
    moving = tl.reshape(grad, (ROWS, BLOCKS, MOMENTUM_BLOCK)) != 0
    size = tl.abs(blocks)
    largest = tl.max(tl.where(size == size, size, float("inf")), axis=2)
    exponent = (largest.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    root = tl.sqrt_rn(size / tl.expand_dims(tl.where(scale > 0, scale, 1.0), 2)) * MOMENTUM_CODES
    root = tl.where(root <= MOMENTUM_CODES, root, 0.0)
    nearest = (root + 12582912.0) - 12582912.0
    code = tl.where(moving, nearest, tl.floor(root))
    code = tl.where(blocks < 0, -code, code).to(tl.int8)
    return tl.reshape(code, (ROWS, COLUMNS)), exponent.to(tl.uint8)


@triton.jit
def update_tile(
    row, grad, denominator, offsets, mask, blocks, block_mask, decay, step_size, beta1,
    PARAM_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr, COMPUTE: tl.constexpr, STEP_DTYPE: tl.constexpr,
    ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """First moment, weight decay and step of one tile, whose gradient and denominator are known."""
    moments = pointer(row, EXP_AVG, MOMENT_DTYPE, ALIGNED)
    loaded = load(moments + offsets, mask)
    if MOMENT_DTYPE == tl.int8:
        scales = pointer(row, EXP_AVG_SCALE, tl.uint8, False)
        old = decoded(loaded, load(scales + blocks, block_mask), LINES, COLUMNS)
        exp_avg = next_first_moment(old, grad, beta1, COMPUTE)
        codes, new_scales = encoded(exp_avg, grad, LINES, COLUMNS)
        tl.store(moments + offsets, codes, mask=mask)
        tl.store(scales + blocks, new_scales, mask=block_mask)
    elif MOMENT_DTYPE == tl.float64:
        exp_avg = next_first_moment(loaded, grad, beta1, COMPUTE)
        tl.store(moments + offsets, exp_avg, mask=mask)
    else:
        kept = next_first_moment(loaded, grad, beta1, COMPUTE).to(tl.float32).to(MOMENT_DTYPE)
        tl.store(moments + offsets, kept, mask=mask)
        exp_avg = kept.to(COMPUTE)
    params = pointer(row, PARAM, PARAM_DTYPE, ALIGNED)
    param = load(params + offsets, mask)
    moved = stepped(param, exp_avg, denominator, decay, step_size, COMPUTE)
    tl.store(params + offsets, as_stored(moved, offsets, row, STEP_DTYPE, PARAM_DTYPE, ROUNDS), mask=mask)
