"""Second moments in one byte: a floating-point number without sign, 7 bits of exponent and one of mantissa.

A code from 1 to 254 is the float32 whose bits are ``(code + 125) << 22``: 1, 1.5, 2, 3, 4, 6 ... times a power of two,
from ``2**-64``, whose root is a fortieth of AdamW's ``eps``, to ``1.5 * 2**62``, where gradients are 2.6e9. 0 is zero,
and 255 infinity or no number. Values below the smallest number are rounded up to it, those above the largest down.

An exponential average moves by less than such a step, so rounding to nearest would stop it. It is rounded up or down at
random, so that the expectation is the value: random bits are added below the last one that is kept. They come from the
step count and the upper half of the parameter's bits, so that every implementation, every way to shard a tensor or to
scale its gradient gets the same ones, and a parameter that differs in its last bits, too.

Rounding makes a moment of steady gradients noisy, an SNR of about 5. Each rounding multiplies a moment by a random
factor, so that noise grows where gradients fall by orders of magnitude within a few times ``1 / (1 - beta2)`` steps:
after a fall to a hundredth updates are up to about twice as large until the moment has caught up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CODES = torch.uint8
"""Dtype of codes."""
OFFSET = 125
"""What is added to a code to get the upper bits of a float32."""
DROPPED = 22
"""Number of lower bits of a float32 that a code lacks."""
LARGEST = 254
"""The largest code of a finite number."""
NOT_FINITE = 255

_INFINITE_BITS = 0x7F800000
_WORD, _UPPER_HALF = 0xFFFFFFFF, 0xFFFF0000
_GOLDEN, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_AT_ONCE = 1 << 16  # elements whose 64-bit integers are held at a time
_DECODED_AT_ONCE = 1 << 20  # elements whose 32-bit integers and masks are


def is_coded(moment: Tensor) -> bool:
    """Return whether a second moment is stored in codes."""
    return moment.dtype == CODES


def decode(codes: Tensor) -> Tensor:
    """Return the numbers that codes stand for, in float32, decoded some rows at a time.

    Args:
        codes: uint8, any shape.
    """
    if torch.compiler.is_compiling() or codes.numel() <= _DECODED_AT_ONCE:
        return _decode(codes)
    return decode_to(torch.empty_like(codes, dtype=torch.float32), codes)


def decode_to(target: Tensor, codes: Tensor) -> Tensor:
    """Write the numbers that codes stand for, some rows at a time, and return the tensor that holds them.

    Args:
        target: Any floating point, of the shape of ``codes``; written.
        codes: uint8.
    """
    for part, own in _in_blocks(_DECODED_AT_ONCE, target, codes):
        part.copy_(_decode(own))
    return target


def _decode(codes: Tensor) -> Tensor:
    value = codes.to(torch.int32).add_(OFFSET).bitwise_left_shift_(DROPPED).view(torch.float32)
    return value.masked_fill_(codes == 0, 0.0).masked_fill_(codes == NOT_FINITE, torch.inf)


def values_of(moment: Tensor) -> Tensor:
    """Return a second moment itself, decoded where it is stored in codes."""
    return decode(moment) if is_coded(moment) else moment


def encode(value: Tensor, param: Tensor, step: Tensor) -> Tensor:
    """Return the codes of a second moment, rounded at random, some rows at a time.

    Args:
        value: The second moment, not negative, any shape.
        param: The parameter before the step, of the same shape.
        step: Number of the step, 0-dimensional.

    Returns:
        uint8, of the shape and strides of ``value``.
    """
    if torch.compiler.is_compiling() or value.numel() <= _AT_ONCE:
        return _encode(value, param, step)
    codes = torch.empty_like(value, dtype=CODES)
    for target, own, its_param in _in_blocks(_AT_ONCE, codes, value, param):
        target.copy_(_encode(own, its_param, step))
    return codes


def _in_blocks(elements: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape some rows at a time, of about as many elements."""
    shape, count = tensors[0].shape, tensors[0].numel()
    if count <= elements:
        yield tensors
        return
    dim = next(dim for dim, size in enumerate(shape) if size > 1)
    rows = max(1, elements * shape[dim] // count)
    yield from zip(*(torch.split(tensor, rows, dim) for tensor in tensors), strict=True)


def _encode(value: Tensor, param: Tensor, step: Tensor) -> Tensor:
    bits = _bits(value)
    rounded = ((bits + _random_bits(param, step)) >> DROPPED) - OFFSET
    codes = torch.where(bits == 0, 0, rounded.clamp(1, LARGEST))
    return torch.where((bits & 0x7FFFFFFF) >= _INFINITE_BITS, NOT_FINITE, codes).to(CODES)


def _random_bits(param: Tensor, step: Tensor) -> Tensor:
    """Return 22 random bits for each element, as int64."""
    number = step.to(device=param.device, dtype=torch.int64) * _GOLDEN & _WORD
    mixed = _bits(param) & _UPPER_HALF ^ number
    mixed = (mixed ^ mixed >> 16) * _FIRST & _WORD
    mixed = (mixed ^ mixed >> 15) * _SECOND & _WORD
    return (mixed ^ mixed >> 16) >> (32 - DROPPED)


def _bits(value: Tensor) -> Tensor:
    """Return the bits of numbers as float32, as int64 with the sign of an int32."""
    return value.to(torch.float32).view(torch.int32).to(torch.int64)
