"""Names and rules of the parameters that an optimizer holds, also where its groups are edited by hand."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.layers.names import is_position, position_name, renumbered
from slimadam.layers.roles import canonical_name
from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Monitor
from slimadam.optim.step.clipping import check_have_norm
from slimadam.optim.step.options import check_group, normalize_group
from slimadam.plans.auto import AutoPlan, Measuring, Revising
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import DECIDED_BEFORE, PlanArgument, Resolver
from slimadam.state import second_moment
from slimadam.state.rule import Rule, Source, resized_rule, rule_of_whole
from slimadam.utils.dtensor import FLAT
from slimadam.utils.errors import PlanError, did_you_mean, shown
from slimadam.utils.torch_private import by_tensor, reference

logger = logging.getLogger("slimadam")

_Groups = Sequence[dict[str, Any]]
_PICKLED = ("names", "rules", "measured", "measuring", "monitor", "revising")


class _Replacement(NamedTuple):
    """A parameter in whose place another one stands."""

    name: str
    new: Tensor


class _Added(NamedTuple):
    """A parameter that stands where none did: its name and place."""

    name: str
    group_index: int
    position: int


class _Changes(NamedTuple):
    """Changes of groups since they were last looked at.

    Attributes:
        names: The names of all parameters, group by group.
        exchanged: Parameters in whose place another stands.
        added: Parameters that are new.
        removed: Names that are no longer used.
    """

    names: list[list[str]]
    exchanged: list[_Replacement]
    added: list[_Added]
    removed: list[str]


class _Members:
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
    ) -> _Changes:
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
        found = _Changes([], [], [], [])
        for group_index, group in enumerate(groups):
            before = names[group_index] if group_index < len(names) else ()
            own: list[str] = []
            for index, param in enumerate(group["params"]):
                name = known.get(id(param))
                in_place = before[index] if len(before) == len(group["params"]) else None
                if name is None and in_place in vacant and of_model(param) in (None, in_place):
                    name = in_place
                    vacant.discard(name)
                    found.exchanged.append(_Replacement(name, param))
                elif name is None:
                    name = self._new_name(group, group_index, index, taken, of_model(param))
                    found.added.append(_Added(name, group_index, index))
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


class Registry:
    """Names, rules and samples of the parameters in an optimizer's groups.

    Args:
        plan: The ``plan`` of the optimizer.
        model: The module that owns the parameters, if it is known.
        monitor: Whether samples are kept for ``snr_check()``.

    Attributes:
        names: Names by group and position, because sharding replaces the tensors of a group in place.
        rules: The rules in force by name, one for each part of a parameter.
        measured: With ``plan="auto"`` the parts that each parameter is measured as; it is stored as a whole until then.
        measuring: The measurement of ``plan="auto"`` until it has decided.
        monitor: The samples, or None.
        revising: With ``AutoPlan(revise=True)`` what is remembered after the decision, else None.
        resolver: Finds names and rules of new parameters.
    """

    def __init__(self, plan: PlanArgument, model: nn.Module | None, monitor: bool) -> None:
        self.resolver = Resolver(plan, model)
        self.names: list[list[str]] = []
        self.rules: dict[str, list[Rule]] = {}
        self.measured: dict[str, list[Rule]] = {}
        self.measuring = Measuring(self.resolver.plan) if isinstance(self.resolver.plan, AutoPlan) else None
        settings = self.resolver.plan
        self.revising = Revising(settings) if isinstance(settings, AutoPlan) and settings.revise else None
        if self.revising is not None and not monitor:
            raise ValueError("monitor=False, but plan=AutoPlan(revise=True) needs its samples; use monitor=True")
        self.monitor = Monitor(self.resolver.cutoff, warns=self.revising is None) if monitor else None
        self._members = _Members()

    @property
    def plan(self) -> CompressionPlan:
        """The plan in force."""
        return CompressionPlan.of_parameters(self.rules, self.resolver.chosen_by_cutoff)

    def slots(self, groups: _Groups) -> Iterator[ParamSlot]:
        """Yield each parameter that has a shape, group by group."""
        for names, group in zip(self.names, groups, strict=True):
            for name, param in zip(names, group["params"], strict=True):
                if not (self._members.holds_lazy and is_lazy(param)):
                    yield slot_of(name, param, group, self.rules[name])

    def find(self, param: Tensor | str, groups: _Groups) -> ParamSlot:
        """Return the slot of a parameter.

        Args:
            param: The parameter, or its name.
            groups: The optimizer's groups.

        Raises:
            KeyError: The optimizer does not hold the parameter.
        """
        for slot in self.slots(groups):
            if slot.param is param or (isinstance(param, str) and slot.name == canonical_name(param)):
                return slot
        shown = repr(param) if isinstance(param, str) else "the tensor"
        owner = str(param).rpartition("[")[0]
        if isinstance(param, str) and any(name == canonical_name(owner) for name in self.rules):
            raise KeyError(
                f"{shown} is a part of a parameter; pass all of it, {owner!r}, and index for some of its rows"
            )
        hint = did_you_mean(param, self.rules) if isinstance(param, str) else ""
        raise KeyError(
            f"{shown} is not a parameter of this optimizer; pass one of its tensors, or a name that it knows: those of "
            f"SlimAdam(model) and of named_parameters(); {hint}".removesuffix("; ")
        )

    def slots_of_new(
        self, group: dict[str, Any], names: Sequence[str], own_plan: Mapping[str, Any], clips: bool
    ) -> list[ParamSlot]:
        """Return new parameters that have a shape, with their rules.

        Args:
            group: A group that holds them alone.
            names: Their names.
            own_plan: The plan of the group itself, as the resolver has taken it.
            clips: Whether the norm of their gradients is needed.

        Raises:
            PlanError, RuntimeError: No rule is known or can be followed.
        """
        ready = [index for index, param in enumerate(group["params"]) if not is_lazy(param)]
        for index in set(range(len(names))) - set(ready):
            self.resolver.note_without_shape(names[index], **own_plan)
        shaped = {**group, "params": [group["params"][index] for index in ready]}
        if "param_names" in group:
            shaped["param_names"] = [group["param_names"][index] for index in ready]
        own_names = [names[index] for index in ready]
        if clips:
            check_have_norm(zip(own_names, shaped["params"], strict=True))
        rules = self.resolver.rules(shaped, own_names, **own_plan)
        found = [
            slot_of(name, param, group, own)
            for name, param, own in zip(own_names, shaped["params"], rules, strict=True)
        ]
        for slot in found:
            slot.check()
        return found

    def add_group(
        self, group: Mapping[str, Any], names: list[str], new: Iterable[ParamSlot], states: Mapping[Tensor, Any]
    ) -> None:
        """Hold one more group.

        Args:
            group: The group.
            names: The names of its parameters.
            new: The result of :meth:`slots_of_new` for it.
            states: The optimizer's state.
        """
        self.names.append(names)
        self._members.add(group)
        for slot in new:
            self._admit(slot, states)

    def _admit(self, slot: ParamSlot, states: Mapping[Tensor, Any]) -> None:
        """Put a parameter's rules in force: those of its decision, or of ``plan="auto"`` while it measures."""
        rules = list(slot.rules)
        if any(rule.source == Source.MEASURING for rule in rules):
            rules = rules if self.measuring is None else list(map(_in_full, rules))
            self.measured[slot.name] = rules
            is_new = not second_moment.moments_of(states.get(slot.param, {}), rules)
            rules = self._rules_while_measuring(slot, rules, is_new)
        self.rules[slot.name] = rules
        self.sample(slot.name, slot.param, states)

    def _rules_while_measuring(self, slot: ParamSlot, rules: Sequence[Rule], is_new: bool) -> list[Rule]:
        """Return how a parameter is stored until ``plan="auto"`` has decided, or if it already has.

        Args:
            slot: The parameter.
            rules: Its rules in full; those that it had where it comes back after the decision.
            is_new: False if it has a second moment that is stored by these.
        """
        if self.measuring is None and is_new and all(rule.is_full for rule in rules):
            return [rule_of_whole(rules, DECIDED_BEFORE)]
        if self.measuring is None:
            return [
                replace(rule, reason=DECIDED_BEFORE, source=Source.OTHER) if rule.source == Source.MEASURING else rule
                for rule in rules
            ]
        if self.measuring.settings.start == "full":
            return [rule_of_whole(rules)]
        starting = self.measuring.starting_rules(slot.name, slot.param, rules, self.resolver.all_names(slot.name))
        reason = slot_of(slot.name, slot.param, slot.group, starting).why_not_stored()
        if slot.param.is_complex() and starting != list(rules):
            reason = "grids measure real numbers, the parameter is complex"
        if reason is None:
            return starting
        logger.warning("plan='auto', start='slim': %s starts in full: %s", slot.name, reason)
        self._drop(key_of(slot.name, rule.part) for rule in rules)
        return [rule_of_whole(rules)]

    def rules_of_successor(self, name: str, new: Tensor, group: dict[str, Any]) -> tuple[list[Rule], list[Rule]]:
        """Return the rules of a parameter for one that takes its place, and those that it is measured by.

        While ``start="slim"`` measures, what the size decides is decided anew, and grids begin anew.

        Args:
            name: The name of both.
            new: The one that takes the place.
            group: The group of both.

        Raises:
            RuntimeError: The rules cannot be followed in the new parameter's shape.
        """
        measured = rules_for_another(name, self.measured[name], new) if name in self.measured else []
        starts_slim = self.measuring is not None and self.measuring.settings.start == "slim"
        if measured and starts_slim:
            self._drop(key_of(name, rule.part) for rule in self.rules[name])
            return self._rules_while_measuring(slot_of(name, new, group, measured), measured, is_new=True), measured
        return rules_for_another(name, self.rules[name], new), measured

    def _drop(self, keys: Iterable[str]) -> None:
        """Forget what is tracked of parameters, or parts."""
        for key in keys:
            for tracker in (self.measuring, self.monitor, self.revising):
                if tracker is not None:
                    tracker.drop(key)

    def sample(self, name: str, param: Tensor, states: Mapping[Tensor, Any]) -> None:
        """Begin a parameter's sample for ``snr_check()``, once its plan is decided.

        Args:
            name: Its name.
            param: The parameter.
            states: The optimizer's state.
        """
        if self.monitor is not None and self.measuring is None:
            self.monitor.add(name, param, self.rules[name], states.get(param, {}).get("exp_avg_sq"))

    def hold(self, groups: _Groups) -> None:
        """Remember the parameters of the groups, all of which have names."""
        self._members.hold(groups)

    def resume(self, groups: _Groups) -> None:
        """Learn the names of the parameters of an optimizer that was unpickled or copied."""
        self.resolver.resume((slot.name, slot.param) for slot in self.slots(groups))

    def to_pickle(self) -> dict[str, Any]:
        """Return the fields for a pickle of the optimizer."""
        fields = {f"_{name}": getattr(self, name) for name in _PICKLED}
        return {**fields, "_plan": self.resolver.plan}

    @classmethod
    def from_pickle(cls, state: dict[str, Any]) -> Registry:
        """Take the fields out of an optimizer's pickle; :meth:`resume` once its groups are there."""
        registry = cls(None, None, monitor=False)
        registry.resolver = Resolver(state.pop("_plan"), None)
        for name in _PICKLED:
            setattr(registry, name, state.pop(f"_{name}", None))  # one of an earlier release does not revise
        return registry

    # -- groups that were edited by hand -------------------------------------------------------------------

    def follow(
        self, groups: _Groups, defaults: Mapping[str, Any], states: Mapping[Tensor, Any], clips: bool = False
    ) -> bool:
        """Take note of parameters that came to the groups, left them or were exchanged in them, as AdamW allows.

        Args:
            groups: The groups as they are.
            defaults: The optimizer's options, for those that a group lacks.
            states: The optimizer's state.
            clips: Whether the norm of new parameters' gradients is needed.

        Returns:
            Whether anything has changed.

        Raises:
            PlanError, RuntimeError: No rule is known for a parameter; the optimizer is as it was.
        """
        if torch.compiler.is_compiling() or self._members.are_in(groups):
            return False
        own_plans = [self._complete_group(group, defaults) for group in groups]
        _check_tensors(groups)
        rules_in_force = {**self.rules, **self.measured}
        changes = self._members.changes(self.names, groups, self.resolver.of_model)
        changes = _misfits_as_new(changes, groups, rules_in_force)
        _check_one_for_each(self.names, groups, changes, self.rules)
        before = self.resolver.snapshot()
        try:
            owners = {id(param): group for group in groups for param in group["params"]}
            admitted = [
                slot_of(name, new, owners[id(new)], rules_for_another(name, rules_in_force[name], new))
                for name, new in changes.exchanged
                if name in rules_in_force
            ]
            for slot in admitted:
                slot.check()
            shaped = self._newly_shaped(changes.names, groups)
            if shaped:
                self.resolver.read_model_again()
            admitted += self._slots_of_added(shaped + changes.added, groups, own_plans, clips)
        except Exception:
            self.resolver.restore(before)
            raise
        self.resolver.forget_owners()
        held = dict(self._members.named(self.names))
        for name in changes.removed:
            self._remove(name, held[name])
        self.names = changes.names
        self._members.hold(groups)
        for slot in admitted:
            self.resolver.note(slot.name, slot.param)
            self._admit(slot, states)
        self._rename(renumbered(self.names))
        return True

    def _remove(self, name: str, param: Tensor | None) -> None:
        self.resolver.note(name, None)
        if name in self.rules:
            self._members.leave(name, param, self.rules[name])
            self._drop(key_of(name, rule.part) for rule in self.rules.pop(name))
        self.measured.pop(name, None)

    def _rename(self, names: list[list[str]]) -> None:
        """Call the parameters by other names, in the order of the groups."""
        new = {
            before: now
            for own, shown in zip(self.names, names, strict=True)
            for before, now in zip(own, shown, strict=True)
        }
        keys = {
            key_of(name, rule.part): key_of(new[name], rule.part)
            for name in new
            for rule in (*self.rules.get(name, ()), *self.measured.get(name, ()))
        }
        self.names = names
        self.rules = {now: self.rules[name] for name, now in new.items() if name in self.rules}
        self.measured = {now: self.measured[name] for name, now in new.items() if name in self.measured}
        self.resolver.rename(new)
        if self.measuring is not None:
            self.measuring.rename(keys)
        if self.monitor is not None:
            self.monitor.rename(keys)
        if self.revising is not None:
            self.revising.rename(keys)

    def _complete_group(self, group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options that a group put there by hand lacks; return its own plan, if it has one."""
        own_plan = self.resolver.take_arguments(group)
        for option, default in defaults.items():
            group.setdefault(option, default)
        normalize_group(group)
        check_group(group)
        return own_plan

    def _newly_shaped(self, names: Sequence[Sequence[str]], groups: _Groups) -> list[_Added]:
        known = {id(param) for _, param in self._members.named(self.names)}
        return [
            _Added(name, group_index, index)
            for group_index, (own, group) in enumerate(zip(names, groups, strict=True))
            for index, (name, param) in enumerate(zip(own, group["params"], strict=True))
            if not is_lazy(param) and name not in self.rules and id(param) in known
        ]

    def _slots_of_added(
        self, added: Iterable[_Added], groups: _Groups, own_plans: Sequence[Mapping[str, Any]], clips: bool
    ) -> list[ParamSlot]:
        found = []
        new: dict[tuple[int, bool], dict[str, Tensor]] = defaultdict(dict)
        for name, group_index, position in added:
            param = groups[group_index]["params"][position]
            before = self._members.of_before(param)
            if before is not None and before[1][0].owner_shape == param.shape:
                found.append(slot_of(name, param, groups[group_index], before[1]))
            else:
                new[group_index, is_position(name)][name] = param
        for (group_index, is_unnamed), params in new.items():
            names = list(params)
            group = {**groups[group_index], "params": list(params.values()), "param_names": names}
            if is_unnamed:
                del group["param_names"]
            try:
                found += self.slots_of_new(group, names, own_plans[group_index], clips)
            except PlanError as error:
                shapes = ", ".join(str(tuple(param.shape)) for param in params.values())
                raise PlanError(
                    f"{'a parameter of shape' if len(params) == 1 else 'parameters of shapes'} {shapes} was put into "
                    f"param_groups[{group_index}]['params']: {error}; or add it by "
                    "optimizer.add_param_group({'params': [(name, parameter)]})"
                ) from error
        return found


def _in_full(rule: Rule) -> Rule:
    """Return the rule by which a parameter, or part, is measured that may be stored otherwise until the decision."""
    return rule if rule.is_full else replace(rule, form="full", dims=(), source=Source.MEASURING)


def _may_stand_for_another(rules: Sequence[Rule], param: Tensor) -> bool:
    """Return whether a parameter can follow the rules of another one in whose place it stands.

    Args:
        rules: Those of the parameter that is gone.
        param: The one that is there now: of the same shape, of as many dimensions, or of any shape where all is full.
    """
    shape, before = tuple(param.shape), rules[0].owner_shape
    alike = before is None or len(shape) == len(before)
    if before is None or shape == before or (alike and rules[0].part is None):
        return True
    return all(rule.is_full and (rule.source != Source.MEASURING or alike) for rule in rules)


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
    if _may_stand_for_another(rules, param):
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


def _check_tensors(groups: Sequence[Mapping[str, Any]]) -> None:
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


def _misfits_as_new(
    changes: _Changes, groups: Sequence[Mapping[str, Any]], rules: Mapping[str, Sequence[Rule]]
) -> _Changes:
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
        if name in rules and id(new) in places and not _may_stand_for_another(rules[name], new)
    }
    return changes._replace(
        exchanged=[one for one in changes.exchanged if one.name not in misfits],
        added=[*changes.added, *(_Added(name, *place) for name, place in misfits.items())],
        removed=[*changes.removed, *misfits],
    )


def _check_one_for_each(
    names: Sequence[Sequence[str]], groups: Sequence[Mapping[str, Any]], changes: _Changes, rules: Mapping[str, Any]
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
        if alone and not all(rule.is_full and rule.source != Source.MEASURING for rule in of_before):
            raise RuntimeError(
                f"param_groups[{added.group_index}]['params'] has 1 parameters, but had {len(before)}: one vector for "
                f"all of them is the work of a library such as DeepSpeed, {FLAT}; plan=None takes it as it is"
            )
