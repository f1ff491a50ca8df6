"""Resolves the ``plan`` argument to the rules of each parameter of an optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

from torch import Tensor, nn

from slimadam.layers.name_patterns import BIAS, NORM, UNKNOWN, canonical_name, key_of, owner_of, role_from_name
from slimadam.layers.names import NamedParameters, ToldApart, is_position, owning_modules, position_name, read_modules
from slimadam.layers.roles import ParameterRole
from slimadam.layers.splits import Piece, check_all_matched, declared_parts, pieces
from slimadam.plans.auto import AutoPlan
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import NO_ELEMENTS, Rule, Source, factored_rule, fit_rules, full_rule, paper_rule
from slimadam.utils.dtensor import check_not_flat
from slimadam.utils.errors import PlanError, did_you_mean

PlanArgument = str | Path | CompressionPlan | AutoPlan | None
_Used = dict[int, tuple[CompressionPlan, set[str]]]
"""By its id, each plan with the keys that were used."""
_ResolvedPlan = CompressionPlan | AutoPlan | Literal["rules", "factored"] | None

DECIDED_BEFORE: Final = "added after plan='auto' had decided"
_OF_THE_OPTIMIZER: Final = "the optimizer's"
_LARGEST_SHARE_WITHOUT_RULE: Final = 0.1
_NAMES_IN_WARNING: Final = 3
_DEFAULT: Final = object()
logger = logging.getLogger("slimadam")


def _read_plan(plan: object) -> _ResolvedPlan:
    if plan is None or plan == "none":  # as configuration files and the command line say it
        return None
    if isinstance(plan, (CompressionPlan, AutoPlan)) or plan == "rules" or plan == "factored":
        return plan
    if plan == "auto":
        return AutoPlan()
    if not isinstance(plan, (str, Path)):
        raise TypeError(
            f"plan={plan!r} must be None, 'auto', 'rules', 'factored', an AutoPlan, a CompressionPlan or "
            "the path of one"
        )
    if not Path(plan).is_file():
        hint = did_you_mean(str(plan), ("auto", "rules", "factored"))
        hint = hint or "write one with slimadam calibrate or CompressionPlan.save"
        raise PlanError(f"plan={str(plan)!r} is neither a file nor one of 'auto', 'rules' and 'factored'; {hint}")
    return CompressionPlan.load(plan)


class Resolver:
    """Finds names and rules for the parameters of one optimizer, and remembers which plan entries were used.

    Without a model, names are the user's, and roles come from the modules alive in the process that own the parameters.

    Args:
        plan: The optimizer's ``plan`` argument.
        model: Module that owns the parameters, if known.

    Raises:
        PlanError: A file is missing or holds no plan.
        TypeError: An argument is of the wrong type.
    """

    def __init__(self, plan: object, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} must be an nn.Module or None")
        self._arguments = {"plan": plan, "model": model}
        self.plan = _read_plan(plan)
        self._declared = self.plan.parts if isinstance(self.plan, AutoPlan) else {}
        self._named = NamedParameters([] if model is None else [model], self._declared)
        self._known = self._named
        self._told_apart: ToldApart | None = None
        self._matched = set(self._named.matched)
        self._all_names: dict[str, list[str]] = {}
        self._used: _Used = {}
        self._owner: MutableMapping[str, Tensor] = WeakValueDictionary()
        # With plan="rules", until a warning has named the parameters that they leave in full.
        self._by_role: dict[str, list[Rule]] | None = {}

    @property
    def cutoff(self) -> float:
        """The SNR cutoff that the plan was or will be chosen with; 1 without one."""
        return 1.0 if self.chosen_by_cutoff is None else self.chosen_by_cutoff

    @property
    def chosen_by_cutoff(self) -> float | None:
        """The SNR cutoff that the plan was or will be chosen with; None where it is not chosen by one."""
        if isinstance(self.plan, AutoPlan):
            return self.plan.cutoff if self.plan.budget is None else None
        return self.plan.cutoff if isinstance(self.plan, CompressionPlan) else None

    def take_arguments(self, group: dict[str, Any]) -> dict[str, Any]:
        """Take plan and model from a group, and return its plan if that is its own.

        ``ZeroRedundancyOptimizer`` puts the optimizer's arguments into each group, and saves these with its state dict:
        a word is left there for a plan or a model.

        Raises:
            TypeError: The group has a model of its own.
        """
        own = {}
        for key, argument in self._arguments.items():
            if key in group:
                value = group.pop(key)
                if value is not argument and value != _OF_THE_OPTIMIZER:
                    own[key] = value
                elif not isinstance(value, (str, NoneType)):
                    group[key] = _OF_THE_OPTIMIZER
        if own.pop("model", None) is not None:
            raise TypeError("model in a parameter group: it is for a whole optimizer; pass model=model to SlimAdam")
        return own

    def names(self, group: Mapping[str, Any], group_index: int) -> list[str]:
        """Name each parameter of a group: as the user does, else from the model, else by its position.

        A name that another parameter has already gets the position in front.

        Args:
            group: The parameter group.
            group_index: Its position.
        """
        names = []
        for index, (param, user_name) in enumerate(zip(group["params"], self._user_names(group), strict=True)):
            name = user_name or position_name(group_index, index)
            if self._owner.setdefault(name, param) is not param:
                name = f"{position_name(group_index, index)}.{user_name}"
            names.append(name)
        return names

    def rules(self, group: Mapping[str, Any], names: Sequence[str], plan: object = _DEFAULT) -> list[list[Rule]]:
        """Return the rules of each parameter of a group: one, or one for each of its parts.

        Args:
            group: The parameter group.
            names: A name for each of its parameters.
            plan: The group's own plan, if it has one.

        Raises:
            PlanError: The plan does not fit.
            RuntimeError: Another library has laid parameters end to end.
        """
        resolved = self.plan if plan is _DEFAULT else _read_plan(plan)
        if isinstance(resolved, AutoPlan) and plan is not _DEFAULT:
            raise PlanError(
                f"plan={plan!r} in a parameter group: 'auto' is for a whole optimizer; pass it to SlimAdam, and give "
                "the groups that it should leave alone a plan of their own, such as None"
            )
        user_names = self._user_names(group)
        if resolved is None or isinstance(resolved, CompressionPlan):
            self.forget_owners()
            if self._arguments["model"] is None:
                shared = {own for own, name in zip(user_names, names, strict=True) if own is not None and own != name}
                self._told_apart = ToldApart([*self._owner.values(), *group["params"]], shared)
        elif not all(map(self._known.owned, group["params"])):
            modules = owning_modules(group["params"])
            self._known = read_modules(modules, self._declared) if modules else self._named
            self._matched |= self._known.matched
        found = []
        for name, param, user_name in zip(names, group["params"], user_names, strict=True):
            self._all_names[name] = self._known.all_names(param)
            if resolved is not None:
                check_not_flat(name, param)
            rules = self._rules_of(resolved, name, param, user_name)
            if param.numel() == 0 and not all(rule.is_full for rule in rules):
                rules = [Rule(shape=tuple(param.shape), role=rules[0].role, reason=NO_ELEMENTS)]
            rules = _readable_rules(name, param, group, rules, resolved)
            found.append(rules)
        if resolved == "rules" and self._by_role is not None:
            self._by_role.update(zip(names, found, strict=True))
        pairs = zip(names, found, strict=True)
        missing = [name for name, (rule, *_) in pairs if rule.source == Source.ABSENT and len(rule.shape or ()) > 1]
        if missing:
            logger.warning(
                "the plan has no entry for %d parameters with two or more dimensions (%s, ...): "
                "their second moments stay in full",
                len(missing), missing[0],
            )  # fmt: skip
        return found

    def all_names(self, name: str) -> list[str]:
        """Return every name that the module has for the parameter of that name; none where it is not known."""
        return self._all_names.get(name, [])

    def of_model(self, param: Tensor) -> str | None:
        """Return the name that the optimizer's model has for a parameter; None where it has none, or is not known."""
        return self._named.name(param)

    def note(self, name: str, param: Tensor | None) -> None:
        """Take note of the parameter that has a name.

        Args:
            name: The name.
            param: The parameter; None where no parameter has the name any more.
        """
        if param is None:
            self._owner.pop(name, None)
        else:
            self._owner[name] = param

    def rename(self, names: Mapping[str, str]) -> None:
        """Take note of other names of all parameters, by the previous ones."""
        self._owner = WeakValueDictionary({names[name]: param for name, param in self._owner.items() if name in names})
        self._all_names = {names[name]: known for name, known in self._all_names.items() if name in names}
        if self._by_role is not None:
            self._by_role = {names[name]: rules for name, rules in self._by_role.items() if name in names}

    def read_model_again(self) -> None:
        """Read names and layers of the model anew: shapes have become known."""
        model = self._arguments["model"]
        if isinstance(model, nn.Module):
            self._named = self._known = NamedParameters([model], self._declared)
            self._matched |= self._named.matched

    def note_without_shape(self, name: str, plan: object = _DEFAULT) -> None:
        """Take note that entries of a plan are for a parameter whose shape is not known yet.

        Args:
            name: The parameter's name.
            plan: The plan of its group, if that has its own.
        """
        resolved = self.plan if plan is _DEFAULT else _read_plan(plan)
        if isinstance(resolved, CompressionPlan):
            self._note_use(resolved, resolved.keys_of(name))

    def forget_owners(self) -> None:
        """Let go of the modules that :meth:`rules` has found, which keep other parameters alive."""
        self._known = self._named
        self._told_apart = None

    def snapshot(self) -> tuple[dict[str, Tensor], _Used]:
        """Return the notes of :meth:`names` and :meth:`rules`, for :meth:`restore`."""
        return dict(self._owner), {key: (plan, set(keys)) for key, (plan, keys) in self._used.items()}

    def restore(self, snapshot: tuple[dict[str, Tensor], _Used]) -> None:
        """Forget what was noted since the snapshot."""
        self._owner, self._used = WeakValueDictionary(snapshot[0]), snapshot[1]
        self.forget_owners()

    def resume(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take over parameters that an earlier resolver has named and found rules for."""
        self._owner = WeakValueDictionary(named)
        if isinstance(self.plan, CompressionPlan):
            self._used = {id(self.plan): (self.plan, set(self.plan))}

    def check_all_used(self) -> None:
        """Check that each entry of a plan matches a parameter of the optimizer, or of the model if known.

        Warns where the paper's rules leave much in full.

        Raises:
            PlanError: Names the entry and the closest parameter.
        """
        if unmatched := [pattern for pattern in self._declared if pattern not in self._matched]:
            check_all_matched(unmatched, self._owner)
        for plan, used in self._used.values():
            others = (key for key in plan if key not in used)
            unused = [key for key in others if canonical_name(owner_of(key, plan[key].part)) not in self._named.known]
            if unused and all(map(is_position, plan)):
                raise PlanError(
                    f"the plan goes by positions such as {unused[0]!r}, since it was made by an optimizer without "
                    "names, and the parameters of this one are others or have names; make it again with "
                    "model.named_parameters() or model=model"
                )
            if unused:
                known = sorted({key for _, keys in self._used.values() for key in keys} | self._named.known)
                hint = did_you_mean(unused[0], known)
                raise PlanError(
                    f"the plan's entry {unused[0]!r} matches no parameter of the optimizer "
                    f"({len(unused)} of {len(plan)} entries do not). {hint + ' ' if hint else ''}Calibrate this "
                    "model, or pass model=model if this optimizer holds only part of it"
                )
        if self._by_role is not None:
            held = {name: rules for name, rules in self._by_role.items() if name in self._owner}
            self._by_role = None if _tell_without_rule(held, bool(self._named.known)) else held

    def _user_names(self, group: Mapping[str, Any]) -> list[str | None]:
        """Return the names that the user, or the model, has for a group's parameters; None where it has none."""
        if "param_names" in group:
            return list(map(canonical_name, group["param_names"]))
        return list(map(self._named.name, group["params"]))

    def _rules_of(self, plan: _ResolvedPlan, name: str, param: Tensor, user_name: str | None) -> list[Rule]:
        shape = tuple(param.shape)
        if isinstance(plan, CompressionPlan):
            keys = self._keys(plan, name, param, user_name)
            self._note_use(plan, keys)
            if keys:
                return fit_rules(name, [plan[key] for key in keys], shape)
        found = self._pieces(param, user_name)
        if plan is None or isinstance(plan, CompressionPlan):
            rule = Rule(shape=shape, role=found[0].role.role if len(found) == 1 else "", reason="plan=None: as AdamW")
            return [rule if plan is None else replace(rule, reason="not in the plan", source=Source.ABSENT)]
        if plan == "rules" and user_name is None and not self._known.owned(param):
            raise PlanError(_unnamed("plan='rules' goes by layer role"))
        return [_rule_of_piece(plan, piece) for piece in found]

    def _keys(self, plan: CompressionPlan, name: str, param: Tensor, user_name: str | None) -> list[str]:
        told = self._told_apart
        if told is not None and user_name in told.shared and (found := told.name(param, user_name)):
            return plan.keys_of(found)
        for known_as in (name, user_name, *self._named.all_names(param)):
            if known_as and (keys := plan.keys_of(known_as)):
                return keys
        found = None if told is None else told.name(param, user_name)
        if found is None and user_name is None:
            raise PlanError(_unnamed("the plan goes by parameter names"))
        return [] if found is None else plan.keys_of(found)

    def _pieces(self, param: Tensor, user_name: str | None) -> list[Piece]:
        declared = None if user_name is None else declared_parts(self._declared, [user_name])
        if user_name is None or (declared is None and self._known.owned(param)):
            return self._known.pieces(param)
        role = self._known.role(param)
        if role is None:  # a guess by name, with the layout that Linear and Embedding use
            by_name, ndim = role_from_name(user_name, param.dim()), param.dim()
            role = ParameterRole(by_name, (1,), (0,)) if ndim == 2 else ParameterRole(by_name if ndim < 2 else UNKNOWN)
        return pieces(user_name, tuple(param.shape), role, declared)

    def _note_use(self, plan: CompressionPlan, keys: Sequence[str]) -> None:
        self._used.setdefault(id(plan), (plan, set()))[1].update(keys)


def _rule_of_piece(plan: AutoPlan | Literal["rules", "factored"], piece: Piece) -> Rule:
    if isinstance(plan, AutoPlan):
        return full_rule(piece, "plan='auto' is still measuring: as AdamW until it has decided", Source.MEASURING)
    return factored_rule(piece) if plan == "factored" else paper_rule(piece)


def _readable_rules(
    name: str, param: Tensor, group: Mapping[str, Any], rules: list[Rule], plan: _ResolvedPlan
) -> list[Rule]:
    """Return the rules, or one for the whole parameter where it cannot be stored in parts that nobody asked for."""
    if rules[0].part is None or not (param.is_complex() or group["differentiable"]):
        return rules
    why = f"a {param.dtype} parameter" if param.is_complex() else "a group with differentiable=True"
    if plan is None or isinstance(plan, CompressionPlan):
        raise PlanError(f"{name!r}: {why} cannot be stored in parts; give the parameter one rule in the plan")
    logger.warning("%r counts as one matrix: %s cannot be stored in parts", name, why)
    return [_rule_of_piece(plan, Piece(tuple(param.shape), ParameterRole("")))]


def _unnamed(why: str) -> str:
    return (
        f"{why}, but these parameters have none: pass model=model, or params=model.named_parameters(), also those of "
        "several modules, one after the other or in groups"
    )


def _tell_without_rule(by_name: Mapping[str, Sequence[Rule]], knows_model: bool) -> bool:
    """Warn if the paper's rules leave weights in full that are more than a small share of all elements."""
    unknown: list[str] = []
    others: list[str] = []
    elements = left = 0
    for name, rules in by_name.items():
        for rule in rules:
            shape = rule.shape or ()
            elements += math.prod(shape)
            if rule.source == Source.NO_RULE and len(shape) > 1 and rule.role not in (NORM, BIAS):
                left += math.prod(shape)
                (unknown if rule.role == UNKNOWN else others).append(key_of(name, rule.part))
    if left <= _LARGEST_SHARE_WITHOUT_RULE * elements:
        return False
    reasons = [f"the paper has no rule for {_weights(others)}"] if others else []
    if unknown:
        tells = "neither name nor model tells" if knows_model else "without model=model nothing tells"
        reasons.append(f"{tells} what these are: {_weights(unknown)}")
    logger.warning(
        "plan='rules' leaves the second moments of these weights in full, %.0f%% of all elements: %s; plan='auto' "
        "measures them, plan='factored' averages their rows and columns, a plan of yours may do either",
        100 * left / elements, "; ".join(reasons),
    )  # fmt: skip
    return True


def _weights(keys: Sequence[str]) -> str:
    shown_keys = ", ".join(keys[:_NAMES_IN_WARNING]) + (", ..." if len(keys) > _NAMES_IN_WARNING else "")
    return f"{len(keys)} {'weight' if len(keys) == 1 else 'weights'} ({shown_keys})"
