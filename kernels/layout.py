"""Averaging over adjacent dimensions as a reduction over the middle of a three-dimensional view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .interface import Entry

is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor
"""Return whether a tensor is a zero without memory of its own."""


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


class Geometry(NamedTuple):
    """How an update sees a parameter, or a part of one.

    Attributes:
        order: As in :class:`Layout`; empty where the parameter lies in the order of its dimensions.
        pre: Slices,
        red: elements averaged together,
        post: and slices after them; of rows and columns, the rows are ``red``. All are 0 of an empty parameter.
        pitch: Elements from one row to the next; a row has ``post`` elements, or ``red`` where ``post`` is 1.
    """

    order: tuple[int, ...]
    pre: int
    red: int
    post: int
    pitch: int


def geometry(entry: Entry) -> Geometry:
    """How an entry is seen, for which :func:`geometry_of` found a way."""
    found = geometry_of(entry.param, entry.averaged_dims)
    assert found is not None
    return found


def geometry_of(param: Tensor, averaged_dims: Sequence[tuple[int, ...]]) -> Geometry | None:
    """How an update sees a parameter.

    Args:
        param: A parameter or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.

    Returns:
        None if averaged dimensions are not adjacent in memory, or rows not equally far apart.
    """
    return _geometry_of(param.shape, param.stride(), param.is_contiguous(), tuple(averaged_dims))


@lru_cache(maxsize=4096)
def _geometry_of(
    shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool, averaged_dims: tuple[tuple[int, ...], ...]
) -> Geometry | None:
    if 0 in shape:
        return Geometry((), 0, 0, 0, 0)
    if len(averaged_dims) == 2:
        (row_dim,) = averaged_dims[1]
        pre, red, post = math.prod(shape[:row_dim]), shape[row_dim], math.prod(shape[row_dim + 1 :])
        if contiguous:
            return Geometry((), pre, red, post, post)
        rows = Rows.of(shape, strides)
        return Geometry((), pre, red, post, rows.pitch) if rows is not None and rows.width == post > 1 else None
    found = layout_of(shape, strides, contiguous, averaged_dims[0])
    if found is not None:
        order, pre, red, post = found
        return Geometry(() if contiguous else order, pre, red, post, red if post == 1 else post)
    rows = Rows.of(shape, strides)
    return None if rows is None else _with_gaps(rows, shape, averaged_dims[0])


def has_gaps(tensor: Tensor) -> bool:
    """Whether memory between a tensor's elements is not its own."""
    return not tensor.is_contiguous() and layout(tensor, ()) is None


class Rows(NamedTuple):
    """A tensor as rows that are dense, and equally far apart.

    Attributes:
        inner: The first dimension that lies within a row.
        number: Rows,
        width: their elements,
        pitch: and elements from one to the next.
    """

    inner: int
    number: int
    width: int
    pitch: int

    @classmethod
    def of(cls, shape: tuple[int, ...], strides: tuple[int, ...]) -> Rows | None:
        """The widest rows of a tensor with elements, or None if they are not equally far apart."""
        inner, width = len(shape), 1
        while inner > 0 and (shape[inner - 1] == 1 or strides[inner - 1] == width):
            inner -= 1
            width *= shape[inner]
        if inner == 0:
            return cls(0, 1, width, width)
        pitch = expected = strides[inner - 1]
        for dim in reversed(range(inner)):
            if shape[dim] > 1 and strides[dim] != expected:
                return None
            expected *= shape[dim]
        return cls(inner, math.prod(shape[:inner]), width, pitch)


def _with_gaps(rows: Rows, shape: tuple[int, ...], dims: tuple[int, ...]) -> Geometry | None:
    """Averages within rows, over all rows, or none."""
    if rows.pitch < rows.width:
        return None
    wide = {dim for dim in range(len(shape)) if shape[dim] > 1}
    averaged = wide.intersection(dims)
    if not averaged:
        return Geometry((), rows.number, 1, rows.width, rows.pitch)
    if averaged == {dim for dim in wide if dim >= rows.inner}:
        return Geometry((), rows.number, rows.width, 1, rows.pitch)
    if averaged == {dim for dim in wide if dim < rows.inner} and rows.width > 1:
        return Geometry((), 1, rows.number, rows.width, rows.pitch)
    return None


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether any two tensors share memory, as parameters tied through ``.data`` do.

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
    """Bytes from a tensor's first element to behind its last."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def is_marked(grad: Tensor) -> bool:
    """Whether memory does not hold a gradient's values: it is negated when it is read, or zero without memory."""
    return grad.is_neg() or is_zero_tensor(grad)
