"""Names and rules of the parameters that an optimizer holds, also where its groups are edited by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from slimadam.layers.names import is_position, renumbered
from slimadam.layers.roles import canonical_name
from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Monitor
from slimadam.optim.membership import (
    Added,
    Members,
    check_one_for_each,
    check_tensors,
    misfits_as_new,
    rules_for_another,
)
from slimadam.optim.step.clipping import check_have_norm
from slimadam.optim.step.options import check_group, normalize_group
from slimadam.optim.step.param_groups import Held, check_shards, named_parameters
from slimadam.plans.auto import AutoPlan, Measuring
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import DECIDED_BEFORE, PlanArgument, Resolver, check_factored_amsgrad
from slimadam.state.rule import Rule, Source, rule_of_whole
from slimadam.utils.errors import PlanError

_Groups = Sequence[dict[str, Any]]
_Ruled = tuple[str, Tensor, list[Rule]]


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
        resolver: Finds names and rules of new parameters.
    """

    def __init__(self, plan: PlanArgument, model: nn.Module | None, monitor: bool) -> None:
        self.resolver = Resolver(plan, model)
        self.names: list[list[str]] = []
        self.rules: dict[str, list[Rule]] = {}
        self.measured: dict[str, list[Rule]] = {}
        self.measuring = Measuring(self.resolver.plan) if isinstance(self.resolver.plan, AutoPlan) else None
        self.monitor = Monitor(self.resolver.cutoff) if monitor else None
        self._members = Members()

    @property
    def plan(self) -> CompressionPlan:
        """The plan in force."""
        return CompressionPlan.of_parameters(self.rules, self.resolver.chosen_by_cutoff)

    def parameters(self, groups: _Groups) -> Iterator[Held]:
        """Yield name, tensor and group of each parameter that has a shape."""
        found = named_parameters(self.names, groups)
        return (one for one in found if not is_lazy(one[1])) if self._members.holds_lazy else found

    def find(self, param: Tensor | str, groups: _Groups) -> Held:
        """Return name, tensor and group of a parameter.

        Args:
            param: The parameter, or its name.
            groups: The optimizer's groups.

        Raises:
            KeyError: The optimizer does not hold the parameter.
        """
        for name, held, group in self.parameters(groups):
            if held is param or (isinstance(param, str) and name == canonical_name(param)):
                return name, held, group
        shown = repr(param) if isinstance(param, str) else "the tensor"
        owner = str(param).rpartition("[")[0]
        if isinstance(param, str) and any(name == canonical_name(owner) for name in self.rules):
            raise KeyError(
                f"{shown} is a part of a parameter; pass all of it, {owner!r}, and index for some of its rows"
            )
        raise KeyError(
            f"{shown} is not a parameter of this optimizer; pass one of its tensors, or a name that it knows: those of "
            "SlimAdam(model) and of named_parameters()"
        )

    def rules_of_new(
        self, group: Mapping[str, Any], names: Sequence[str], own_plan: Mapping[str, Any], clips: bool
    ) -> list[_Ruled]:
        """Return name, tensor and rules of new parameters that have a shape.

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
        found = list(zip(own_names, shaped["params"], rules, strict=True))
        for one in found:
            check_shards(*one)
        return found

    def add_group(
        self, group: Mapping[str, Any], names: list[str], ruled: Iterable[_Ruled], states: Mapping[Tensor, Any]
    ) -> None:
        """Hold one more group.

        Args:
            group: The group.
            names: The names of its parameters.
            ruled: What :meth:`rules_of_new` returned for it.
            states: The optimizer's state.
        """
        self.names.append(names)
        self._members.add(group)
        for name, param, rules in ruled:
            self._admit(name, param, rules, states)

    def _admit(self, name: str, param: Tensor, rules: list[Rule], states: Mapping[Tensor, Any]) -> None:
        """Put a parameter's rules in force: those of its decision, or of ``plan="auto"`` while it measures."""
        if rules[0].source == Source.MEASURING:
            self.measured[name] = rules
            rules = [rule_of_whole(rules, DECIDED_BEFORE if self.measuring is None else "")]
        self.rules[name] = rules
        self.sample(name, param, states)

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
        self.resolver.resume((name, param) for name, param, _ in self.parameters(groups))

    def to_pickle(self) -> dict[str, Any]:
        """Return the fields for a pickle of the optimizer."""
        fields = {f"_{name}": getattr(self, name) for name in ("names", "rules", "measured", "measuring", "monitor")}
        return {**fields, "_plan": self.resolver.plan}

    @classmethod
    def from_pickle(cls, state: dict[str, Any]) -> Registry:
        """Take the fields out of an optimizer's pickle; :meth:`resume` once its groups are there."""
        registry = cls(state.pop("_plan"), None, monitor=False)
        for name in ("names", "rules", "measured", "measuring", "monitor"):
            setattr(registry, name, state.pop(f"_{name}"))
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
        check_tensors(groups)
        rules_in_force = {**self.rules, **self.measured}
        changes = self._members.changes(self.names, groups, self.resolver.of_model)
        changes = misfits_as_new(changes, groups, rules_in_force)
        check_one_for_each(self.names, groups, changes, self.rules)
        before = self.resolver.snapshot()
        try:
            admitted = [
                (name, new, rules_for_another(name, rules_in_force[name], new))
                for name, new in changes.exchanged
                if name in rules_in_force
            ]
            owners = {id(param): group for group in groups for param in group["params"]}
            for name, param, rules in admitted:
                check_shards(name, param, rules)
                check_factored_amsgrad(name, rules[0], owners[id(param)])
            shaped = self._newly_shaped(changes.names, groups)
            if shaped:
                self.resolver.read_model_again()
            admitted += self._rules_of_added(shaped + changes.added, groups, own_plans, clips)
        except Exception:
            self.resolver.restore(before)
            raise
        self.resolver.forget_owners()
        held = dict(self._members.named(self.names))
        for name in changes.removed:
            self._remove(name, held[name])
        self.names = changes.names
        self._members.hold(groups)
        for name, param, rules in admitted:
            self.resolver.note(name, param)
            self._admit(name, param, rules, states)
        self._rename(renumbered(self.names))
        return True

    def _remove(self, name: str, param: Tensor | None) -> None:
        self.resolver.note(name, None)
        if name in self.rules:
            self._members.leave(name, param, self.rules[name])
            for rule in self.rules.pop(name):
                if self.monitor is not None:
                    self.monitor.drop(key_of(name, rule.part))
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
            self.measuring.history.rename(keys)
        if self.monitor is not None:
            self.monitor.rename(keys)

    def _complete_group(self, group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options that a group put there by hand lacks; return its own plan, if it has one."""
        own_plan = self.resolver.take_arguments(group)
        for option, default in defaults.items():
            group.setdefault(option, default)
        normalize_group(group)
        check_group(group)
        return own_plan

    def _newly_shaped(self, names: Sequence[Sequence[str]], groups: _Groups) -> list[Added]:
        known = {id(param) for _, param in self._members.named(self.names)}
        return [
            Added(name, group_index, index)
            for group_index, (own, group) in enumerate(zip(names, groups, strict=True))
            for index, (name, param) in enumerate(zip(own, group["params"], strict=True))
            if not is_lazy(param) and name not in self.rules and id(param) in known
        ]

    def _rules_of_added(
        self, added: Iterable[Added], groups: _Groups, own_plans: Sequence[Mapping[str, Any]], clips: bool
    ) -> list[_Ruled]:
        found = []
        new: dict[tuple[int, bool], dict[str, Tensor]] = defaultdict(dict)
        for name, group_index, position in added:
            param = groups[group_index]["params"][position]
            before = self._members.of_before(param)
            if before is not None and before[1][0].owner_shape == param.shape:
                found.append((name, param, before[1]))
            else:
                new[group_index, is_position(name)][name] = param
        for (group_index, is_unnamed), params in new.items():
            names = list(params)
            group = {**groups[group_index], "params": list(params.values()), "param_names": names}
            if is_unnamed:
                del group["param_names"]
            try:
                found += self.rules_of_new(group, names, own_plans[group_index], clips)
            except PlanError as error:
                shapes = ", ".join(str(tuple(param.shape)) for param in params.values())
                raise PlanError(
                    f"{'a parameter of shape' if len(params) == 1 else 'parameters of shapes'} {shapes} was put into "
                    f"param_groups[{group_index}]['params']: {error}; or add it by "
                    "optimizer.add_param_group({'params': [(name, parameter)]})"
                ) from error
        return found
