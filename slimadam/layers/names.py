"""Qualified names of parameters: from a module, from an optimizer, or from the modules alive in the process."""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from slimadam.layers.name_patterns import canonical_name, names_of
from slimadam.layers.roles import ParameterRole, class_name, roles_of
from slimadam.layers.splits import Piece, Split, check_all_matched, check_declared, matches_any, pieces, pieces_of
from slimadam.utils.errors import PlanError
from slimadam.utils.torch_private import HAS_WEAK_TENSORS, by_tensor

logger = logging.getLogger("slimadam")

_Layout = tuple[ParameterRole, list[Piece]]

_POSITION = re.compile(r"param_groups\.\d+\.params\.\d+(\[.*\])?")
_IN_FRONT = re.compile(r"param_groups\.\d+\.params\.\d+(\.|$)")


def position_name(group: int, index: int) -> str:
    """Return the name of a parameter that has none: its place in the optimizer.

    Args:
        group: Position of its group.
        index: Position in the group.
    """
    return f"param_groups.{group}.params.{index}"


def is_position(key: str) -> bool:
    """Return whether a parameter, or a part of one, is called by its place in the optimizer."""
    return _POSITION.fullmatch(key) is not None


def renumbered(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return names, group by group, with every place as it is now: the names in a new optimizer of the same groups.

    A place stands for a name, or in front of a name that an earlier parameter has.
    """
    now: dict[str, str] = {}
    taken: set[str] = set()
    for group_index, own in enumerate(names):
        for index, name in enumerate(own):
            place, user_name = position_name(group_index, index), _IN_FRONT.sub("", name, count=1)
            if name not in now:  # a parameter may be there repeatedly
                now[name] = place if not user_name else f"{place}.{user_name}" if user_name in taken else user_name
                taken.add(now[name])
    return [[now[name] for name in own] for own in names]


class NamedParameters:
    """Names of parameters and the logical matrices in them, looked up by the tensor itself.

    Args:
        models: Modules that own the parameters. Where one name stands for different parameters of several
            modules, the later ones get their class name in front, and a number where that is taken too.
        parts: The logical matrices in parameters, by pattern, where their modules do not say.

    Attributes:
        known: All names.
        matched: The patterns of ``parts`` that match a name.
    """

    def __init__(self, models: Iterable[nn.Module] = (), parts: Mapping[str, Split] | None = None) -> None:
        self._names: MutableMapping[Tensor, str] = by_tensor()
        self._all_names: MutableMapping[Tensor, list[str]] = by_tensor()
        self._layouts: MutableMapping[Tensor, _Layout] = by_tensor()
        self._owners: MutableMapping[Tensor, int] = by_tensor()
        self._parts = parts or {}
        self._unread = list(models)  # modules whose layers nobody has asked for yet
        taken: set[str] = set()
        for index, model in enumerate(self._unread):
            for parameter, names in names_of(model).items():
                if parameter not in self._names:
                    self._names[parameter] = free = _free_name(names[0], model, taken)
                    self._all_names[parameter], self._owners[parameter] = names, index
                    taken.add(free)
        self.known = taken.union(*self._all_names.values())
        self.matched = {pattern for pattern in self._parts if matches_any(pattern, self.known)}

    def name(self, parameter: Tensor) -> str | None:
        """Return the parameter's qualified name without wrapper prefixes, or None if no module owns it."""
        return self._names.get(parameter)

    def all_names(self, parameter: Tensor) -> list[str]:
        """Return every name that its module has for the parameter: several where tied, none if no module owns it."""
        return self._all_names.get(parameter, [])

    def pieces(self, parameter: Tensor) -> list[Piece]:
        """Return the parameter's logical matrices; without a role if no module owns it."""
        layout = self._layout(parameter)
        return layout[1] if layout else pieces("", tuple(parameter.shape), ParameterRole(""), None)

    def role(self, parameter: Tensor) -> ParameterRole | None:
        """Return role and layout of the parameter as a whole, or None if no module owns it."""
        layout = self._layout(parameter)
        return layout[0] if layout else None

    def owner(self, parameter: Tensor) -> int | None:
        """Return which of the modules owns the parameter, the first of several; None if none does."""
        return self._owners.get(parameter)

    def owned(self, parameter: Tensor) -> bool:
        """Return whether a module owns the parameter."""
        return self._layout(parameter) is not None

    def read_layers(self) -> None:
        """Read the layers of the modules, unless that is done, and let go of these."""
        for model in self._unread:
            layouts = _layouts_of(model, self._parts)
            for name, parameter in model.named_parameters():
                if name in layouts:
                    self._layouts.setdefault(parameter, layouts[name])
        self._unread = []

    def _layout(self, parameter: Tensor) -> _Layout | None:
        self.read_layers()
        return self._layouts.get(parameter)

    @classmethod
    def of_optimizer(
        cls, optimizer: Optimizer, model: nn.Module | None = None, parts: Mapping[str, Split] | None = None
    ) -> NamedParameters:
        """Name all parameters of an optimizer.

        Names come from ``model``; without one, from the names the optimizer was given; without those, from the
        modules alive in the process; parameters that no module owns are called by their position.

        Args:
            optimizer: Any torch optimizer.
            model: The module that owns its parameters, where at hand.
            parts: The logical matrices in parameters, by pattern, where their modules do not say.

        Raises:
            ValueError: ``parts`` is of the wrong type.
            PlanError: A pattern matches no parameter.
        """
        parts = check_declared(parts)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        user_names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        named = cls(owning_modules(parameters) if model is None else [model], parts)
        if model is None and len(user_names) == len(parameters):
            pairs = list(zip(parameters, map(canonical_name, user_names), strict=True))
            shared = shared_names(pairs)
            named._names.update(pair for pair in pairs if pair[1] not in shared)
        check_all_matched([pattern for pattern in parts if pattern not in named.matched], named._names.values())
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                named._names.setdefault(parameter, position_name(group_index, index))
        return named


def _layouts_of(model: nn.Module, parts: Mapping[str, Split]) -> dict[str, _Layout]:
    if any(map(is_lazy, model.parameters())):
        return {}  # read again once all shapes are known
    try:
        roles = roles_of(model)
        return {name: (roles[name], found) for name, found in pieces_of(model, parts, roles).items()}
    except PlanError:
        raise
    except Exception as error:  # a module class of others may do anything; names are enough to go on
        logger.warning("the layers of %s cannot be told from its modules (%r)", type(model).__name__, error)
        return {}


def shared_names(pairs: Iterable[tuple[Tensor, str]]) -> set[str]:
    """Return the names that stand for several parameters, as names in two modules of one optimizer may."""
    first: dict[str, Tensor] = {}
    return {name for parameter, name in pairs if first.setdefault(name, parameter) is not parameter}


class ToldApart:
    """Names as in ``calibrate`` for parameters that the user's names do not tell apart, or not as a plan does.

    Args:
        parameters: Those of one optimizer.
        shared: The user's names that stand for several of them.
    """

    def __init__(self, parameters: Sequence[Tensor], shared: Iterable[str] = ()) -> None:
        self.shared = frozenset(shared)
        self._parameters = parameters

    @cached_property
    def _named(self) -> NamedParameters:
        return NamedParameters(owning_modules(self._parameters))

    @cached_property
    def _has_several_owners(self) -> bool:
        return len({*map(self._named.owner, self._parameters)} - {None}) > 1

    def name(self, parameter: Tensor, user_name: str | None) -> str | None:
        """Return its name where its module is one of several, or the user's name is that of several; else None.

        Args:
            parameter: One of the parameters.
            user_name: The user's name, if it has one. It stands where it does not end in the module's own.
        """
        is_shared, all_names = user_name in self.shared, self._named.all_names(parameter)
        if not all_names or not (is_shared or self._has_several_owners):
            return None
        fits = user_name is None or is_shared or f".{user_name}".endswith(f".{all_names[0]}")
        return self._named.name(parameter) if fits else None


def _free_name(name: str, owner: nn.Module, taken: set[str]) -> str:
    """Return ``name``, with its owner's class (and a number) in front where another module has that name."""
    if name not in taken:
        return name
    numbers = (f"#{number}" if number > 1 else "" for number in itertools.count(1))
    return next(free for number in numbers if (free := f"{class_name(owner)}{number}.{name}") not in taken)


def owning_modules(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """Return the outermost modules alive in the process that own some parameters, in the order of these.

    Of several owners of a parameter, the one that owns most of all parameters counts; others come last.
    """
    places: dict[int, int] = {}
    for index, parameter in enumerate(parameters):
        places.setdefault(id(parameter), index)
    # type(), not isinstance(): proxies among the collected objects may answer __class__ with an exception. A module
    # whose constructor has not finished has no parameters yet.
    alive: list[nn.Module] = [
        found
        for found in gc.get_objects()
        if issubclass(type(found), nn.Module) and {"_modules", "_parameters"} <= found.__dict__.keys()
    ]
    inner = {id(child) for module in alive for child in module.children()}
    owned = [(module, _places(module, places)) for module in alive if id(module) not in inner]
    owned = sorted((pair for pair in owned if pair[1]), key=lambda pair: -len(pair[1]))
    first, left = {}, set(places.values())
    for module, own in owned:
        first[id(module)] = min(left.intersection(own), default=len(parameters))
        left.difference_update(own)
    return sorted((module for module, _ in owned), key=lambda module: first[id(module)])


def _places(module: nn.Module, places: Mapping[int, int]) -> list[int]:
    try:
        return [places[key] for key in map(id, module.parameters()) if key in places]
    except Exception:  # any module alive in the process, whatever its class does
        return []


_last_read: dict[tuple[object, ...], NamedParameters] = {}


def read_modules(modules: Sequence[nn.Module], parts: Mapping[str, Split]) -> NamedParameters:
    """Return the names and layers of modules, read once for all optimizers that follow each other over the same ones.

    Args:
        modules: As for :class:`NamedParameters`.
        parts: As there.
    """
    if parts or not HAS_WEAK_TENSORS:  # else it would keep the parameters alive
        return NamedParameters(modules, parts)
    key = tuple((id(one), *((name, id(param)) for name, param in one.named_parameters())) for one in modules)
    named = _last_read.get(key)
    # A parameter that has died has left, and its id may be another's.
    if named is None or any(named.name(param) is None for one in modules for param in one.parameters()):
        _last_read.clear()
        named = _last_read[key] = NamedParameters(modules)
        named.read_layers()
    return named
