"""The pending update of every parameter, worked out without a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from slimadam.distributed.sharded_rules import is_dtensor
from slimadam.optim.step.direction import update_without_decay
from slimadam.optim.step.param_groups import Held
from slimadam.optim.step.shard_direction import Shared, update_of_shards
from slimadam.optim.step.tensors import assembled, decoded, entries_of, hyperparameters, initial_state
from slimadam.state.rule import Rule
from slimadam.state.second_moment import is_made


def updates_without_decay(
    parameters: Iterable[Held],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    averages: Shared,
) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
    """As :meth:`slimadam.SlimAdam.updates_without_decay`.

    Args:
        parameters: Those of the optimizer.
        all_rules: By name.
        states: By parameter; those without one start with the pending step.
        averages: What :func:`~slimadam.optim.step.shard_direction.averages_after_step` returned.
    """
    for name, param, group in parameters:
        if param.grad is None:
            continue
        rules = all_rules[name]
        state = states.get(param, {})
        if not is_made(state):
            state = initial_state(name, rules, param, group, averages.clip_factor)
        state = {**decoded(param, state), "step": state["step"] + 1}
        if is_dtensor(param):
            yield param, group, update_of_shards(name, param, group, rules, state, averages)
            continue
        directions = (
            update_without_decay(entry, hyperparameters(group, averages.clip_factor))
            for entry in entries_of(rules, param, param.grad, group, state)
        )
        yield param, group, assembled(param, rules, directions)
