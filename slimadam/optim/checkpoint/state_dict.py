"""State dicts that an optimizer saves: its own, and one for AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimadam.distributed.slots import ParamSlot
from slimadam.kernels.float8 import is_coded
from slimadam.optim.checkpoint.loading import FORMAT_VERSION, KEY
from slimadam.optim.registry import Registry
from slimadam.optim.step.options import NOT_IN_ADAMW
from slimadam.state import second_moment
from slimadam.state.first_moment import decoded
from slimadam.utils.dtensor import full_tensor, is_dtensor, place

# Torch's Adam has the option, and AdamW's groups the key, from 2.7 on.
_DECOUPLED = {key: True for key in ("decoupled_weight_decay",) if key in inspect.signature(torch.optim.Adam).parameters}


def add_plan(saved: dict[str, Any], registry: Registry) -> None:
    """Add the plan and a format version to a state dict of torch's optimizer.

    A group with second moments that are not kept in full says ``fused=None``: AdamW's fused kernels would take the
    state for its own, and write past it. Dtypes become text, because torch gathers and broadcasts none.

    Args:
        saved: What ``torch.optim.Optimizer.state_dict()`` returned; written.
        registry: Names and rules.
    """
    for names, group in zip(registry.names, saved["param_groups"], strict=True):
        if not all(rule.is_full for name in names for rule in registry.rules.get(name, ())):
            group["fused"] = None
        if isinstance(group.get("momentum_dtype"), torch.dtype):
            group["momentum_dtype"] = str(group["momentum_dtype"])
    own = {"format_version": FORMAT_VERSION, "plan": registry.plan.to_dict()}
    if registry.measuring is not None:
        own["measuring"] = registry.measuring.to_dict()
    elif registry.monitor is not None:
        own["monitor"] = registry.monitor.state_dict()
        if registry.revising is not None:
            own["high"] = dict(registry.revising.high)
    saved[KEY] = own


def as_adamw(packed: Mapping[str, Any], registry: Registry, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a state dict that ``torch.optim.AdamW`` loads, with every second moment in full.

    Args:
        packed: What ``torch.optim.Optimizer.state_dict()`` returned.
        registry: Names and rules.
        groups: The parameter groups.
    """
    slots = {id(slot.param): slot for slot in registry.slots(groups)}
    params = (param for group in groups for param in group["params"])
    state = {
        index: _full_state(slots[id(param)], held) if id(param) in slots else held
        for index, param in enumerate(params)
        if (held := packed["state"].get(index)) is not None
    }
    return {
        "state": state,
        "param_groups": [
            {**{key: value for key, value in group.items() if key not in NOT_IN_ADAMW}, **_DECOUPLED}
            for group in packed["param_groups"]
        ],
    }


def _full_state(slot: ParamSlot, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's state as ``torch.optim.AdamW`` keeps it. Collective for a DTensor."""
    param = slot.param
    made = decoded(param, state)
    if not second_moment.is_made(state):
        return made
    made["exp_avg"] = made["exp_avg"].to(param.dtype, copy=True)
    made["step"] = made["step"].clone()
    for kind in second_moment.SECOND_MOMENTS:
        stored = second_moment.moments_of(made, slot.rules, kind)
        if stored:
            full = _expanded(slot, stored)
            for key in second_moment.keys_of(slot.rules, kind):
                del made[key]
            made[kind] = full.to(param.dtype)
            if is_dtensor(param):
                made[kind] = torch.zeros_like(param)
                place(made[kind], full)
    return made


def _expanded(slot: ParamSlot, moments: Sequence[Tensor]) -> Tensor:
    if len(moments) == 1 and moments[0].shape == slot.param.shape and not is_coded(moments[0]):
        return moments[0].clone()
    return second_moment.expand([full_tensor(moment) for moment in moments], slot.rules, slot.shape)
