"""Measuring one second moment into a history: what the recorder and ``plan="auto"`` have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slimadam.distributed.sharded_rules import whole
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.snr import measure
from slimadam.state.rule import Rule


def record(
    history: SNRHistory, step: int, key: str, rule: Rule, second_moment: Tensor | None, all_names: Sequence[str]
) -> None:
    """Measure what a rule is for and add it to a history.

    Args:
        history: Where to.
        step: Optimizer step, from 1.
        key: What the parameter, or its part, goes by.
        rule: Says which part of the parameter to take, and what it is.
        second_moment: Of the whole parameter's shape; None to make it known without a measurement.
        all_names: Every name of the whole parameter, where known.
    """
    assert rule.shape is not None
    values = {} if second_moment is None else measure(rule.take(whole(second_moment)), rule.batch_dims)
    history.forget_if_reshaped(key, rule.shape)
    history.record(step, key, rule.shape, values, rule.role, rule.part, rule.batch_dims, rule.fan_in, all_names)
