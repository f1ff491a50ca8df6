"""Splits fused parameters of a model into their logical matrices, as its modules tell.

A parameter counts as one matrix where no module says where one ends and the next begins; a plan or
``parts={"pattern": Split(...)}`` can declare it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from slimadam.layers.name_patterns import WRAPPERS
from slimadam.layers.roles import ParameterRole, canonical_name, names_of, roles_of
from slimadam.layers.splits import Piece, Split, check_declared, pieces
from slimadam.utils.errors import PlanError, shown

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_kv_heads", "num_query_groups")
_INTERLEAVED_PER_HEAD = ("GPTNeoX", "Bloom")
_ORDER_UNKNOWN = ("Falcon", "CodeGen")


def pieces_of(
    model: nn.Module, parts: Mapping[str, Split], roles: Mapping[str, ParameterRole] | None = None
) -> dict[str, list[Piece]]:
    """Find the logical matrices of each parameter.

    Args:
        model: Any module, wrapped or not.
        parts: Declared splits by pattern (``fnmatch``) of any of a parameter's names; these go before the modules.
        roles: Result of :func:`~slimadam.layers.roles.roles_of`, where at hand.

    Returns:
        For each name of ``model.named_parameters()`` its pieces: one where it is a single matrix.

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
            split = _parts_from_modules(modules, name, shape, roles[name])
        found[name] = pieces(name, shape, roles[name], split)
    return found


def declared_parts(parts: Mapping[str, Split], names: Sequence[str]) -> Split | None:
    """Return the split declared by the first pattern that one of a parameter's names matches; None without one.

    Args:
        parts: Declared splits by pattern.
        names: Names of the parameter.
    """
    return next((found for pattern, found in parts.items() if matches_any(pattern, names)), None)


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
        parts: Declared splits by pattern; None is nothing.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``parts`` is no mapping from patterns to :class:`~slimadam.Split`.
        PlanError: A pattern matches nothing, or declared parts do not fit a parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={shown(model)} must be an nn.Module, the one that the plan is for")
    parts = check_declared(parts)
    check_all_matched(parts, (name for names in names_of(model).values() for name in names))
    return pieces_of(model, parts)


def check_all_matched(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Check that each pattern matches a name.

    Args:
        patterns: Patterns of ``parts``.
        names: All names, wrapped or not.

    Raises:
        PlanError: Names the pattern.
    """
    known = [canonical_name(name) for name in names]
    for pattern in patterns:
        if not matches_any(pattern, known):
            raise PlanError(f"parts: the pattern {pattern!r} matches no parameter of the model; correct or remove it")


def _parts_from_modules(
    modules: Mapping[str, nn.Module], name: str, shape: tuple[int, ...], role: ParameterRole
) -> Split | None:
    if role.role not in ("fused_qkv", "fused_gate_up") or len(role.fan_out) != 1:
        return None
    path = name.split(".")[:-1]
    owner = modules[".".join(path)]
    while path and path[-1] in WRAPPERS:
        path.pop()
    if "parametrizations" in path:
        return None
    find = _gate_up if role.role == "fused_gate_up" else _query_key_value
    return find(owner, modules[".".join(path[:-1])], shape, role)


def _gate_up(owner: nn.Module, parent: nn.Module, shape: tuple[int, ...], role: ParameterRole) -> Split | None:
    (dim,) = role.fan_out
    if shape[dim] % 2:
        return None
    batch_dims = min(*role.fan_in, *role.fan_out)
    half = shape[dim] // 2
    if any(type(module).__name__.startswith("GptOss") for module in (owner, parent)):
        view = (*shape[:dim], half, 2, *shape[dim + 1 :])
        return Split({"mlp_gate": 1, "mlp_up": 1}, dim + 1, view, batch_dims)
    return Split({"mlp_gate": half, "mlp_up": half}, dim, None, batch_dims)


def _query_key_value(owner: nn.Module, parent: nn.Module, shape: tuple[int, ...], role: ParameterRole) -> Split | None:
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
    return Split(
        {"query": heads * head_size, "key": key_value_heads * head_size, "value": key_value_heads * head_size}, dim
    )


def _thirds(size: int, dim: int) -> Split | None:
    if size % 3:
        return None
    return Split({"query": size // 3, "key": size // 3, "value": size // 3}, dim)


def _integer_attribute(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of these attributes that is a positive integer, on the module or on its ``config``."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
