"""Logical matrices inside one stored parameter: fused projections, heads, stacked experts.

A fused query-key-value weight is one tensor and three matrices. Each part has its own rule; in plans and histories it
goes by the parameter's name with its label in brackets, ``"attn.c_attn.weight[query]"``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from slimadam.layers.roles import ParameterRole
from slimadam.utils.errors import PlanError, shown

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A range along one dimension of a view of a parameter.

    Attributes:
        label: Its name, for instance ``"query"``.
        of: Shape of the whole parameter.
        view: Shape that the parameter is read as: ``of``, or ``of`` with dimensions split (heads).
        dim: Dimension of the view along which the parts lie.
        start: First index along it.
        size: Size along it.
    """

    label: str
    of: Shape
    view: Shape
    dim: int
    start: int
    size: int

    @property
    def shape(self) -> Shape:
        """Shape of the part."""
        return *self.view[: self.dim], self.size, *self.view[self.dim + 1 :]

    def take(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor of shape ``of``, as a view."""
        whole = tensor if self.view == self.of else tensor.view(self.view)
        return whole.narrow(self.dim, self.start, self.size)


@dataclass(frozen=True)
class Split:
    """The logical matrices in a stored parameter.

    Attributes:
        sizes: Label and size of each part along ``dim``, in their order. Labels that are roles, such as ``"query"``,
            count as the role of their part.
        dim: Dimension (of ``view``) along which the parts lie.
        view: Shape to read the parameter as, which may split its dimensions: a query weight ``[heads * size, in]``
            with ``sizes={"heads": heads}, view=(heads, size, in)`` is measured head by head. None: as it is stored.
        batch_dims: Number of leading dimensions of the view that count separate matrices.

    Raises:
        ValueError: A value has another type than these.
    """

    sizes: Mapping[str, int]
    dim: int = 0
    view: Shape | None = None
    batch_dims: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Mapping) or not all(
            isinstance(label, str) and _is_integer(size) for label, size in self.sizes.items()
        ):
            raise ValueError(f"sizes={self.sizes!r} must give each part's label and length, such as {{'query': 768}}")
        for name in ("dim", "batch_dims"):
            if not _is_integer(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer")
        if self.view is not None and not (
            isinstance(self.view, (tuple, list)) and all(_is_integer(size) for size in self.view)
        ):
            raise ValueError(f"view={self.view!r} must be a tuple of integers, such as (12, 64, 768), or None")

    def divide(self, name: str, shape: Shape) -> list[Part]:
        """Return the parts of a parameter.

        Args:
            name: The parameter's name, for errors.
            shape: The parameter's shape.

        Raises:
            PlanError: The parts do not fit the shape.
        """
        view = shape if self.view is None else tuple(self.view)
        for label in self.sizes:
            if not label or set(label) & set("[]"):
                raise PlanError(f"{name!r}: the label {label!r} of its parts must be a word without brackets")
        if not 0 <= self.batch_dims <= max(0, len(view) - 2):
            raise PlanError(
                f"{name!r}: batch_dims={self.batch_dims} of its parts must leave a matrix of the view {view}"
            )
        parts, start = [], 0
        for label, size in self.sizes.items():
            parts.append(Part(label, shape, view, self.dim, start, size))
            start += size
        check_parts(name, parts, shape)
        return parts


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_declared(parts: object) -> Mapping[str, Split]:
    """Return the ``parts`` argument, the splits of parameters by pattern of their names; None is nothing.

    Raises:
        ValueError: It is no mapping from patterns to :class:`Split`.
    """
    if parts is None:
        return {}
    if not isinstance(parts, Mapping) or not all(
        isinstance(pattern, str) and isinstance(value, Split) for pattern, value in parts.items()
    ):
        raise ValueError(
            f"parts={shown(parts)} must give a slimadam.Split for each pattern of names, such as "
            "{'*.qkv.weight': Split({'query': 768, 'key': 768, 'value': 768})}"
        )
    return parts


class Piece(NamedTuple):
    """A whole parameter, or one part of it: each has a rule of its own.

    Attributes:
        shape: Its shape.
        role: Its role and layout.
        part: The part; None for a whole parameter.
        batch_dims: Number of leading dimensions that count separate matrices.
    """

    shape: Shape
    role: ParameterRole
    part: Part | None = None
    batch_dims: int = 0


def key_of(name: str, part: Part | None) -> str:
    """Return the key of a piece in plans and histories.

    Args:
        name: The parameter's name.
        part: The part; None for a whole parameter.
    """
    return name if part is None else f"{name}[{part.label}]"


def owner_of(key: str, part: Part | None) -> str:
    """Return the parameter's name from :func:`key_of`.

    Args:
        key: The key of a piece.
        part: The part; None for a whole parameter.
    """
    return key if part is None else key.removesuffix(f"[{part.label}]")


def pieces(name: str, shape: Shape, role: ParameterRole, parts: Split | None) -> list[Piece]:
    """Return the pieces of one parameter.

    Args:
        name: Its name, for errors.
        shape: Its shape.
        role: Its role and layout.
        parts: Its logical matrices; None where it is one.

    Raises:
        PlanError: The parts do not fit the shape.
    """
    if parts is None:
        inner = {*role.fan_in, *role.fan_out}
        batch_dims = min(inner) if inner and len(shape) > 2 else 0
        return [Piece(shape, role, None, batch_dims)]
    found = []
    for part in parts.divide(name, shape):
        groups = split_dims(name, shape, part.view)
        fans = (tuple(dim for old in fan for dim in groups[old]) for fan in (role.fan_in, role.fan_out))
        found.append(Piece(part.shape, ParameterRole(part.label, *fans), part, parts.batch_dims))
    return found


def check_parts(name: str, parts: Sequence[Part], shape: Shape) -> None:
    """Check that parts are together exactly the parameter.

    Args:
        name: The parameter's name, for errors.
        parts: Its parts.
        shape: Its shape.

    Raises:
        PlanError: Names the part that does not fit.
    """
    first = parts[0] if parts else Part("", shape, shape, 0, 0, 0)
    if first.of != shape:
        raise PlanError(
            f"{name!r}: the plan's parts are of shape {first.of}, the parameter has {shape}; calibrate this model"
        )
    split_dims(name, shape, first.view)
    if not 0 <= first.dim < len(first.view):
        raise PlanError(f"{name!r}: dim={first.dim} of its parts is out of range for the view {first.view}")
    if len({part.label for part in parts}) != len(parts):
        raise PlanError(f"{name!r}: two of its parts have the same label; rename one")
    end = 0
    for part in sorted(parts, key=lambda part: part.start):
        if (part.of, part.view, part.dim) != (first.of, first.view, first.dim):
            raise PlanError(f"{name!r}: its parts {first.label!r} and {part.label!r} are read in different ways")
        if part.start != end or part.size < 1:
            raise PlanError(
                f"{name!r}: its part {part.label!r} starts at {part.start} with size {part.size}, where {end} is next; "
                "parts must follow each other without gaps"
            )
        end += part.size
    if end != first.view[first.dim]:
        raise PlanError(
            f"{name!r}: its parts cover {end} of {first.view[first.dim]} along dimension {first.dim} of {first.view}"
        )


def split_dims(name: str, shape: Shape, view: Shape) -> list[tuple[int, ...]]:
    """Return the dimensions of ``view`` that each dimension of ``shape`` is split into.

    Args:
        name: The parameter's name.
        shape: Its shape.
        view: A view of it that splits dimensions.

    Raises:
        PlanError: The view does not only split dimensions.

    Example:
        >>> split_dims("query.weight", (768, 512), (12, 64, 512))
        [(0, 1), (2,)]
    """
    groups: list[tuple[int, ...]] = []
    at = 0
    for size in shape:
        begin = at
        while at < len(view) and (at == begin or math.prod(view[begin:at]) < size):
            at += 1
        groups.append(tuple(range(begin, at)))
    if at != len(view) or any(math.prod(view[dim] for dim in group) != size
                              for group, size in zip(groups, shape, strict=True)):  # fmt: skip
        raise PlanError(f"{name!r}: view={view} must split dimensions of the parameter's shape {shape}")
    return groups


if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Split]:
        if name == "Parts":
            warnings.warn("slimadam.Parts is now called slimadam.Split", DeprecationWarning, stacklevel=2)
            return Split
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
