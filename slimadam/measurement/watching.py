"""What an optimizer shows its :class:`~slimadam.measurement.monitor.Monitor`: new rules, and each step's gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimadam.distributed.sharded_rules import is_dtensor, local_gradient, whole
from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Monitor
from slimadam.state import second_moment
from slimadam.state.rule import Rule


def watch_parameter(
    monitor: Monitor, name: str, param: Tensor, rules: Sequence[Rule], state: Mapping[str, Any]
) -> None:
    """Sample what is compressed of a parameter, from its full second moment where it still has one."""
    keys = [key_of(name, rule.part) for rule in rules]
    for key, rule in zip(keys, rules, strict=True):
        monitor.add(key, rule, param)
    full = state.get("exp_avg_sq")
    if isinstance(full, Tensor) and full.shape == param.shape:
        if is_dtensor(param) and not any(map(monitor.samples_shards_of, keys)):
            return
        full = whole(full)
        for key, rule in zip(keys, rules, strict=True):
            monitor.start(key, rule.take(full))


@torch.no_grad()
def watch_step(
    monitor: Monitor,
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None,
) -> None:
    """Show the samples a step's gradients, of groups that are not capturable.

    Args:
        monitor: Keeps the samples.
        groups: The parameter groups, each with its parameters' names.
        all_rules: By name.
        states: By parameter.
        clip_factor: What the step multiplied gradients by.
    """
    for names, group in groups:
        if not group["capturable"]:
            grads = (
                (key, local_gradient(name, param))
                for name, param in zip(names, group["params"], strict=True)
                if param.grad is not None
                for key in (key_of(name, rule.part) for rule in all_rules[name])
                if (monitor.samples_shards_of(key) if is_dtensor(param) else type(param.grad) is Tensor)
            )
            monitor.update(grads, float(group["betas"][1]), clip_factor)
    monitor.watch(lambda: _stored_by_key(groups, all_rules, states))


def _stored_by_key(
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> dict[str, Sequence[Tensor]]:
    return {
        key_of(name, rule.part): [whole(one) for one in moments] if rule.form == "factored" else moments
        for names, group in groups
        for name, param in zip(names, group["params"], strict=True)
        if states.get(param)
        for rule, moments in second_moment.by_rule(
            all_rules[name], second_moment.moments_of(states[param], all_rules[name]), param.dim()
        )
    }
