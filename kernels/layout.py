"""Averaging over adjacent dimensions as a reduction over the middle of a three-dimensional view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .interface import Dims

is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor
"""Return whether a tensor is a zero without memory of its own."""


class Layout(NamedTuple):
    """The ``[pre, red, post]`` view in which an update sees a parameter, or a part of one.

    Attributes:
        order: The tensor's dimensions from the slowest to the fastest, so that ``tensor.permute(order)`` is
            contiguous. Empty where they lie in their own order.
        pre: Number of slices before the averaged dimensions.
        red: Number of elements averaged together; of rows and columns (factored) the number of rows.
        post: Number of slices after the averaged dimensions. All three are 0 for an empty parameter.
        pitch: Elements from one row to the next; a row has ``post`` elements, or ``red`` where ``post`` is 1.
    """

    order: tuple[int, ...]
    pre: int
    red: int
    post: int
    pitch: int


def layout(param: Tensor, averaged_dims: Sequence[Dims]) -> Layout | None:
    """Return how an update sees a parameter.

    Args:
        param: A parameter or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.

    Returns:
        None if averaged dimensions are not adjacent in memory, or rows not equally far apart.
    """
    return _layout(param.shape, param.stride(), param.is_contiguous(), tuple(averaged_dims))


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool, averaged_dims: tuple[Dims, ...]
) -> Layout | None:
    if 0 in shape:
        return Layout((), 0, 0, 0, 0)
    if len(averaged_dims) == 2:
        (row_dim,) = averaged_dims[1]
        pre, red, post = math.prod(shape[:row_dim]), shape[row_dim], math.prod(shape[row_dim + 1 :])
        if contiguous:
            return Layout((), pre, red, post, post)
        rows = _rows(shape, strides)
        return None if rows is None or rows.width != post else Layout((), pre, red, post, rows.pitch)
    order = tuple(range(len(shape))) if contiguous else _order(shape, strides)
    if order is None:
        return _with_gaps(shape, strides, averaged_dims[0])
    wide = [dim for dim in order if shape[dim] > 1]
    averaged = [index for index, dim in enumerate(wide) if dim in averaged_dims[0]]
    first, end = (averaged[0], averaged[-1] + 1) if averaged else (len(wide), len(wide))
    if end - first != len(averaged):
        return None
    sizes = [shape[dim] for dim in wide]
    pre, red, post = (math.prod(part) for part in (sizes[:first], sizes[first:end], sizes[end:]))
    return Layout(() if contiguous else order, pre, red, post, red if post == 1 else post)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return a tensor's dimensions from the slowest to the fastest, or None if there are gaps between its elements."""
    return tuple(range(tensor.dim())) if tensor.is_contiguous() else _order(tensor.shape, tensor.stride())


@lru_cache(maxsize=4096)
def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    order = tuple(sorted(range(len(shape)), key=lambda dim: -strides[dim]))
    dense = 1
    for dim in reversed(order):
        if shape[dim] > 1 and strides[dim] != dense:
            return None
        dense *= shape[dim]
    return order


def has_gaps(tensor: Tensor) -> bool:
    """Return whether memory between a tensor's elements is not its own."""
    return memory_order(tensor) is None


class _Rows(NamedTuple):
    """A tensor as dense rows, equally far apart; its dimensions from ``inner`` on lie within a row."""

    inner: int
    number: int
    width: int
    pitch: int


def _rows(shape: tuple[int, ...], strides: tuple[int, ...]) -> _Rows | None:
    """Return the widest rows of a tensor with elements, or None if they are not equally far apart."""
    inner, width = len(shape), 1
    while inner > 0 and (shape[inner - 1] == 1 or strides[inner - 1] == width):
        inner -= 1
        width *= shape[inner]
    pitch = expected = strides[inner - 1] if inner else width
    for dim in reversed(range(inner)):
        if shape[dim] > 1 and strides[dim] != expected:
            return None
        expected *= shape[dim]
    return _Rows(inner, math.prod(shape[:inner]), width, pitch)


def _with_gaps(shape: tuple[int, ...], strides: tuple[int, ...], dims: Dims) -> Layout | None:
    """Return the layout for averages within rows, over all rows, or none."""
    rows = _rows(shape, strides)
    if rows is None or rows.pitch < rows.width:
        return None
    wide = {dim for dim in range(len(shape)) if shape[dim] > 1}
    averaged = wide.intersection(dims)
    if not averaged:
        return Layout((), rows.number, 1, rows.width, rows.pitch)
    if averaged == {dim for dim in wide if dim >= rows.inner}:
        return Layout((), rows.number, rows.width, 1, rows.pitch)
    if averaged == {dim for dim in wide if dim < rows.inner} and rows.width > 1:
        return Layout((), 1, rows.number, rows.width, rows.pitch)
    return None


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Return whether any two tensors share memory, as parameters tied through ``.data`` do.

    Views of one tensor with gaps, as its parts are, count as one.
    """
    spans: list[tuple[int, int]] = []
    views: dict[int, tuple[int, int]] = {}
    for tensor in tensors:
        start = tensor.data_ptr()
        base = tensor._base  # the tensor of which this one is a view
        if tensor.is_contiguous() or base is None:
            spans.append((start, start + _extent(tensor)))
        else:
            first, last = views.get(id(base), (start, start))
            views[id(base)] = min(first, start), max(last, start + _extent(tensor))
    ordered = sorted([*spans, *views.values()])
    return any(end > start for (_, end), (start, _) in pairwise(ordered))


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to behind its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def is_marked(grad: Tensor) -> bool:
    """Return whether memory does not hold a gradient's values: it is negated when read, or a zero without memory."""
    return grad.is_neg() or is_zero_tensor(grad)
