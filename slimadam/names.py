"""Qualified names of parameters: from a module, from an optimizer, or from the modules alive in the process."""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.errors import PlanError
from slimadam.fused import matches_any, pieces_of, refuse_unmatched
from slimadam.parts import Parts, Piece, check_declared, pieces
from slimadam.roles import ParameterRole, canonical_name, class_name, names_of, roles_of

logger = logging.getLogger("slimadam")

_POSITION = re.compile(r"param_groups\.\d+\.params\.\d+(\[.*\])?")


def position_name(group: int, index: int) -> str:
    """What a parameter without a name is called: by its place in the optimizer."""
    return f"param_groups.{group}.params.{index}"


def is_position(key: str) -> bool:
    """Whether a parameter, or a part of one, is called by its place in the optimizer."""
    return _POSITION.fullmatch(key) is not None


class NamedParameters:
    """Names of parameters and the logical matrices in them, looked up by the tensor itself.

    Args:
        models: Modules that own the parameters. Where one name stands for different parameters of several
            modules, the later ones get their class name in front, and a number where that is taken too.
        parts: What parameters are made of, by pattern, where their modules do not say.

    Attributes:
        matched: The patterns of ``parts`` that match a name.

    Raises:
        ValueError: ``parts`` is of the wrong type.
        PlanError: Declared parts do not fit a parameter.
    """

    def __init__(self, models: Iterable[nn.Module] = (), parts: Mapping[str, Parts] | None = None) -> None:
        self._names: dict[int, str] = {}
        self._pieces: dict[int, list[Piece]] = {}
        self._roles: dict[int, ParameterRole] = {}
        self._all_names: dict[int, list[str]] = {}
        # An id is only a key while its tensor lives.
        self._tensors: list[Tensor] = []
        taken: set[str] = set()
        parts = check_declared(parts)
        for model in models:
            roles, found = self._layout_of(model, parts)
            names = names_of(model)
            for name, parameter in model.named_parameters():
                if id(parameter) in self._names:
                    continue
                shown = _free_name(canonical_name(name), class_name(model), taken)
                taken.add(shown)
                self._add(parameter, shown, found.get(name))
                self._all_names[id(parameter)] = names[parameter]
                if name in roles:
                    self._roles[id(parameter)] = roles[name]
        known = taken.union(*self._all_names.values())
        self.matched = {pattern for pattern in parts if matches_any(pattern, known)}

    @staticmethod
    def _layout_of(
        model: nn.Module, parts: Mapping[str, Parts]
    ) -> tuple[Mapping[str, ParameterRole], Mapping[str, list[Piece]]]:
        try:
            roles = roles_of(model)
            return roles, pieces_of(model, parts, roles)
        except PlanError:
            raise
        except Exception as error:  # a module class of others may do anything; names are enough to go on
            logger.warning("the layers of %s cannot be told from its modules (%r)", type(model).__name__, error)
            return {}, {}

    def _add(self, parameter: Tensor, name: str, found: list[Piece] | None = None) -> None:
        self._names[id(parameter)] = name
        self._tensors.append(parameter)
        if found is not None:
            self._pieces[id(parameter)] = found

    def __len__(self) -> int:
        return len(self._names)

    def name(self, parameter: Tensor) -> str | None:
        """The parameter's qualified name without wrapper prefixes, or None if no module owns it."""
        return self._names.get(id(parameter))

    def pieces(self, parameter: Tensor) -> list[Piece]:
        """The parameter's logical matrices; without a role if no module owns it."""
        found = self._pieces.get(id(parameter))
        return pieces("", tuple(parameter.shape), ParameterRole(""), None) if found is None else found

    def role(self, parameter: Tensor) -> ParameterRole | None:
        """Role and layout of the parameter as a whole, or None if no module owns it."""
        return self._roles.get(id(parameter))

    def all_names(self, parameter: Tensor) -> list[str]:
        """Every name that its module has for the parameter: several where it is tied, none if no module owns it."""
        return self._all_names.get(id(parameter), [])

    def owned(self, parameter: Tensor) -> bool:
        """Whether a module owns it."""
        return id(parameter) in self._pieces

    @classmethod
    def of_optimizer(
        cls, optimizer: Optimizer, model: nn.Module | None = None, parts: Mapping[str, Parts] | None = None
    ) -> NamedParameters:
        """Names of everything an optimizer updates.

        Taken from ``model``; without one, from the names the optimizer was given; without those, from the
        modules alive in the process; parameters that no module owns are called by their position.

        Args:
            optimizer: Any torch optimizer.
            model: The module that owns its parameters, where at hand.
            parts: What parameters are made of, by pattern, where their modules do not say.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        if model is not None:
            named = cls([model], parts)
        elif len(given) == len(parameters):
            named = cls(owning_modules(parameters), parts)
            for parameter, name in zip(parameters, given, strict=True):
                named._add(parameter, canonical_name(name))
        else:
            named = cls(owning_modules(parameters), parts)
        unmatched = {pattern: found for pattern, found in (parts or {}).items() if pattern not in named.matched}
        refuse_unmatched(unmatched, named._names.values())
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if named.name(parameter) is None:
                    named._add(parameter, position_name(group_index, index))
        return named


def _free_name(name: str, owner: str, taken: set[str]) -> str:
    """``name``, or with its owner's class (and a number) in front where another module has that name."""
    if name not in taken:
        return name
    owners = (owner if number == 1 else f"{owner}#{number}" for number in itertools.count(1))
    return next(shown for shown in (f"{one}.{name}" for one in owners) if shown not in taken)


def owning_modules(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The outermost modules alive in the process that own the given parameters, best coverage first.

    Args:
        parameters: Parameters of any modules.
    """
    wanted = {id(parameter) for parameter in parameters}
    # type(), not isinstance(): proxies among the collected objects may answer __class__ with an exception.
    alive = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    covered = {id(module): _owned(module, wanted) for module in alive}
    inner = {id(child) for module in alive for child in _children(module)}
    outermost = [module for module in alive if covered[id(module)] and id(module) not in inner]
    return sorted(outermost, key=lambda module: -covered[id(module)])


def _owned(module: nn.Module, wanted: set[int]) -> int:
    # A module whose constructor has not finished has no parameters yet.
    if "_modules" not in module.__dict__ or "_parameters" not in module.__dict__:
        return 0
    try:
        return sum(id(parameter) in wanted for parameter in module.parameters())
    except Exception:  # any module alive in the process, whatever its class does
        return 0


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children()) if "_modules" in module.__dict__ else []
