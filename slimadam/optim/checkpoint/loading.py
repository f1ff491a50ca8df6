"""Taking over saved groups and state, all of it checked before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import distributed_moments, initial_moments
from slimadam.kernels.interface import second_moment_dtype
from slimadam.optim.checkpoint import format
from slimadam.optim.step.dispatch import steps_on_device
from slimadam.optim.step.options import check_group, normalize_group
from slimadam.state import second_moment
from slimadam.state.first_moment import STORED, momentum_in, momentum_of
from slimadam.state.rule import Rule
from slimadam.utils.dtensor import full_tensor, is_dtensor, place
from slimadam.utils.errors import PlanError

# What only Adam and AdamW keep in a group; "fused" there says how they were run, not how to go on. How first moments
# are stored is, like the plan, the choice of the optimizer that loads.
_NOT_LOADED: Final = ("params", "decoupled_weight_decay", "fused", "momentum_dtype", "plan", "model")


def merged_groups(groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the saved options over the present ones, with the present parameters.

    Args:
        groups: The optimizer's groups.
        saved_groups: Those of the state dict.

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
        options = {key: value for key, value in saved.items() if key not in _NOT_LOADED}
        merged.append({**group, **deepcopy(options), "params": group["params"]})
        normalize_group(merged[-1])
        check_group(merged[-1])
    return merged


def check_saved(
    name: str, rules: Sequence[Rule], param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Check that :func:`loaded_state` can take over a saved state; no other rank is asked.

    Args:
        name: The parameter's name.
        rules: Its rule, or one for each of its parts.
        param: The parameter.
        group: Its group.
        saved: Its entry in the state dict.

    Raises:
        ValueError: An entry is missing or damaged.
        PlanError: The second moment was saved under another plan.
    """
    if not any(map(second_moment.is_own, saved)):
        return
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if _is_missing(saved, key)]
    if missing:
        raise ValueError(f"{name!r}: the state dict lacks {missing}; it is not of Adam, AdamW or SlimAdam")
    if group["amsgrad"] and _is_missing(saved, "max_exp_avg_sq"):
        raise ValueError(f"{name!r}: amsgrad=True, but the state dict has no max_exp_avg_sq; set amsgrad=False")
    format.check_tensors(name, saved, param)
    momentum_in(saved).check_saved(name, param, saved)
    for kind in second_moment.SECOND_MOMENTS:
        moments = second_moment.saved_moments(saved, rules, kind)
        if moments:
            _check_second_moment(name, moments, param, rules)


def loaded_state(
    name: str, rules: Sequence[Rule], param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a parameter's saved state as its optimizer keeps it; every tensor is a copy.

    With ``variance_init="gradient"`` a state of no step is made anew from the first step's gradient.

    Args:
        name: The parameter's name.
        rules: Its rule, or one for each of its parts; full second moments are averaged by them.
        param: The parameter. With a DTensor every rank must call, and tensors that lie otherwise are gathered.
        group: Its group.
        saved: Its entry in the state dict, checked by :func:`check_saved`.
    """
    loaded = deepcopy({key: value for key, value in saved.items() if not second_moment.is_own(key)})
    is_anew = group["variance_init"] == "gradient" and second_moment.is_of_no_step(saved)
    if is_anew or not second_moment.is_made(saved):
        return loaded
    device = param.device if steps_on_device(param, group) else torch.device("cpu")
    loaded["step"] = torch.as_tensor(saved["step"], dtype=second_moment.step_dtype()).to(device, copy=True)
    loaded.update(momentum_of(param, group).load(param, saved))
    for kind in second_moment.SECOND_MOMENTS:
        moments = second_moment.saved_moments(saved, rules, kind)
        if moments:
            stored = _second_moment(name, moments, param, rules)
            loaded.update(second_moment.by_key(stored, rules, kind))
    return loaded


def _is_missing(saved: Mapping[str, Any], key: str) -> bool:
    if key in second_moment.SECOND_MOMENTS:
        found = (value for own, value in saved.items() if second_moment.is_key_of(own, key))
        return all(isinstance(value, (Mapping, list, tuple)) and not value for value in found)
    return key not in saved if key == "step" else not any(own in saved for own in STORED)


def _check_second_moment(name: str, saved: Sequence[Tensor], param: Tensor, rules: Sequence[Rule]) -> None:
    shape = tuple(param.shape)
    shapes = tuple(tuple(part.shape) for part in saved)
    wanted = second_moment.state_shapes(rules, shape)
    if shapes not in (wanted, (shape,)):
        described = ", ".join(f"{rule.form}, dims={rule.dims}" for rule in rules)
        raise PlanError(
            f"{name!r}: the state dict holds a second moment of shape {' and '.join(map(str, shapes))}, this "
            f"optimizer's plan ({described}) keeps {' and '.join(map(str, wanted))}; "
            "convert it with slimadam.convert_state_dict(state_dict, optimizer.plan), or build the optimizer with the "
            "plan it was saved under, slimadam.CompressionPlan.from_dict(state_dict['slimadam']['plan']) or, with a "
            "distributed checkpoint, the one saved beside it (optimizer.plan.save)"
        )


def _second_moment(name: str, saved: Sequence[Tensor], param: Tensor, rules: Sequence[Rule]) -> Sequence[Tensor]:
    """Return a saved second moment as the rules store it; a full one is averaged by them."""
    shape = tuple(param.shape)
    dtype = second_moment_dtype(param.dtype)
    is_full = second_moment.state_shapes(rules, shape) != tuple(tuple(part.shape) for part in saved)
    if is_dtensor(param) and not is_full:
        made = initial_moments(name, rules, param, from_gradient=False)
        for target, part in zip(made, saved, strict=True):
            place(target, part)
        return made
    given = [full_tensor(part).to(device=param.device, dtype=dtype, copy=True) for part in saved]
    if not is_full:
        return given
    averaged = second_moment.average(given[0].contiguous(), rules)
    if is_dtensor(param):
        averaged = distributed_moments(name, rules, param, averaged)
    return averaged
