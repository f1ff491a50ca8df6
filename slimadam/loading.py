"""Taking over saved groups and state, all of it checked before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor

from slimadam import state as state_format
from slimadam.functional import second_moment_dtype
from slimadam.options import check_group
from slimadam.rules import Rule

_STATE_KEYS: Final = ("step", "exp_avg", *state_format.SECOND_MOMENTS)
# What only Adam and AdamW keep in a group; "fused" there says how they were run, not how to go on.
_OF_ADAM: Final = ("params", "decoupled_weight_decay", "fused")


def merged_groups(groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The saved options over the present ones, with the present parameters.

    Raises:
        ValueError: The groups do not correspond, or a saved option is out of range.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    merged = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(saved['params'])} parameters, the optimizer's {len(group['params'])}"
            )
        options = {key: value for key, value in saved.items() if key not in _OF_ADAM}
        merged.append({**group, **deepcopy(options), "params": group["params"]})
        check_group(merged[-1])
    return merged


def loaded_state(
    name: str,
    rules: Sequence[Rule],
    param: Tensor,
    group: Mapping[str, Any],
    momentum_dtype: torch.dtype,
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    """One parameter's saved state as its optimizer keeps it; every tensor is a copy.

    Args:
        name: The parameter's name, for errors.
        rules: Its rule, or one for each of its parts; full second moments are averaged by them.
        param: The parameter.
        group: Its group.
        momentum_dtype: Precision of its first moment.
        saved: Its entry in the state dict.

    Raises:
        ValueError: An entry is missing or damaged.
        PlanError: The second moment was saved under another plan.
    """
    loaded = deepcopy({key: value for key, value in saved.items() if key not in _STATE_KEYS})
    if not saved:
        return loaded
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in saved]
    if missing:
        raise ValueError(f"{name!r}: the state dict lacks {missing}; it is not of Adam, AdamW or SlimAdam")
    if group["amsgrad"] and "max_exp_avg_sq" not in saved:
        raise ValueError(f"{name!r}: amsgrad=True, but the state dict has no max_exp_avg_sq; set amsgrad=False")
    state_format.check_tensors(name, saved, param)
    if saved["exp_avg"].shape != param.shape:
        raise ValueError(
            f"{name!r}: the state dict's exp_avg has shape {tuple(saved['exp_avg'].shape)}, the parameter "
            f"{tuple(param.shape)}; load the state of the same model"
        )
    device = param.device if group["capturable"] else torch.device("cpu")
    loaded["step"] = torch.as_tensor(saved["step"], dtype=state_format.step_dtype()).to(device, copy=True)
    loaded["exp_avg"] = saved["exp_avg"].to(device=param.device, dtype=momentum_dtype, copy=True)
    for key in state_format.SECOND_MOMENTS:
        if key in saved:
            loaded[key] = state_format.convert(name, saved[key], param, rules, second_moment_dtype(param.dtype))
    return loaded
