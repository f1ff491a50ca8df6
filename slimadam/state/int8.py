"""First moments in one byte per element: codes in int8, and a scale for each block of 256.

A block's scale ``s`` is its absolute maximum, rounded up to a power of two; an element ``m`` is stored as
``q = sign(m) round(127 sqrt(|m| / s))`` and read as ``sign(q) (q / 127)**2 s``.

Why a power of two: it is a float32's exponent and nothing else, one byte, and dividing by it and multiplying with it
round nothing. Less than twice the maximum, it leaves at most the codes above 89 unused; only where the maximum is below
``2**-126``, float32's smallest power with an exponent, it leaves more. The exponent 255 is infinity's: a block with an
element above ``2**127``, or with one that is not finite, reads as NaN.

Why the square: a first moment is divided by the root of the second, so that an element a hundred times smaller than
its block's largest moves its parameter as far if its second moment is as much smaller. Evenly spaced codes give such an
element one step of 127 and everything below half of it none. Squared codes are finest around zero: the smallest they
know is ``s / 16129``, and the distance between neighbours, ``2 sqrt(|m| s) / 127``, shrinks with the element.
``python -m benchmarks.momentum`` compares them with others on a training's own moments.

Rounding to nearest has a trap: once decaying by ``beta1`` changes a code by less than a half, the code never changes
again. A parameter that gets no gradient, such as an embedding's row whose token does not occur, would then move on for
ever. Where the gradient is exactly zero, codes are therefore rounded down.

Blocks run over the elements in the order of memory. A DTensor has codes where every shard consists of whole blocks of
the whole tensor, on however many ranks: where what follows the last sharded dimension has a multiple of 256 elements.
Scales are then a DTensor too, of the shape of the dimensions up to that one and the number of blocks in what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimadam.utils.dtensor import is_dtensor, laid_out_as, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

BLOCK = 256
"""Elements that share a scale."""

_LARGEST = 127
_INFINITE = 255
_BLOCKS_AT_ONCE = 1024  # one MiB of float32: arithmetic on them stays in cache and takes little memory


def can_follow(param: Tensor) -> bool:
    """Return whether codes can have a parameter's layout, on any number of ranks that share it."""
    if not is_dtensor(param):
        return True
    in_order = torch.empty(param.shape, device="meta").stride()
    sliced = _sliced_dims(param)
    whole_blocks = not sliced or math.prod(param.shape[sliced:]) % BLOCK == 0
    return whole_blocks and not param.is_complex() and param.stride() == in_order


def _sliced_dims(param: DTensor) -> int:
    """How many dimensions there are up to the last one that is sharded."""
    placements: tuple[Any, ...] = param.placements
    return max((placement.dim + 1 for placement in placements if not placement.is_replicate()), default=0)


def new_codes(param: Tensor) -> Tensor:
    """Return codes of zero with the parameter's shape and layout; a complex one's parts are apart."""
    real = torch.view_as_real(param) if param.is_complex() else param
    return torch.zeros_like(real, dtype=torch.int8, memory_format=torch.preserve_format)


def new_scales(codes: Tensor) -> Tensor:
    """Return scales of zero, one for each block of the codes."""
    shape, held = scales_shape(codes), local(codes)
    if not is_dtensor(codes):
        return torch.zeros(shape, dtype=torch.uint8, device=codes.device)
    zeros = torch.zeros((*held.shape[: len(shape) - 1], shape[-1]), dtype=torch.uint8, device=held.device)
    return laid_out_as(codes, zeros, shape)


def scales_shape(codes: Tensor) -> tuple[int, ...]:
    """Return the shape of the scales of codes; of a DTensor the global one."""
    sliced = _sliced_dims(codes) if is_dtensor(codes) else 0
    return (*codes.shape[:sliced], scale_count(math.prod(codes.shape[sliced:])))


def scale_count(elements: int) -> int:
    """Return the number of blocks of a number of codes; the last may be shorter."""
    return math.ceil(elements / BLOCK)


def scales_of(piece: Tensor, codes: Tensor, scales: Tensor) -> Tensor | None:
    """Return the scales of a piece of the codes, or None if it does not consist of whole blocks.

    Args:
        piece: A view of the codes, or the codes themselves.
        codes: int8, all of a parameter.
        scales: One for each block of them.
    """
    if piece is codes:
        return scales
    first = piece.storage_offset() - codes.storage_offset()
    if first % BLOCK or piece.numel() % BLOCK or not (piece.is_contiguous() and codes.is_contiguous()):
        return None
    return scales[first // BLOCK : (first + piece.numel()) // BLOCK]


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Compute the first moment from its codes.

    Args:
        codes: int8, any shape, dense in memory.
        scales: uint8, ``[ceil(codes.numel() / 256)]``, for blocks in the order in which the codes lie in memory: the
            biased exponents of float32 powers of two. 0 reads as zero, 255 as infinity.

    Returns:
        float32, with the shape and strides of ``codes``. A block that is not finite reads as NaN.
    """
    value = torch.empty_like(codes, dtype=torch.float32, memory_format=torch.preserve_format)
    value.copy_(codes).div_(_LARGEST)
    for (block,), scale in _blocks(codes, scales, value):
        block.mul_(block.abs()).mul_(_power_of_two(scale))
    return value


def encode(value: Tensor, grad: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write a first moment to its codes and scales.

    A block with a NaN, an infinity or an element above ``2**127`` gets the scale infinity and codes of zero.

    Args:
        value: float32, of the shape of ``codes``.
        grad: The gradient just added to it, of that shape: where it is exactly zero, codes are rounded down. Pass
            ``value`` itself to round every code to nearest.
        codes: int8, dense in memory; written.
        scales: uint8, as in :func:`decode`; written.
    """
    for (block, new, written), scale in _blocks(codes, scales, value, grad, codes):
        magnitude = block.abs()
        scale.copy_(_exponent_above(magnitude.amax(1, keepdim=True)))
        # NaN, which zero over zero is too, becomes the code zero: as an integer it would be undefined.
        root = magnitude.div_(_power_of_two(scale)).sqrt_().mul_(_LARGEST).nan_to_num_(nan=0.0)
        code = torch.where(new == 0, root.floor(), root.round())
        written.copy_(code.copysign_(block))


def reset(codes: Tensor, scales: Tensor, index: Tensor, dim: int) -> None:
    """Set codes to zero at some positions along a dimension, and the scales of their blocks that are not finite.

    Args:
        codes: int8, dense in memory; written.
        scales: uint8, as in :func:`decode`; written.
        index: Positions along ``dim``.
        dim: The dimension.
    """
    touched = torch.zeros_like(codes, memory_format=torch.preserve_format).index_fill_(dim, index, 1)
    codes.index_fill_(dim, index, 0)
    for (block,), scale in _blocks(codes, scales, touched):
        scale.masked_fill_((block.amax(1, keepdim=True) > 0) & (scale == _INFINITE), 0)


def _exponent_above(largest: Tensor) -> Tensor:
    """Biased exponents, as int32, of the smallest powers of two not below non-negative float32; overwrites those.

    0 for zero, at least 1 for everything else, 255 for what is above ``2**127`` or not a number.
    """
    # The bits of a NaN would overflow.
    bits = largest.nan_to_num_(nan=math.inf, posinf=math.inf).view(torch.int32)
    return bits.add_(0x7FFFFF).bitwise_right_shift_(23)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float32 with biased exponents and nothing else."""
    return exponent.to(torch.int32).bitwise_left_shift_(23).view(torch.float32)


def _blocks(codes: Tensor, scales: Tensor, *tensors: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The tensors as ``[some, 256]`` in the order of the codes in memory, some blocks at a time, then what is left.

    With them come their scales, ``[some, 1]``. What is left is ``[1, fewer]``.
    """
    strides = codes.stride()
    order = sorted(range(codes.dim()), key=lambda dim: -strides[dim])
    flat = [tensor.permute(order).reshape(-1) for tensor in tensors]
    whole, left = divmod(codes.numel(), BLOCK)
    for first in range(0, whole, _BLOCKS_AT_ONCE):
        end = min(first + _BLOCKS_AT_ONCE, whole)
        yield [tensor[first * BLOCK : end * BLOCK].view(-1, BLOCK) for tensor in flat], scales[first:end].unsqueeze(1)
    if left:
        yield [tensor[whole * BLOCK :].unsqueeze(0) for tensor in flat], scales[whole:].unsqueeze(1)
