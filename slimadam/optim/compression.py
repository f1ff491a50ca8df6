"""Second moments that change their form in the middle of training: compressed by a decision, and expanded again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.layers.splits import key_of
from slimadam.optim.memory import memory_report
from slimadam.optim.registry import Registry
from slimadam.plans.expectation import expectation
from slimadam.plans.plan import CompressionPlan
from slimadam.state import second_moment
from slimadam.state.rule import Source
from slimadam.utils.dtensor import full_tensor
from slimadam.utils.formatting import format_bytes

logger = logging.getLogger("slimadam")


def decision(
    registry: Registry, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Mapping[str, Any]]
) -> CompressionPlan | None:
    """Measure one step of ``plan="auto"``, and return the plan once it has decided.

    Args:
        registry: Names and rules.
        groups: The parameter groups.
        states: The optimizer's state.
    """
    assert registry.measuring is not None
    moments = (
        (key_of(slot.name, rule.part), rule, states[slot.param]["exp_avg_sq"], registry.resolver.all_names(slot.name))
        for slot in registry.slots(groups)
        if slot.rules[0].source == Source.MEASURING and "exp_avg_sq" in states.get(slot.param, {})
        for rule in registry.measured[slot.name]
    )
    factorable = not any(group["amsgrad"] for group in groups)
    return registry.measuring.after_step(moments, registry.measuring.settings.forms if factorable else "mean")


def compress(
    registry: Registry,
    plan: CompressionPlan,
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, MutableMapping[str, Any]],
) -> None:
    """Put a decided plan in force: second moments shrink in place, and the rest of their memory is freed.

    Args:
        registry: Names and rules; those of the plan afterwards.
        plan: The decision.
        groups: The parameter groups.
        states: The optimizer's state.
    """
    before = memory_report(registry.slots(groups), states)
    registry.measuring = None
    for slot in registry.slots(groups):
        if slot.rules[0].source != Source.MEASURING:
            continue
        unmeasured = "no gradient while plan='auto' measured"
        slot.rules = [
            plan.get(key_of(slot.name, rule.part), replace(rule, reason=unmeasured, source=Source.OTHER))
            for rule in registry.measured[slot.name]
        ]
        slot.rules = registry.rules[slot.name] = slot.rules_that_shards_allow()
        registry.sample(slot.name, slot.param, states)
        _compress(slot, states.get(slot.param, {}))
    after = memory_report(registry.slots(groups), states)
    logger.info(
        "plan='auto' has decided: %.1f%% of second moments saved, optimizer state %s -> %s; %s",
        100 * after.second_moments_saved,
        format_bytes(before.total),
        format_bytes(after.total),
        expectation(rule for slot in registry.slots(groups) for rule in slot.rules)
        or "the loss to expect is not known",
    )


def expand(
    registry: Registry, slot: ParamSlot, keys: Collection[str], states: Mapping[Tensor, MutableMapping[str, Any]]
) -> None:
    """Return a parameter, or some of its parts, to full second moments.

    Args:
        registry: Names and rules.
        slot: The parameter.
        keys: Its name, or names of its parts.
        states: The optimizer's state.

    Raises:
        RuntimeError: Shards end inside a part; nothing has changed then.
    """
    reason = "returned to a full second moment by expand()"
    after = [
        replace(rule, form="full", dims=(), reason=reason, source=Source.EXPANDED)
        if key_of(slot.name, rule.part) in keys and not rule.is_full
        else rule
        for rule in slot.rules
    ]
    _expand(slot, slot_of(slot.name, slot.param, slot.group, after), states.get(slot.param, {}))
    registry.rules[slot.name] = after
    if registry.monitor is not None:
        for key in keys:
            registry.monitor.drop(key)


def _compress(slot: ParamSlot, state: MutableMapping[str, Any]) -> None:
    """Replace full second moments in a parameter's state by what its rules keep of them."""
    for kind in second_moment.SECOND_MOMENTS:
        if kind in state:
            averaged = second_moment.average(full_tensor(state.pop(kind)), slot.rules)
            state.update(second_moment.by_key(slot.placed(averaged), slot.rules, kind))


def _expand(before: ParamSlot, after: ParamSlot, state: MutableMapping[str, Any]) -> None:
    """Broadcast a parameter's averages where its rules have become full.

    Raises:
        RuntimeError: Shards end inside a part; nothing has changed then.
    """
    after.check()
    for kind in second_moment.SECOND_MOMENTS:
        stored = [full_tensor(moment) for moment in second_moment.moments_of(state, before.rules, kind)]
        if stored:
            full = second_moment.expand(stored, before.rules, before.shape)
            kept = [
                moments if rule == was else [rule.take(full)]
                for was, rule, moments in zip(
                    before.rules, after.rules, second_moment.by_rule(before.rules, stored), strict=True
                )
            ]
            expanded = after.placed([moment for moments in kept for moment in moments])
            second_moment.exchange(state, before.rules, after.rules, expanded, kind)
