"""Parameters that come, leave or are exchanged in an optimizer's groups without ``add_param_group``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from slimadam.layers.names import position_name
from slimadam.layers.roles import canonical_name
from slimadam.state.rule import Rule, Source, resized_rule
from slimadam.utils.dtensor import FLAT
from slimadam.utils.errors import shown
from slimadam.utils.torch_private import by_tensor, reference


class Replacement(NamedTuple):
    """A parameter in whose place another one stands."""

    name: str
    new: Tensor


class Added(NamedTuple):
    """A parameter that stands where none did: its name and place."""

    name: str
    group_index: int
    position: int


class Changes(NamedTuple):
    """Changes of groups since they were last looked at.

    Attributes:
        names: The names of all parameters, group by group.
        exchanged: Parameters in whose place another stands.
        added: Parameters that are new.
        removed: Names that are no longer used.
    """

    names: list[list[str]]
    exchanged: list[Replacement]
    added: list[Added]
    removed: list[str]


class Members:
    """The parameters that groups held when they were last looked at; keeps none of them alive."""

    def __init__(self) -> None:
        self._groups: list[list[Callable[[], Tensor | None]]] = []
        self._lazy = 0
        self._left: Any = by_tensor()

    def hold(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember what the groups hold now."""
        self._groups = []
        self._lazy = 0
        for group in groups:
            self.add(group)

    def add(self, group: Mapping[str, Any]) -> None:
        """Remember what one more group holds."""
        self._groups.append(list(map(reference, group["params"])))
        self._lazy += sum(map(is_lazy, group["params"]))

    @property
    def holds_lazy(self) -> bool:
        """Return whether a parameter has no shape yet."""
        return self._lazy > 0

    def are_in(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the groups hold what they did, and what had no shape has none yet."""
        if self._lazy and sum(is_lazy(param) for group in groups for param in group["params"]) != self._lazy:
            return False
        return len(groups) == len(self._groups) and all(
            len(held) == len(group["params"]) and all(map(is_, group["params"], [one() for one in held]))
            for held, group in zip(self._groups, groups, strict=True)
        )

    def leave(self, name: str, param: Tensor | None, rules: Sequence[Rule]) -> None:
        """Remember a parameter's name and rules for the case that it comes back.

        Args:
            name: Its name.
            param: The parameter, if it is still alive.
            rules: Its rules.
        """
        if param is not None:
            self._left[param] = (name, list(rules))

    def of_before(self, param: Tensor) -> tuple[str, list[Rule]] | None:
        """Return name and rules of a parameter that has been here before."""
        found: tuple[str, list[Rule]] | None = self._left.get(param)
        return found

    def named(self, names: Sequence[Sequence[str]]) -> Iterator[tuple[str, Tensor | None]]:
        """Yield each name with its tensor as it was, or None where that is no longer alive."""
        for own, held in zip(names, self._groups, strict=True):
            yield from zip(own, (one() for one in held), strict=True)

    def changes(
        self,
        names: Sequence[Sequence[str]],
        groups: Sequence[Mapping[str, Any]],
        of_model: Callable[[Tensor], str | None],
    ) -> Changes:
        """Find out what has happened to the groups.

        A parameter keeps its name wherever it stands now. What stands in the place of one that is gone, in a group of
        as many, takes its name, unless the model has another for it; the rest is new.

        Args:
            names: The names of what was held.
            groups: The groups as they are.
            of_model: Returns the name that the model has for a parameter.
        """
        known = {id(param): name for name, param in self.named(names) if param is not None}
        present = {id(param) for group in groups for param in group["params"]}
        vacant = {name for name, param in self.named(names) if param is None or id(param) not in present}
        taken = {name for own in names for name in own} - vacant
        found = Changes([], [], [], [])
        for group_index, group in enumerate(groups):
            before = names[group_index] if group_index < len(names) else ()
            own: list[str] = []
            for index, param in enumerate(group["params"]):
                name = known.get(id(param))
                in_place = before[index] if len(before) == len(group["params"]) else None
                if name is None and in_place in vacant and of_model(param) in (None, in_place):
                    name = in_place
                    vacant.discard(name)
                    found.exchanged.append(Replacement(name, param))
                elif name is None:
                    name = self._new_name(group, group_index, index, taken, of_model(param))
                    found.added.append(Added(name, group_index, index))
                taken.add(name)
                own.append(name)
            found.names.append(own)
        found.removed.extend(vacant)
        return found

    def _new_name(
        self, group: Mapping[str, Any], group_index: int, index: int, taken: set[str], of_model: str | None
    ) -> str:
        """Return a name for a parameter: that of before, the group's, the model's, or a free one by its position."""
        before = self.of_before(group["params"][index])
        given = [] if before is None else [before[0]]
        if len(group.get("param_names", ())) == len(group["params"]):
            given.append(canonical_name(group["param_names"][index]))
        given += [] if of_model is None else [of_model]
        free = (position_name(group_index, number) for number in range(index, index + len(taken) + 1))
        return next(name for name in (*given, *free) if name not in taken)


def may_stand_for_another(rules: Sequence[Rule], param: Tensor) -> bool:
    """Return whether a parameter can follow the rules of another one in whose place it stands.

    Args:
        rules: Those of the parameter that is gone.
        param: The one that is there now: of the same shape, of as many dimensions, or of any shape where all is full.
    """
    shape, before = tuple(param.shape), rules[0].owner_shape
    alike = before is None or len(shape) == len(before)
    if before is None or shape == before or (alike and rules[0].part is None):
        return True
    return all(rule.form == "full" and (rule.source != Source.MEASURING or alike) for rule in rules)


def rules_for_another(name: str, rules: Sequence[Rule], param: Tensor) -> list[Rule]:
    """Return the rules of a parameter for one that stands in its place.

    Args:
        name: The name of both.
        rules: Those of the parameter that is gone.
        param: The one that is there now, of the same number of dimensions unless everything is kept in full.

    Raises:
        RuntimeError: The rules cannot be followed in the new parameter's shape.
    """
    shape, before = tuple(param.shape), rules[0].owner_shape
    if before is None or shape == before:
        return list(rules)
    if may_stand_for_another(rules, param):
        alike = rules[0].part is None and len(shape) == len(before)
        one = rules[0] if alike else Rule(reason=rules[0].reason, source=rules[0].source)
        return [resized_rule(one, shape)]
    parts = ", ".join(rule.part.label for rule in rules if rule.part is not None)
    why = f", one for each of its parts ({parts}), which have no size in another shape" if parts else ""
    flat = f"; a vector in its place is the work of a library such as DeepSpeed, {FLAT}" if len(shape) == 1 else ""
    raise RuntimeError(
        f"{name!r}: a parameter of shape {shape} stands where the plan has rules for one of shape {before}{why}; add "
        f"it with add_param_group, or build a new optimizer{flat}"
    )


def check_tensors(groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that groups hold nothing but tensors.

    Raises:
        TypeError: Names the place.
    """
    for group_index, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise TypeError(
                    f"param_groups[{group_index}]['params'][{index}]={shown(param)} must be a tensor; add parameters "
                    "with their names by add_param_group"
                )


def misfits_as_new(
    changes: Changes, groups: Sequence[Mapping[str, Any]], rules: Mapping[str, Sequence[Rule]]
) -> Changes:
    """Count what cannot follow the rules of the parameter in whose place it stands as new, and that one as removed.

    Not one vector in the place of all that a group held: that is the work of a library, and refused.

    Args:
        changes: What has happened to the groups.
        groups: The groups as they are.
        rules: By name.
    """
    places = {
        id(param): (group_index, index)
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
        if len(group["params"]) > 1 or param.dim() != 1
    }
    misfits = {
        name: places[id(new)]
        for name, new in changes.exchanged
        if name in rules and id(new) in places and not may_stand_for_another(rules[name], new)
    }
    return changes._replace(
        exchanged=[one for one in changes.exchanged if one.name not in misfits],
        added=[*changes.added, *(Added(name, *place) for name, place in misfits.items())],
        removed=[*changes.removed, *misfits],
    )


def check_one_for_each(
    names: Sequence[Sequence[str]], groups: Sequence[Mapping[str, Any]], changes: Changes, rules: Mapping[str, Any]
) -> None:
    """Check that no single vector stands in the place of several parameters that a plan has rules for.

    Args:
        names: The names of the parameters that the groups held.
        groups: The groups as they are.
        changes: Their changes.
        rules: By name.

    Raises:
        RuntimeError: Names the group and the remedy.
    """
    gone = set(changes.removed)
    for added in changes.added:
        before = names[added.group_index] if added.group_index < len(names) else ()
        params = groups[added.group_index]["params"]
        alone = len(params) == 1 and params[0].dim() == 1 and len(before) > 1 and gone.issuperset(before)
        of_before = [rule for name in before for rule in rules[name]]
        if alone and any(rule.form != "full" or rule.source == Source.MEASURING for rule in of_before):
            raise RuntimeError(
                f"param_groups[{added.group_index}]['params'] has 1 parameters, but had {len(before)}: one vector for "
                f"all of them is the work of a library such as DeepSpeed, {FLAT}; plan=None takes it as it is"
            )
