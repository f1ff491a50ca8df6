"""Decided plans that follow the run: ``AutoPlan(revise=True)`` changes forms where the SNR has clearly changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.kernels.float8 import decode
from slimadam.measurement.grid import LARGEST_GRID, place_grid
from slimadam.measurement.sampling import MEASUREMENTS
from slimadam.measurement.slices import TrackedSlices
from slimadam.optim.compression import change_form
from slimadam.optim.memory import memory_report
from slimadam.optim.registry import Registry
from slimadam.plans.auto import Revising
from slimadam.plans.selection import margin_of
from slimadam.state import second_moment
from slimadam.state.rule import FACTORED, FLOAT8, FormName, Rule, Source
from slimadam.utils.dtensor import full_tensor

logger = logging.getLogger("slimadam")

_CODED: Final = second_moment.Float8()
_SMALLEST: Final = 1e-30
_CLEARLY: Final = 1.5
"""Factor of the SNR that a plan asks for, above which one counts as clearly risen."""


def revise(
    registry: Registry, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, MutableMapping[str, Any]]
) -> None:
    """Change the form of parameters whose SNR has clearly fallen or risen.

    Averages whose sample has clearly declined (see :class:`~slimadam.measurement.monitor.Monitor`) become one byte for
    each element, or with ``forms`` other than ``"closest"`` full second moments. Of what is stored in bytes, three
    measurements in a row that are clearly above what the plan asks for make row and column averages.

    Args:
        registry: Names and rules.
        groups: The parameter groups.
        states: The optimizer's state.
    """
    monitor, revising = registry.monitor, registry.revising
    assert monitor is not None
    assert revising is not None
    declined = monitor.declined()
    for slot in list(registry.slots(groups)):
        if not any(rule.source == Source.MEASURED for rule in slot.rules):
            continue
        state = states.get(slot.param, {})
        rules = [
            _expanded(revising, rule, *declined[key]) if key in declined else _compressed(revising, slot, index, state)
            for index, (rule, key) in enumerate(zip(slot.rules, slot.keys, strict=True))
        ]
        after = slot_of(slot.name, slot.param, slot.group, rules)
        if rules == list(slot.rules) or after.why_not_stored() is not None:
            continue
        if _is_beyond_budget(registry, groups, states, after):
            continue
        for key, was, rule in zip(slot.keys, slot.rules, rules, strict=True):
            if rule != was:
                logger.info("plan='auto' is revised at step %d: %r: %s", monitor.steps, key, rule.reason)
        change_form(slot, after, state)
        registry.rules[slot.name] = rules
        registry.sample(slot.name, slot.param, states)


def _expanded(revising: Revising, rule: Rule, before: float, now: float) -> Rule:
    """Return a rule for a parameter, or part, whose averages no longer hold.

    Args:
        revising: How the plan was decided.
        rule: The rule with averages.
        before: Their usual SNR.
        now: Their latest.
    """
    form: FormName = FLOAT8 if revising.settings.forms == "closest" else "full"
    words = "one byte for each element" if form == FLOAT8 else "kept in full"
    reason = f"{words}: the SNR of {rule.stored_as.describe()} fell from {before:.3g} to {now:.3g}"
    return replace(rule, form=form, dims=(), reason=reason, source=Source.MEASURED)


def _compressed(revising: Revising, slot: ParamSlot, index: int, state: Mapping[str, Any]) -> Rule:
    """Return a rule with averages where those of a parameter, or part, in bytes have clearly come to hold.

    Args:
        revising: How the plan was decided; counts of high measurements are written.
        slot: The parameter.
        index: Position of the rule among the parameter's.
        state: The parameter's state.
    """
    rule, key = slot.rules[index], slot.keys[index]
    averaged = rule.stored_by(FACTORED)
    stored = second_moment.moments_of(state, slot.rules)
    if rule.form != FLOAT8 or not stored or revising.settings.budget is not None or averaged.shape is None:
        return rule
    needed = margin_of(rule) * revising.settings.cutoff
    (codes,) = second_moment.by_rule(slot.rules, stored)[index]
    found = snr_of_codes(averaged, full_tensor(codes))
    high = revising.high.get(key, 0) + 1 if found > _CLEARLY * needed else 0
    revising.high[key] = high
    if high < MEASUREMENTS:
        return rule
    revising.high.pop(key)
    reason = f"row and column averages: their SNR has risen to {found:.3g}, above {needed:g}"
    return replace(averaged, reason=reason, source=Source.MEASURED)


def snr_of_codes(rule: Rule, codes: Tensor) -> float:
    """Return the SNR of row and column averages of a second moment in codes, without the noise of their rounding.

    That noise adds ``(1 + 1 / SNR) / 5`` to ``1 / SNR`` (:class:`~slimadam.state.second_moment.Float8`). It is taken
    from at most 8,192 elements. NaN where the shape has no grid of 64.

    Args:
        rule: The rule with row and column averages; its shape is that of the codes.
        codes: The codes.
    """
    shape = tuple(codes.shape)
    index = place_grid(shape, min(LARGEST_GRID, codes.numel()))
    if index is None:
        return math.nan
    averages = second_moment.convert([codes], _CODED, rule.stored_as, shape)
    grid = TrackedSlices(rule, index, torch.float32)
    noise = 1 / _CODED.known_snr
    excess = 1 / max(grid.factored_snr(decode(codes[index]), averages), _SMALLEST) - noise
    return (1 + noise) / excess if excess > 0 else math.inf


def _is_beyond_budget(
    registry: Registry, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, Any], after: ParamSlot
) -> bool:
    """Return whether a change would leave less saved than the plan's budget, and say so once."""
    revising = registry.revising
    if revising is None or revising.settings.budget is None:
        return False
    budget = revising.settings.budget
    slots = (after if slot.name == after.name else slot for slot in registry.slots(groups))
    if memory_report(slots, states).second_moments_saved >= budget:
        return False
    if after.name not in revising.refused:
        revising.refused.add(after.name)
        logger.warning("plan='auto': %r is not expanded: less than the budget of %g would be saved", after.name, budget)
    return True
