"""Averaging over adjacent dimensions as a reduction over the middle of a three-dimensional view."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a dense tensor lies in memory, and its averaged dimensions there.

    Attributes:
        order: The tensor's dimensions from the slowest to the fastest; ``tensor.permute(order)`` is contiguous.
        pre: Number of slices before the averaged dimensions.
        red: Number of elements averaged together (1 if nothing is averaged).
        post: Number of slices after the averaged dimensions.
    """

    order: tuple[int, ...]
    pre: int
    red: int
    post: int


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions from the largest to the smallest stride; the order of the shape where strides tie."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))


def layout(tensor: Tensor, dims: tuple[int, ...]) -> Layout | None:
    """The ``[pre, red, post]`` view of a tensor for averaging over ``dims``.

    Args:
        tensor: A parameter of any shape.
        dims: Dimensions that are averaged together.

    Returns:
        The layout, or None if the tensor has holes or ``dims`` are not adjacent in memory.
    """
    if tensor.is_contiguous():
        order = tuple(range(tensor.dim()))
    else:
        order = memory_order(tensor)
        if not tensor.permute(order).is_contiguous():
            return None
    wide = [dim for dim in order if tensor.shape[dim] > 1]
    averaged = [index for index, dim in enumerate(wide) if dim in dims]
    if not averaged:
        return Layout(order, tensor.numel(), 1, 1)
    first, last = averaged[0], averaged[-1]
    if last - first + 1 != len(averaged):
        return None
    sizes = [tensor.shape[dim] for dim in wide]
    return Layout(order, math.prod(sizes[:first]), math.prod(sizes[first : last + 1]), math.prod(sizes[last + 1 :]))
