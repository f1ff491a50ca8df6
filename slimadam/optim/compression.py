"""Second moments that change their form in the middle of training: compressed by a decision, and expanded again."""

from __future__ import annotations

import logging
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import distributed_moments, rules_that_shards_allow
from slimadam.distributed.sharded_rules import local_rules
from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import watch_parameter
from slimadam.optim.checkpoint.state_dict import Checkpointed
from slimadam.optim.memory import memory_report
from slimadam.plans.plan import CompressionPlan
from slimadam.state import second_moment
from slimadam.state.rule import Rule, Source
from slimadam.utils.dtensor import full_tensor, is_dtensor
from slimadam.utils.formatting import format_bytes
from slimadam.utils.torch_private import disable_dynamo

logger = logging.getLogger("slimadam")


class Replanned(Checkpointed):
    """The part of :class:`~slimadam.SlimAdam` that changes the plan in force, and the state with it."""

    @disable_dynamo
    @torch.no_grad()
    def _measure(self) -> None:
        """One step of ``plan="auto"`` before its decision, and the decision."""
        assert self._measuring is not None
        moments = (
            (key_of(name, rule.part), rule, self.state[param]["exp_avg_sq"], self._resolver.all_names(name))
            for name, param, _ in self._parameters()
            if self._rules[name][0].source == Source.MEASURING and "exp_avg_sq" in self.state.get(param, {})
            for rule in self._measured[name]
        )
        factorable = not any(group["amsgrad"] for group in self.param_groups)
        plan = self._measuring.after_step(moments, self._measuring.settings.forms if factorable else "mean")
        if plan is not None:
            self._compress(plan)

    def _compress(self, plan: CompressionPlan) -> None:
        """Put a decided plan in force: second moments shrink in place, the rest of their memory is freed."""
        before = memory_report(self._parameters(), self._rules, self.state)
        for name, param, _ in self._parameters():
            if self._rules[name][0].source != Source.MEASURING:
                continue
            unmeasured = "no gradient while plan='auto' measured"
            decided = [
                plan.get(key_of(name, rule.part), replace(rule, reason=unmeasured, source=Source.OTHER))
                for rule in self._measured[name]
            ]
            self._rules[name] = decided if not is_dtensor(param) else rules_that_shards_allow(name, decided, param)
            self._monitor_parameter(name, param)
            _compress(name, param, self._rules[name], self.state.get(param, {}))
        self._stepper.forget()
        self._measuring = None
        after = memory_report(self._parameters(), self._rules, self.state)
        logger.info(
            "plan='auto' has decided: %.1f%% of second moments saved, optimizer state %s -> %s",
            100 * after.second_moments_saved,
            format_bytes(before.total),
            format_bytes(after.total),
        )

    def _expand_pieces(self, name: str, param: Tensor, keys: set[str]) -> None:
        after = _expanded_rules(name, self._rules[name], keys)
        _expand(name, param, self._rules[name], after, self.state.get(param, {}))
        self._rules[name] = after
        self._stepper.forget()
        if self._monitor is not None:
            for key in keys:
                self._monitor.drop(key)

    def _monitor_parameter(self, name: str, param: Tensor) -> None:
        if self._monitor is not None:
            watch_parameter(self._monitor, name, param, self._rules[name], self.state.get(param, {}))


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
