"""Second moments in one byte: a floating-point number without sign, 7 bits of exponent and one of mantissa.

A code from 1 to 254 is the float32 whose bits are ``(code + 77) << 22``: 1, 1.5, 2, 3, 4, 6 ... times a power of two,
from ``2**-88`` (its root is far below any ``eps``) to ``1.5 * 2**38``. 0 is zero, and 255 infinity or no number.

An exponential average moves by less than such a step, so rounding to nearest would stop it. It is rounded up or down at
random, so that the expectation is the value: random bits are added below the last one that is kept. They come from the
step count and the upper half of the gradient's bits alone, so that every implementation and every way to shard a tensor
gets the same ones, and a gradient that differs in its last bits, too.
Values below the smallest number are rounded up to it, those above the largest down.
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = 77
"""What is added to a code to get the upper bits of a float32."""
DROPPED = 22
"""Number of lower bits of a float32 that a code lacks."""
LARGEST = 254
"""The largest code of a finite number."""
NOT_FINITE = 255

_INFINITE_BITS = 0x7F800000
_WORD, _UPPER_HALF = 0xFFFFFFFF, 0xFFFF0000
_GOLDEN, _FIRST, _SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def is_coded(moment: Tensor) -> bool:
    """Return whether a second moment is stored in codes."""
    return moment.dtype == torch.uint8


def decode(codes: Tensor) -> Tensor:
    """Return the numbers that codes stand for, in float32.

    Args:
        codes: uint8, any shape.
    """
    wide = codes.to(torch.int32)
    value = ((wide + OFFSET) << DROPPED).view(torch.float32)
    return torch.where(wide == 0, 0.0, torch.where(wide > LARGEST, torch.inf, value))


def values_of(moment: Tensor) -> Tensor:
    """Return a second moment itself, decoded where it is stored in codes."""
    return decode(moment) if is_coded(moment) else moment


def encode(value: Tensor, grad: Tensor, step: Tensor) -> Tensor:
    """Return the codes of a second moment, rounded at random.

    Args:
        value: The second moment, not negative, any shape.
        grad: The gradient of this step, of the same shape; it decides the random bits, together with the step.
        step: Number of the step, 0-dimensional.

    Returns:
        uint8, of the shape and strides of ``value``.
    """
    bits = value.to(torch.float32).view(torch.int32).to(torch.int64)
    rounded = ((bits + _random_bits(grad, step)) >> DROPPED) - OFFSET
    codes = torch.where(bits == 0, 0, rounded.clamp(1, LARGEST))
    return torch.where((bits & 0x7FFFFFFF) >= _INFINITE_BITS, NOT_FINITE, codes).to(torch.uint8)


def _random_bits(grad: Tensor, step: Tensor) -> Tensor:
    """Return 22 random bits for each element, as int64."""
    number = step.to(device=grad.device, dtype=torch.int64) * _GOLDEN & _WORD
    mixed = (grad.to(torch.float32).view(torch.int32).to(torch.int64) & _UPPER_HALF) ^ number
    mixed = (mixed ^ mixed >> 16) * _FIRST & _WORD
    mixed = (mixed ^ mixed >> 15) * _SECOND & _WORD
    return (mixed ^ mixed >> 16) >> (32 - DROPPED)
