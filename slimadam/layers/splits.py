"""Logical matrices inside one stored parameter: fused projections, heads, stacked experts.

A fused query-key-value weight is one tensor and three matrices. Each part has its own rule; in plans and histories it
goes by the parameter's name with its label in brackets, ``"attn.c_attn.weight[query]"``. Modules tell where one matrix
ends and the next begins; where they do not, a parameter counts as one matrix, unless a plan or
``parts={"pattern": Split(...)}`` declares its parts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from slimadam.layers.name_patterns import WRAPPERS, canonical_name, names_of
from slimadam.layers.name_patterns import key_of as key_of
from slimadam.layers.name_patterns import owner_of as owner_of
from slimadam.layers.roles import ParameterRole, roles_of
from slimadam.utils.errors import PlanError, shown

Shape = tuple[int, ...]

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_kv_heads", "num_query_groups")
_INTERLEAVED_PER_HEAD = ("GPTNeoX", "Bloom")
_ORDER_UNKNOWN = ("Falcon", "CodeGen")


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
        full = tensor if self.view == self.of else tensor.view(self.view)
        return full.narrow(self.dim, self.start, self.size)


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
        is_mapping = isinstance(self.sizes, Mapping) and all(isinstance(label, str) for label in self.sizes)
        if not is_mapping or not _are_integers(self.sizes.values()):
            raise ValueError(f"sizes={self.sizes!r} must give each part's label and length, such as {{'query': 768}}")
        for name in ("dim", "batch_dims"):
            if not _are_integers([getattr(self, name)]):
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer")
        if self.view is not None and not (isinstance(self.view, (tuple, list)) and _are_integers(self.view)):
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
        if not 0 <= self.batch_dims <= max(0, len(view) - 2):
            raise PlanError(
                f"{name!r}: batch_dims={self.batch_dims} of its parts must leave a matrix of the view {view}"
            )
        parts, start = [], 0
        for label, size in self.sizes.items():
            if not label or set(label) & set("[]"):
                raise PlanError(f"{name!r}: the label {label!r} of its parts must be a word without brackets")
            parts.append(Part(label, shape, view, self.dim, start, size))
            start += size
        check_parts(name, parts, shape)
        return parts


def _are_integers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def check_declared(parts: object) -> Mapping[str, Split]:
    """Return the ``parts`` argument; None is nothing. Raise :class:`ValueError` if it maps no patterns to splits."""
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


def pieces(name: str, shape: Shape, role: ParameterRole, split: Split | None) -> list[Piece]:
    """Return the logical matrices of one parameter.

    Args:
        name: Its name, for errors.
        shape: Its shape.
        role: Its role and layout.
        split: How it falls into parts, which may not fit it (:class:`PlanError`); None where it does not.
    """
    if split is None:
        inner = [*role.fan_in, *role.fan_out]
        return [Piece(shape, role, None, min(inner) if inner and len(shape) > 2 else 0)]
    found = []
    for part in split.divide(name, shape):
        groups = split_dims(name, shape, part.view)
        fans = (tuple(dim for old in fan for dim in groups[old]) for fan in (role.fan_in, role.fan_out))
        found.append(Piece(part.shape, ParameterRole(part.label, *fans), part, split.batch_dims))
    return found


def check_parts(name: str, parts: Sequence[Part], shape: Shape) -> None:
    """Raise :class:`PlanError` unless parts are together exactly the parameter.

    Args:
        name: The parameter's name, for errors.
        parts: Its parts.
        shape: Its shape.
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
        view: Its view.

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
    if at != len(view) or tuple(math.prod(view[dim] for dim in group) for group in groups) != shape:
        raise PlanError(f"{name!r}: view={view} must split dimensions of the parameter's shape {shape}")
    return groups


def pieces_of(
    model: nn.Module, parts: Mapping[str, Split], roles: Mapping[str, ParameterRole] | None = None
) -> dict[str, list[Piece]]:
    """Return the logical matrices of each parameter, by the names of ``model.named_parameters()``.

    Args:
        model: Any module, wrapped or not.
        parts: Declared splits by pattern (``fnmatch``) of any of a parameter's names; these go before the modules.
        roles: Result of :func:`~slimadam.layers.roles.roles_of`, where at hand.

    Raises:
        PlanError: Declared parts do not fit a parameter.
    """
    roles = roles_of(model) if roles is None else roles
    modules, names = dict(model.named_modules()), names_of(model)
    found = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        split = declared_parts(parts, names[parameter])
        if split is None and parameter.numel() and not parameter.is_complex():
            split = _split_by_modules(modules, name, shape, roles[name])
        found[name] = pieces(name, shape, roles[name], split)
    return found


def declared_parts(parts: Mapping[str, Split], names: Sequence[str]) -> Split | None:
    """Return the split declared by the first pattern that one of a parameter's names matches; None without one.

    Args:
        parts: Declared splits by pattern.
        names: Names of the parameter.
    """
    return next((split for pattern, split in parts.items() if matches_any(pattern, names)), None)


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Return whether one of the names matches.

    Args:
        pattern: As for ``fnmatch``.
        names: Any names.
    """
    return any(fnmatchcase(name, pattern) for name in names)


def pieces_of_target(model: nn.Module, parts: Mapping[str, Split] | None) -> dict[str, list[Piece]]:
    """Check both arguments, and return :func:`pieces_of` the model that a plan is made for.

    Args:
        model: Any module.
        parts: Declared splits by pattern, each of which matches something; None is nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)} must be an nn.Module, the one that the plan is for")
    parts = check_declared(parts)
    check_all_matched(parts, (name for names in names_of(model).values() for name in names))
    return pieces_of(model, parts)


def check_all_matched(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raise :class:`PlanError` where a pattern of ``parts`` matches no name.

    Args:
        patterns: The patterns.
        names: All names, wrapped or not.
    """
    known = [canonical_name(name) for name in names]
    for pattern in patterns:
        if not matches_any(pattern, known):
            raise PlanError(f"parts: the pattern {pattern!r} matches no parameter of the model; correct or remove it")


def _split_by_modules(modules: Mapping[str, nn.Module], name: str, shape: Shape, role: ParameterRole) -> Split | None:
    if role.role not in ("fused_qkv", "fused_gate_up") or len(role.fan_out) != 1:
        return None
    path = name.split(".")[:-1]
    owner = modules[".".join(path)]
    while path and path[-1] in WRAPPERS:
        path.pop()
    if "parametrizations" in path:
        return None
    split = _gate_up if role.role == "fused_gate_up" else _query_key_value
    return split(owner, modules[".".join(path[:-1])], shape, role)


def _gate_up(owner: nn.Module, parent: nn.Module, shape: Shape, role: ParameterRole) -> Split | None:
    (dim,) = role.fan_out
    half, odd = divmod(shape[dim], 2)
    if odd:
        return None
    batch_dims = min(*role.fan_in, dim)
    if any(type(module).__name__.startswith("GptOss") for module in (owner, parent)):
        view = (*shape[:dim], half, 2, *shape[dim + 1 :])
        return Split({"mlp_gate": 1, "mlp_up": 1}, dim + 1, view, batch_dims)
    return Split({"mlp_gate": half, "mlp_up": half}, dim, None, batch_dims)


def _query_key_value(owner: nn.Module, parent: nn.Module, shape: Shape, role: ParameterRole) -> Split | None:
    (dim,) = role.fan_out
    size = shape[dim]
    if isinstance(owner, nn.MultiheadAttention):
        return _thirds(size, dim)
    heads = _integer_attribute(parent, _HEADS)
    if type(parent).__name__.startswith(_INTERLEAVED_PER_HEAD):
        if heads is None or size % (3 * heads) or dim != 0 or len(shape) != 2:
            return None
        view = (heads, 3, size // (3 * heads), shape[1])
        return Split({"query": 1, "key": 1, "value": 1}, 1, view, 2)
    if type(parent).__name__.startswith(_ORDER_UNKNOWN):
        return None
    key_value_heads = _integer_attribute(parent, _KEY_VALUE_HEADS) or heads
    if heads is None or key_value_heads is None or size % (heads + 2 * key_value_heads):
        return _thirds(size, dim) if key_value_heads == heads else None
    head_size = size // (heads + 2 * key_value_heads)
    if (_integer_attribute(parent, ("head_dim",)) or head_size) != head_size:
        return None
    inner = key_value_heads * head_size
    return Split({"query": heads * head_size, "key": inner, "value": inner}, dim)


def _thirds(size: int, dim: int) -> Split | None:
    return None if size % 3 else Split(dict.fromkeys(("query", "key", "value"), size // 3), dim)


def _integer_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of these attributes that is a positive integer, on the module or on its ``config``."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Split]:
        if name == "Parts":
            warnings.warn("slimadam.Parts is now called slimadam.Split", DeprecationWarning, stacklevel=2)
            return Split
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
