"""State dicts from one plan to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimadam.distributed.slots import slot_of
from slimadam.optim.checkpoint.loading import FORMAT_VERSION, KEY, check_is_mapping, check_layout
from slimadam.plans.plan import CompressionPlan
from slimadam.state import second_moment
from slimadam.state.first_moment import stored_first_moment, with_own_keys
from slimadam.state.rule import Rule, Source, fit_rules
from slimadam.utils.dtensor import full_tensor, is_dtensor
from slimadam.utils.errors import shown


def convert_state_dict(state_dict: Mapping[str, Any], plan: CompressionPlan | None) -> dict[str, Any]:
    """Return a state dict of SlimAdam as an optimizer with another plan would have saved it.

    Averages of the old plan are broadcast back where the new plan needs more detail, and refined over about
    ``1 / (1 - beta2)`` steps.

    Args:
        state_dict: The result of :meth:`SlimAdam.state_dict`; it is not changed. With DTensors in it every rank must
            call.
        plan: The plan to convert to; None keeps every second moment in full.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The state dict does not carry a plan, as that of AdamW (which needs no conversion).
        PlanError: The plan does not fit the saved parameters.
    """
    if not (plan is None or isinstance(plan, CompressionPlan)):
        raise TypeError(f"plan={shown(plan)} must be a CompressionPlan, such as CompressionPlan.load(path), or None")
    check_is_mapping(state_dict)
    check_layout(state_dict)
    if KEY not in state_dict:
        raise ValueError(
            "the state dict carries no plan: it is not SlimAdam's; one of Adam or AdamW is loaded as it is"
        )
    old = CompressionPlan.from_dict(state_dict[KEY]["plan"])
    new = {name: _rules_under(plan, name, rules) for name, rules in old.by_parameter().items()}
    saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
    if len(saved_ids) != len(new):
        raise ValueError(
            f"the state dict has {len(saved_ids)} parameters, its plan {len(new)}; save it once all lazy modules have "
            "had a forward pass, and convert it as it was saved"
        )
    state = {saved_id: dict(with_own_keys(saved)) for saved_id, saved in state_dict["state"].items()}
    for saved_id, (name, rules) in zip(saved_ids, new.items(), strict=True):
        before = old.by_parameter()[name]
        if saved_id in state:
            state[saved_id] = _with_rules(name, state[saved_id], before, rules)
    own = {"format_version": FORMAT_VERSION, "plan": CompressionPlan.of_parameters(new).to_dict()}
    named = zip(saved_ids, new.values(), strict=True)
    averaged = {saved_id for saved_id, rules in named if not all(rule.is_full for rule in rules)}
    groups = [  # as SlimAdam.state_dict()
        {**group, "fused": None} if averaged.intersection(group["params"]) else group
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": state, "param_groups": groups, KEY: own}


def in_present_format(name: str, state: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Any]:
    """Return a parameter's state of an earlier release under the keys of this one.

    Args:
        name: The parameter's name.
        state: Its state.
        rules: Its rule, or one for each of its parts.
    """
    return _with_rules(name, with_own_keys(state), rules, rules)


def _rules_under(plan: CompressionPlan | None, name: str, old: Sequence[Rule]) -> list[Rule]:
    shape = old[0].owner_shape or ()
    keys = [] if plan is None else plan.keys_of(name)
    if plan is None or not keys:
        role = old[0].role if old[0].part is None else ""
        if plan:
            return [Rule(shape=shape, role=role, reason="not in the plan", source=Source.ABSENT)]
        return [Rule(shape=shape, role=role, reason="plan=None: as AdamW")]
    return fit_rules(name, [plan[key] for key in keys], shape)


def _with_rules(name: str, state: Mapping[str, Any], before: Sequence[Rule], rules: Sequence[Rule]) -> dict[str, Any]:
    """Return a parameter's saved state of any format as this release holds it under other rules."""
    alike = [rule.storage for rule in rules] == [rule.storage for rule in before]
    kinds = {kind: second_moment.saved_moments(state, before, kind) for kind in second_moment.SECOND_MOMENTS}
    changed = {
        key: value
        for key, value in state.items()
        if not any(second_moment.is_key_of(key, kind) for kind in second_moment.SECOND_MOMENTS)
    }
    for kind, moments in kinds.items():
        if not moments:
            continue
        if not alike:
            shape = before[0].owner_shape or ()
            moments = second_moment.converted(list(map(full_tensor, moments)), before, rules, shape)
            stored = stored_first_moment(state)
            if is_dtensor(stored):
                moments = slot_of(name, stored, {}, rules).placed(moments)
        changed.update(second_moment.by_key(moments, rules, kind))
    return changed
