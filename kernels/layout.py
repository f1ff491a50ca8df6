"""Averaging over adjacent dimensions as a reduction over the middle of a three-dimensional view."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
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


def layout(tensor: Tensor, dims: tuple[int, ...]) -> Layout | None:
    """The ``[pre, red, post]`` view of a tensor for averaging over ``dims``.

    Args:
        tensor: A parameter of any shape.
        dims: Dimensions that are averaged together.

    Returns:
        The layout, or None if the tensor has holes or ``dims`` are not adjacent in memory.
    """
    return layout_of(tuple(tensor.shape), tensor.stride(), tensor.is_contiguous(), dims)


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool, dims: tuple[int, ...]
) -> Layout | None:
    """:func:`layout` of a tensor of this shape and these strides."""
    order = tuple(range(len(shape)))
    if not contiguous:
        order = tuple(sorted(order, key=lambda dim: -strides[dim]))
        dense = 1
        for dim in reversed(order):
            if shape[dim] > 1 and strides[dim] != dense:
                return None
            dense *= shape[dim]
    wide = [dim for dim in order if shape[dim] > 1]
    averaged = [index for index, dim in enumerate(wide) if dim in dims]
    if not averaged:
        return Layout(order, math.prod(shape), 1, 1)
    first, last = averaged[0], averaged[-1]
    if last - first + 1 != len(averaged):
        return None
    sizes = [shape[dim] for dim in wide]
    return Layout(order, math.prod(sizes[:first]), math.prod(sizes[first : last + 1]), math.prod(sizes[last + 1 :]))


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether any two tensors without holes share memory, as parameters tied through ``.data`` do."""
    spans = sorted((one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in tensors)
    return any(end > start for (_, end), (start, _) in pairwise(spans))
