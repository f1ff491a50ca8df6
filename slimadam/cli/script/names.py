"""One set of parameter names over all optimizers of a script, the same in ``calibrate`` and in ``run``."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from slimadam.layers.names import NamedParameters, owning_modules, position_name
from slimadam.layers.roles import class_name


def as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """What a script passes to an optimizer, as parameter groups whose parameters are lists."""
    given = list(params)
    groups = [{"params": given}] if given and not isinstance(given[0], dict) else given
    return [{**group, "params": as_list(group["params"])} for group in groups]


def as_list(params: Any) -> list[Any]:
    """The parameters of a group: a single tensor, or anything iterable."""
    return [params] if isinstance(params, Tensor) else list(params)


def pairs(
    items: Iterable[Any], named: NamedParameters, group_index: int, shared: Container[str] = ()
) -> list[tuple[str, Tensor]]:
    """``(name, tensor)`` for each parameter of a group.

    Args:
        items: Tensors, or pairs with names that the script gave; these stay, but for shared ones.
        named: Names of the others; those that it does not know are called by their position.
        group_index: Position of the group.
        shared: Names that the script gave to several parameters.
    """
    found = []
    for index, item in enumerate(items):
        given, tensor = (None, item) if isinstance(item, Tensor) else item
        if given is None or given in shared:
            given = named.name(tensor) or given or position_name(group_index, index)
        found.append((given, tensor))
    return found


def prefix_of(parameters: Iterable[Tensor]) -> str:
    """What tells optimizers' parameters apart: the class of the outermost module that owns them."""
    roots = owning_modules(list(parameters))
    return class_name(_unwrapped(roots[0])) if roots else "optimizer"


def prefixed(prefix: str, name: str) -> Iterator[str]:
    """``Critic.fc.weight``, ``Critic#2.fc.weight``, ... without end."""
    yield f"{prefix}.{name}"
    yield from (f"{prefix}#{number}.{name}" for number in itertools.count(2))


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = dict(module.named_children())
    if len(inner) == 1 and next(iter(inner)) in {"module", "_orig_mod"}:
        return _unwrapped(next(iter(inner.values())))
    return module
