"""Averaging over adjacent dimensions as a reduction over the middle of a three-dimensional view."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from slimadam.functional import Entry


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


def geometry(entry: Entry) -> Layout:
    """How an entry is seen as ``[pre, red, post]``, with no order where it lies in that of its dimensions.

    All three are 0 of an empty parameter.

    Args:
        entry: Tensors for whose averages :func:`layout` found a view; of rows and columns, the rows decide.
    """
    param = entry.param
    return _geometry_of(param.shape, param.stride(), param.is_contiguous(), tuple(entry.averaged_dims))


@lru_cache(maxsize=4096)
def _geometry_of(
    shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool, averaged_dims: tuple[tuple[int, ...], ...]
) -> Layout:
    if 0 in shape:
        return Layout((), 0, 0, 0)
    if len(averaged_dims) == 2:
        (row_dim,) = averaged_dims[1]
        return Layout((), math.prod(shape[:row_dim]), shape[row_dim], math.prod(shape[row_dim + 1 :]))
    found = layout_of(shape, strides, contiguous, averaged_dims[0])
    assert found is not None
    return found._replace(order=()) if contiguous else found


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether any two tensors without holes share memory, as parameters tied through ``.data`` do."""
    spans = sorted((one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in tensors)
    return any(end > start for (_, end), (start, _) in pairwise(spans))
