"""Second moments that change their form in the middle of training: compressed by a decision, and expanded again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from slimadam.distributed.sharded_moments import distributed_moments, rules_that_shards_allow
from slimadam.distributed.sharded_rules import local_rules
from slimadam.layers.splits import key_of
from slimadam.optim.memory import memory_report
from slimadam.optim.registry import Registry
from slimadam.plans.plan import CompressionPlan
from slimadam.state import second_moment
from slimadam.state.rule import Rule, Source
from slimadam.utils.dtensor import full_tensor, is_dtensor
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
        (key_of(name, rule.part), rule, states[param]["exp_avg_sq"], registry.resolver.all_names(name))
        for name, param, _ in registry.parameters(groups)
        if registry.rules[name][0].source == Source.MEASURING and "exp_avg_sq" in states.get(param, {})
        for rule in registry.measured[name]
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
    before = memory_report(registry.parameters(groups), registry.rules, states)
    registry.measuring = None
    for name, param, _ in registry.parameters(groups):
        if registry.rules[name][0].source != Source.MEASURING:
            continue
        unmeasured = "no gradient while plan='auto' measured"
        decided = [
            plan.get(key_of(name, rule.part), replace(rule, reason=unmeasured, source=Source.OTHER))
            for rule in registry.measured[name]
        ]
        registry.rules[name] = decided if not is_dtensor(param) else rules_that_shards_allow(name, decided, param)
        registry.sample(name, param, states)
        _compress(name, param, registry.rules[name], states.get(param, {}))
    after = memory_report(registry.parameters(groups), registry.rules, states)
    logger.info(
        "plan='auto' has decided: %.1f%% of second moments saved, optimizer state %s -> %s",
        100 * after.second_moments_saved,
        format_bytes(before.total),
        format_bytes(after.total),
    )


def expand(
    registry: Registry,
    name: str,
    param: Tensor,
    keys: Collection[str],
    states: Mapping[Tensor, MutableMapping[str, Any]],
) -> None:
    """Return a parameter, or some of its parts, to full second moments.

    Args:
        registry: Names and rules.
        name: The parameter's name.
        param: The parameter.
        keys: Its name, or names of its parts.
        states: The optimizer's state.

    Raises:
        RuntimeError: Shards end inside a part; nothing has changed then.
    """
    after = _expanded_rules(name, registry.rules[name], keys)
    _expand(name, param, registry.rules[name], after, states.get(param, {}))
    registry.rules[name] = after
    if registry.monitor is not None:
        for key in keys:
            registry.monitor.drop(key)


def _compress(name: str, param: Tensor, rules: Sequence[Rule], state: MutableMapping[str, Any]) -> None:
    """Replace full second moments in a parameter's state by what its rules keep of them."""
    for kind in second_moment.SECOND_MOMENTS:
        if kind in state:
            averaged = second_moment.average(full_tensor(state.pop(kind)), rules)
            if is_dtensor(param):
                averaged = distributed_moments(name, rules, param, averaged)
            state.update(second_moment.by_key(averaged, rules, kind))


def _expanded_rules(name: str, rules: Sequence[Rule], keys: Collection[str]) -> list[Rule]:
    """A parameter's rules where those of these keys, its name or names of its parts, keep everything."""
    return [
        replace(
            rule, form="full", dims=(), reason="returned to a full second moment by expand()", source=Source.EXPANDED
        )
        if key_of(name, rule.part) in keys and rule.form != "full"
        else rule
        for rule in rules
    ]


def _expand(
    name: str, param: Tensor, before: Sequence[Rule], after: Sequence[Rule], state: MutableMapping[str, Any]
) -> None:
    """Spread out what a parameter's averages stand for, where its rules become those of :func:`_expanded_rules`.

    Raises:
        RuntimeError: Shards end inside a part; nothing has changed then.
    """
    if is_dtensor(param):
        local_rules(name, after, param)
    for kind in second_moment.SECOND_MOMENTS:
        stored = [full_tensor(moment) for moment in second_moment.moments_of(state, before, kind)]
        if stored:
            full = second_moment.expand(stored, before, tuple(param.shape))
            kept = [
                moments if rule == was else [rule.take(full).clone()]
                for was, rule, (_, moments) in zip(
                    before, after, second_moment.by_rule(before, stored, param.dim()), strict=True
                )
            ]
            expanded = [moment for moments in kept for moment in moments]
            if is_dtensor(param):
                expanded = distributed_moments(name, after, param, expanded)
            second_moment.exchange(state, before, after, expanded, kind)
