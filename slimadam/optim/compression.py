"""Second moments that change their form in the middle of training: compressed by a decision, and expanded again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.kernels.interface import number
from slimadam.kernels.reference import scale_grad
from slimadam.layers.splits import key_of
from slimadam.measurement.slices import track
from slimadam.measurement.snr import measure
from slimadam.optim.memory import memory_report
from slimadam.optim.registry import Registry
from slimadam.plans.auto import Measurement
from slimadam.plans.expectation import expectation
from slimadam.plans.plan import CompressionPlan
from slimadam.state import second_moment
from slimadam.state.rule import Candidate, Rule, Source
from slimadam.utils.dtensor import full_tensor, local_gradient
from slimadam.utils.formatting import format_bytes

logger = logging.getLogger("slimadam")


def decision(
    registry: Registry,
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None = None,
) -> CompressionPlan | None:
    """Measure one step of ``plan="auto"``, and return the plan once it has decided.

    Args:
        registry: Names and rules.
        groups: The parameter groups.
        states: The optimizer's state.
        clip_factor: Factor that the step multiplied gradients by.
    """
    assert registry.measuring is not None
    if registry.measuring.grids:
        _see_gradients(registry, groups, states, clip_factor)
    averaged_only = {
        key_of(slot.name, rule.part)
        for slot in registry.slots(groups)
        if slot.group["amsgrad"]
        for rule in _measured_as(registry, slot)
    }
    has_moments = any(
        (slot.name in registry.measured or slot.is_measured) and second_moment.is_made(states.get(slot.param, {}))
        for slot in registry.slots(groups)
    )
    measurements = _measurements(registry, groups, states) if has_moments else None
    return registry.measuring.after_step(measurements, averaged_only)


def _see_gradients(
    registry: Registry,
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None,
) -> None:
    """Update grids with the gradients of a step: ``v <- beta2**n v + (1 - beta2**n) g**2``, in each ``n``-th step.

    With ``variance_init="gradient"`` they start at the first squared gradient that they see, as the state does.
    """
    assert registry.measuring is not None
    grids = registry.measuring.grids_by_name()
    for names, group in zip(registry.names, groups, strict=True):
        beta2 = number(group["betas"][1])
        if not registry.measuring.looks(registry.measuring.steps + 1, beta2):
            continue
        every = registry.measuring.looks_every(beta2)
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, param in zip(names, group["params"], strict=True):
            if name not in grids or param.grad is None:
                continue
            gradient = local_gradient(name, param)
            starts = group["variance_init"] == "gradient" and number(states[param]["step"]) <= every
            for grid in grids[name]:
                is_new = grid.moment is None
                moment, own = grid.seen(gradient)
                own = scale_grad(own, clip_factor)
                if is_new and starts:
                    moment.copy_(own).square_()
                pairs.append((moment, own))
        if pairs:
            moments, gradients = map(list, zip(*pairs, strict=True))
            track(moments, gradients, [beta2**every] * len(pairs), 1 - beta2**every)


def _measurements(
    registry: Registry, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Mapping[str, Any]]
) -> Iterator[Measurement]:
    """Yield how to measure each parameter that has state, or each of its parts."""
    assert registry.measuring is not None
    for slot in registry.slots(groups):
        state = states.get(slot.param, {})
        names = registry.resolver.all_names(slot.name)
        for rule in _measured_as(registry, slot):
            key = key_of(slot.name, rule.part)
            if key in registry.measuring.grids:
                if second_moment.is_made(state) and registry.measuring.grids[key].moment is not None:
                    yield key, rule, partial(registry.measuring.grids[key].measured, state), names
                continue
            in_full = (one for one in slot.rules if one.is_full and one.source == Source.MEASURING)
            stored = [one for one in in_full if one.part in (None, rule.part)]
            moments = second_moment.moments_of(state, stored) if stored else []
            if moments:
                yield key, rule, partial(_measured_in_full, rule, moments[0], stored[0].part is None), names


def _measured_as(registry: Registry, slot: ParamSlot) -> Sequence[Rule]:
    """Return the rules in full of the parts that a parameter is measured as.

    After a checkpoint of an optimizer that knew other parts, or measured what this one does not, the checkpoint's.
    """
    known = registry.measured.get(slot.name, ())
    parts = {rule.part for rule in known}
    measured = [rule for rule in slot.rules if rule.source == Source.MEASURING]
    if all(rule.part in parts or (known and rule.is_full and rule.part is None) for rule in measured):
        return known
    return [replace(rule, form="full", dims=()) for rule in slot.rules]


def _measured_in_full(rule: Rule, moment: Tensor, is_whole: bool) -> dict[Candidate, float]:
    full = full_tensor(moment)
    return measure(rule.take(full) if is_whole else full, rule.batch_dims)


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
    undecided = memory_report(registry.slots(groups), states)
    registry.measuring = None
    for slot in registry.slots(groups):
        if not slot.is_measured:
            continue
        before = slot_of(slot.name, slot.param, slot.group, slot.rules)
        slot.rules = _decided(before, _measured_as(registry, slot), plan)
        slot.rules = registry.rules[slot.name] = slot.rules_that_shards_allow()
        registry.sample(slot.name, slot.param, states)
        change_form(before, slot, states.get(slot.param, {}))
    decided = memory_report(registry.slots(groups), states)
    rules = [rule for slot in registry.slots(groups) for rule in slot.rules]
    logger.info(
        "plan='auto' has decided: %.1f%% of second moments saved, optimizer state %s -> %s; forms: %s; %s",
        100 * decided.second_moments_saved,
        format_bytes(undecided.total),
        format_bytes(decided.total),
        ", ".join(f"{form} {count}" for form, count in Counter(rule.form for rule in rules).most_common()),
        expectation(rules) or "the loss to expect is not known",
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
    change_form(slot, slot_of(slot.name, slot.param, slot.group, after), states.get(slot.param, {}))
    registry.rules[slot.name] = after
    if registry.monitor is not None:
        for key in keys:
            registry.monitor.drop(key)


def _decided(before: ParamSlot, measured: Sequence[Rule], plan: CompressionPlan) -> list[Rule]:
    """Return the decided rules of a parameter; what was not measured stays as it is stored.

    Args:
        before: The parameter with the rules that it was measured with.
        measured: Its rules in full, one for each part that was measured.
        plan: The decision.
    """
    stored = {rule.part: rule for rule in before.rules}
    found = []
    for rule in measured:
        own = stored.get(rule.part, rule)
        if own.source == Source.MEASURING:
            chosen = plan.get(key_of(before.name, rule.part))
            if chosen is None:
                own = replace(own, reason="no gradient while plan='auto' measured", source=Source.OTHER)
            elif chosen.is_full and not own.is_full and chosen.source == Source.MEASURED and not chosen.snr:
                own = replace(own, reason=f"as it was measured: {chosen.reason}", source=Source.OTHER)
            else:
                own = chosen
        found.append(own)
    return found


def change_form(before: ParamSlot, after: ParamSlot, state: MutableMapping[str, Any]) -> None:
    """Store a parameter's second moments by other rules: for the whole of it, or for the same parts.

    Args:
        before: The parameter with the rules that they are stored by.
        after: The parameter with the others.
        state: Its state; written.

    Raises:
        RuntimeError: Shards end inside a part; nothing has changed then.
    """
    after.check()
    parts = [rule.part for rule in before.rules]
    for kind in second_moment.SECOND_MOMENTS:
        stored = [full_tensor(moment) for moment in second_moment.moments_of(state, before.rules, kind)]
        if not stored:
            continue
        if parts == [rule.part for rule in after.rules]:
            changed = [
                moment
                for was, rule, moments in zip(
                    before.rules, after.rules, second_moment.by_rule(before.rules, stored), strict=True
                )
                for moment in second_moment.convert(moments, was.stored_as, rule.stored_as, was.shape or before.shape)
            ]
        else:
            changed = second_moment.converted(stored, before.rules, after.rules, before.shape)
        second_moment.exchange(state, before.rules, after.rules, after.placed(changed, copy=False), kind)
