"""Arithmetic of the update within a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    CORRECTIONS,
    EXP_AVG,
    EXP_AVG_SCALE,
    PARAM,
    SEED,
    STEP,
    pointer,
)

_MOMENTUM_BLOCK = tl.constexpr(256)
_MOMENTUM_CODES = tl.constexpr(127.0)


@triton.jit
def number(value):
    """Return in float64 a number that comes as the bits of a float64 or as a pointer."""
    if value.dtype.is_ptr():
        return tl.load(value).to(tl.float64)
    return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def step_numbers(row, lr, weight_decay):
    """Return decay factor, step size and root of the bias correction of one tensor, in float64.

    Args:
        row: The tensor's row of the table.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """
    lr = number(lr)
    corrections = pointer(row, CORRECTIONS, tl.float64, False)
    return 1 - lr * number(weight_decay), lr / tl.load(corrections), tl.load(corrections + 1)


@triton.jit
def load(pointers, mask):
    """Load, with 0 where ``mask`` is false; None: everything is inside.

    Args:
        pointers: Addresses of the elements.
        mask: Elements that exist; None: all.
    """
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def is_skipped(found_inf):
    """Return whether ``GradScaler`` found a gradient that is not finite."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


@triton.jit
def gradient(loaded, grad_scale, MAXIMIZE: tl.constexpr, COMPUTE: tl.constexpr):
    """Return a gradient in the precision of the arithmetic, unscaled, of the function to minimize.

    Args:
        loaded: The gradient as it lies in memory.
        grad_scale: Address of the number that it is divided by, or None.
        MAXIMIZE: Whether the gradient is negated.
        COMPUTE: Precision of the arithmetic.
    """
    grad = loaded.to(COMPUTE)
    if grad_scale is not None:
        grad = grad / tl.load(grad_scale).to(COMPUTE)
    if MAXIMIZE:
        grad = -grad
    return grad


@triton.jit
def next_second_moment(
    row, MOMENTS: tl.constexpr, MAXIMA: tl.constexpr, index, mask, mean_square, beta2,
    COMPUTE: tl.constexpr, AMSGRAD: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Update second moments, and with ``AMSGRAD`` their maxima, and return those that the update divides by.

    ``SHARED``: several warps load the same second moment and go on to divide by it, while one of them stores it.

    Args:
        row: The tensor's row of the table.
        MOMENTS: Field of the second moments.
        MAXIMA: Field of their maxima.
        index: Positions of the elements.
        mask: Elements that exist; None: all.
        mean_square: Means of squared gradients.
        beta2: Decay rate of the second moment.
        COMPUTE: Precision of the arithmetic.
        AMSGRAD: Whether maxima are kept.
        ALIGNED: Whether addresses and sizes are multiples of 16.
        SHARED: Whether several threads load what one of them stores.
    """
    moments = pointer(row, MOMENTS, COMPUTE, ALIGNED)
    second = load(moments + index, mask) * beta2.to(COMPUTE) + mean_square * (1 - beta2).to(COMPUTE)
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
    """Return a first moment after a step.

    Args:
        exp_avg: The first moment.
        grad: The gradient.
        beta1: Decay rate of the first moment.
        COMPUTE: Precision of the arithmetic.
    """
    old = exp_avg.to(COMPUTE)
    return old + (1 - beta1).to(COMPUTE) * (grad - old)


@triton.jit
def denominator_of(second_moment, root, eps, COMPUTE: tl.constexpr):
    """Return ``sqrt(v_hat) + eps``.

    Args:
        second_moment: The second moment.
        root: Root of its bias correction.
        eps: Added to the root.
        COMPUTE: Precision of the arithmetic.
    """
    if COMPUTE == tl.float64:
        return tl.sqrt(second_moment) / root + eps
    else:
        return tl.div_rn(tl.sqrt_rn(second_moment), root.to(COMPUTE)) + eps.to(COMPUTE)


@triton.jit
def stepped(param, exp_avg, denominator, decay, step_size, COMPUTE: tl.constexpr):
    """Return a parameter after weight decay and step.

    Args:
        param: The parameter.
        exp_avg: The first moment.
        denominator: Divides the first moment.
        decay: Factor of weight decay.
        step_size: Step size with bias correction.
        COMPUTE: Precision of the arithmetic.
    """
    decayed = param.to(COMPUTE) * decay.to(COMPUTE)
    if COMPUTE == tl.float64:
        return decayed - step_size * (exp_avg / denominator)
    else:
        return decayed - step_size.to(COMPUTE) * tl.div_rn(exp_avg, denominator)


@triton.jit
def _random_bits(index, seed, step):
    """Return 32 well-mixed bits of an element's index, a seed and a step."""
    mixed = index.to(tl.uint32) ^ (seed.to(tl.uint32) + step.to(tl.uint32) * 0x9E3779B9)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return mixed ^ (mixed >> 16)


@triton.jit
def as_stored(value, index, row, STEP_DTYPE: tl.constexpr, PARAM_DTYPE: tl.constexpr, ROUNDS: tl.constexpr):
    """Return a parameter in the precision it is kept in; with ``ROUNDS`` rounded up or down at random.

    Args:
        value: The values.
        index: Positions of the elements.
        row: The tensor's row of the table.
        STEP_DTYPE: Precision of the step count.
        PARAM_DTYPE: Precision of the parameter.
        ROUNDS: Whether it is rounded at random.
    """
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
    """Return float32 ``[ROWS, COLUMNS]`` from codes of that shape and scales ``[ROWS, COLUMNS // 256]``.

    Args:
        codes: Codes, int8.
        scales: Scales, uint8.
        ROWS: Rows of the tile.
        COLUMNS: Columns of the tile.
    """
    BLOCKS: tl.constexpr = COLUMNS // _MOMENTUM_BLOCK
    root = tl.reshape(codes, (ROWS, BLOCKS, _MOMENTUM_BLOCK)).to(tl.float32) / _MOMENTUM_CODES
    scale = (scales.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    value = tl.where(root < 0, -root, root) * root * tl.expand_dims(scale, 2)
    return tl.reshape(value, (ROWS, COLUMNS))


@triton.jit
def encoded(value, grad, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return codes ``[ROWS, COLUMNS]`` and scales ``[ROWS, COLUMNS // 256]`` of float32 values.

    Args:
        value: The values.
        grad: The gradient.
        ROWS: Rows of the tile.
        COLUMNS: Columns of the tile.
    """
    BLOCKS: tl.constexpr = COLUMNS // _MOMENTUM_BLOCK
    blocks = tl.reshape(value, (ROWS, BLOCKS, _MOMENTUM_BLOCK))
    moving = tl.reshape(grad, (ROWS, BLOCKS, _MOMENTUM_BLOCK)) != 0
    size = tl.abs(blocks)
    largest = tl.max(tl.where(size == size, size, float("inf")), axis=2)
    exponent = (largest.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    root = tl.sqrt_rn(size / tl.expand_dims(tl.where(scale > 0, scale, 1.0), 2)) * _MOMENTUM_CODES
    root = tl.where(root <= _MOMENTUM_CODES, root, 0.0)
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
    """Update first moment and parameter of one tile, whose gradient and denominator are known.

    Args:
        row: The tensor's row of the table.
        grad: The gradient.
        denominator: Divides the first moment.
        offsets: Positions of the elements.
        mask: Elements that exist; None: all.
        blocks: Positions of the blocks of codes.
        block_mask: Blocks that exist; None: all.
        decay: Factor of weight decay.
        step_size: Step size with bias correction.
        beta1: Decay rate of the first moment.
        PARAM_DTYPE: Precision of the parameter.
        MOMENT_DTYPE: Precision of the first moment.
        COMPUTE: Precision of the arithmetic.
        STEP_DTYPE: Precision of the step count.
        ROUNDS: Whether it is rounded at random.
        ALIGNED: Whether addresses and sizes are multiples of 16.
        LINES: Rows of the tile.
        COLUMNS: Columns of the tile.
    """
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
