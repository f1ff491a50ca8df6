"""Qualified names of parameters: from a module, from an optimizer, or from the modules alive in the process."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.roles import ParameterRole, canonical_name, roles_of


class NamedParameters:
    """Names and roles of parameters, looked up by the tensor itself.

    Args:
        models: Modules that own the parameters. Where one name stands for different parameters of several
            modules, the later ones get their class name in front, and a number where that is taken too.
    """

    def __init__(self, models: Iterable[nn.Module] = ()) -> None:
        self._names: dict[int, str] = {}
        self._roles: dict[int, ParameterRole] = {}
        # An id is only a key while its tensor lives.
        self._tensors: list[Tensor] = []
        taken: set[str] = set()
        for model in models:
            roles = roles_of(model)
            for name, parameter in model.named_parameters():
                if id(parameter) in self._names:
                    continue
                shown = _free_name(canonical_name(name), type(model).__name__, taken)
                taken.add(shown)
                self._add(parameter, shown, roles[name])

    def _add(self, parameter: Tensor, name: str, role: ParameterRole | None = None) -> None:
        self._names[id(parameter)] = name
        self._tensors.append(parameter)
        if role is not None:
            self._roles[id(parameter)] = role

    def name(self, parameter: Tensor) -> str | None:
        """The parameter's qualified name without wrapper prefixes, or None if no module owns it."""
        return self._names.get(id(parameter))

    def role(self, parameter: Tensor) -> ParameterRole | None:
        """The parameter's role, or None if no module owns it."""
        return self._roles.get(id(parameter))

    @classmethod
    def of_optimizer(cls, optimizer: Optimizer, model: nn.Module | None = None) -> NamedParameters:
        """Names of everything an optimizer updates.

        Taken from ``model``; without one, from the names the optimizer was given; without those, from the
        modules alive in the process; parameters that no module owns are called by their position.

        Args:
            optimizer: Any torch optimizer.
            model: The module that owns its parameters, where at hand.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        if model is not None:
            named = cls([model])
        elif len(given) == len(parameters):
            named = cls(owning_modules(parameters))
            for parameter, name in zip(parameters, given, strict=True):
                named._add(parameter, canonical_name(name))
        else:
            named = cls(owning_modules(parameters))
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if named.name(parameter) is None:
                    named._add(parameter, f"param_groups.{group_index}.params.{index}")
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
    return sum(id(parameter) in wanted for parameter in module.parameters())


def _children(module: nn.Module) -> list[nn.Module]:
    return list(module.children()) if "_modules" in module.__dict__ else []
