"""The state dict: its format, and conversions between stored forms of a second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.errors import PlanError
from slimadam.functional import stand_in
from slimadam.plan import CompressionPlan
from slimadam.rules import Dims, Rule, fit_rule

KEY: Final = "slimadam"
FORMAT_VERSION: Final = 1
SECOND_MOMENTS: Final = ("exp_avg_sq", "max_exp_avg_sq")

StoredMoment = Tensor | list[Tensor]


def step_dtype() -> torch.dtype:
    """The precision torch counts steps in."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def parts(stored: StoredMoment | tuple[()]) -> Sequence[Tensor]:
    """A stored second moment as a sequence of tensors."""
    return [stored] if isinstance(stored, Tensor) else stored


def stored(moments: Sequence[Tensor]) -> StoredMoment:
    """How a second moment is kept in the state: one tensor as itself, several in a list."""
    return moments[0] if len(moments) == 1 else list(moments)


def check_layout(state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no optimizer state dict, or one that a later release wrote.

    Raises:
        ValueError: Names what is missing or wrong.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the state dict's {key!r} is {type(state_dict.get(key)).__name__}; pass an optimizer's")
    if not isinstance(state_dict.get(KEY, {}), Mapping):
        raise ValueError(f"the state dict's {KEY!r} is {state_dict[KEY]!r}; pass what SlimAdam.state_dict() returned")
    for saved_id, saved in state_dict["state"].items():
        if not isinstance(saved, Mapping):
            raise ValueError(f"the state dict's state of parameter {saved_id!r} is {type(saved).__name__}, not a dict")
    check_version(state_dict)


def check_tensors(name: str, saved: Mapping[str, Any], param: Tensor) -> None:
    """Refuse saved state that would fail only in the next step.

    Raises:
        ValueError: Names the parameter and the entry.
    """
    step = saved["step"]
    if not (isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1)) or not step >= 0:
        raise ValueError(f"{name!r}: the state dict's step is {step!r}; it must be one number >= 0")
    for key in ("exp_avg", *SECOND_MOMENTS):
        value = saved.get(key, ())
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ValueError(f"{name!r}: the state dict's {key} holds {type(tensor).__name__}, not a dense tensor")
            if tensor.is_complex() != param.is_complex():
                raise ValueError(f"{name!r}: the state dict's {key} is {tensor.dtype}, the parameter {param.dtype}")


def check_version(state_dict: Mapping[str, Any]) -> None:
    """Refuse state that a later release wrote.

    Raises:
        ValueError: Names the version found and the one that is read.
    """
    version = state_dict.get(KEY, {}).get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the state dict has format version {version!r}; this release reads {FORMAT_VERSION}: update slimadam"
        )


def average(full: Tensor, averaged_dims: Sequence[Dims]) -> list[Tensor]:
    """A full second moment averaged to what a rule stores.

    Args:
        full: Second moment of the parameter's shape; complex ones average real and imaginary parts apart.
        averaged_dims: For each stored tensor the dimensions it is averaged over.
    """
    return [full.mean(dims, keepdim=True) if dims else full.clone() for dims in averaged_dims]


def expand(moments: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The full second moment, of the parameter's shape, that stored tensors stand for."""
    if moments[0].is_complex():
        whole = torch.view_as_complex(stand_in([torch.view_as_real(part) for part in moments]).contiguous())
    else:
        whole = stand_in(moments)
    return whole.expand(tuple(shape)).clone(memory_format=torch.contiguous_format)


def convert(name: str, saved: StoredMoment, param: Tensor, rule: Rule, dtype: torch.dtype) -> StoredMoment:
    """A saved second moment as this optimizer stores it; full ones are averaged by the rule.

    Args:
        name: The parameter's name, for errors.
        saved: What the state dict holds.
        param: The parameter.
        rule: Its rule.
        dtype: Precision to keep it in.

    Raises:
        PlanError: It was saved under another plan.
    """
    given = [part.to(device=param.device, dtype=dtype, copy=True) for part in parts(saved)]
    shapes = tuple(tuple(part.shape) for part in given)
    shape = tuple(param.shape)
    if shapes == rule.state_shapes(shape):
        return stored(given)
    if shapes == (shape,):
        return stored(average(given[0], rule.averaged_dims(param.dim())))
    raise PlanError(
        f"{name!r}: the state dict holds a second moment of shape {' and '.join(map(str, shapes))}, this "
        f"optimizer's plan ({rule.form}, dims={rule.dims}) keeps {' and '.join(map(str, rule.state_shapes(shape)))}; "
        "convert it with slimadam.convert_state_dict(state_dict, optimizer.plan), or build the optimizer with the "
        "plan it was saved under, slimadam.CompressionPlan.from_dict(state_dict['slimadam']['plan'])"
    )


def convert_state_dict(state_dict: Mapping[str, Any], plan: CompressionPlan | None) -> dict[str, Any]:
    """A state dict of SlimAdam as an optimizer with another plan would have saved it.

    Second moments that the old plan averaged are spread out evenly again where the new plan needs more detail;
    what was averaged away does not come back, but is learnt anew within about ``1 / (1 - beta2)`` steps.

    Args:
        state_dict: What :meth:`SlimAdam.state_dict` returned; it is not changed.
        plan: The plan to convert to; None keeps every second moment in full.

    Raises:
        ValueError: The state dict does not carry a plan, as that of AdamW (which needs no conversion).
        PlanError: The plan does not fit the saved parameters.
    """
    check_version(state_dict)
    if KEY not in state_dict:
        raise ValueError(
            "the state dict carries no plan: it is not SlimAdam's; one of Adam or AdamW is loaded as it is"
        )
    old = CompressionPlan.from_dict(state_dict[KEY]["plan"])
    new = {name: _rule_under(plan, name, rule) for name, rule in old.items()}
    saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
    state = dict(state_dict["state"])
    for saved_id, (name, rule) in zip(saved_ids, new.items(), strict=True):
        if saved_id in state and rule != old[name]:
            state[saved_id] = _with_rule(state[saved_id], rule)
    own = {"format_version": FORMAT_VERSION, "plan": CompressionPlan(new).to_dict()}
    return {**state_dict, "state": state, KEY: own}


def _rule_under(plan: CompressionPlan | None, name: str, old: Rule) -> Rule:
    shape = old.shape or ()
    key = None if plan is None else plan.match(name)
    if plan is None or key is None:
        return Rule(shape=shape, role=old.role, reason="not in the plan" if plan else "plan=None: as AdamW")
    return fit_rule(name, plan[key], shape)


def _with_rule(state: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    shape = rule.shape or ()
    changed = dict(state)
    for key in SECOND_MOMENTS:
        if key in state:
            changed[key] = stored(average(expand(parts(state[key]), shape), rule.averaged_dims(len(shape))))
    return changed
