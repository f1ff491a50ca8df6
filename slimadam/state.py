"""The state dict: its format, and conversions between stored forms of a second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.errors import PlanError, shown
from slimadam.functional import stand_in
from slimadam.plan import CompressionPlan
from slimadam.rules import Rule, fit_rules

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


def check_is_mapping(state_dict: object) -> None:
    """Refuse what is no dict.

    Raises:
        TypeError: Says what it should be.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict={shown(state_dict)} must be what an optimizer's state_dict() returned")


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
    own = state_dict.get(KEY)
    if own and not isinstance(own.get("plan"), Mapping):
        raise ValueError(
            f"the state dict's {KEY!r} has plan={shown(own.get('plan'))}; pass what SlimAdam.state_dict() returned, or "
            f"remove {KEY!r} to load it as that of AdamW"
        )
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
    for key in ("exp_avg", "exp_avg_scale", *SECOND_MOMENTS):
        value = saved.get(key, ())
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ValueError(f"{name!r}: the state dict's {key} holds {type(tensor).__name__}, not a dense tensor")
            codes = key == "exp_avg_scale" or (key == "exp_avg" and tensor.dtype == torch.int8)
            if not codes and tensor.is_complex() != param.is_complex():
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


def by_rule(rules: Sequence[Rule], moments: Sequence[Tensor], ndim: int) -> list[tuple[Rule, Sequence[Tensor]]]:
    """The stored tensors of a parameter, rule by rule."""
    found, start = [], 0
    for rule in rules:
        end = start + len(rule.averaged_dims(ndim))
        found.append((rule, moments[start:end]))
        start = end
    return found


def state_shapes(rules: Sequence[Rule], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of all tensors that a second moment is stored in, for a parameter of the given shape."""
    return tuple(kept for rule in rules for kept in rule.state_shapes(shape if rule.part is None else rule.part.shape))


def average(full: Tensor, rules: Sequence[Rule]) -> list[Tensor]:
    """A full second moment averaged to what the rules of a parameter store.

    Args:
        full: Second moment of the parameter's shape; complex ones average real and imaginary parts apart.
        rules: The parameter's rule, or one for each of its parts.
    """
    stored = []
    for rule in rules:
        piece = rule.take(full)
        stored += [
            piece.mean(dims, keepdim=True) if dims else piece.clone() for dims in rule.averaged_dims(piece.dim())
        ]
    return stored


def expand(moments: Sequence[Tensor], rules: Sequence[Rule], shape: tuple[int, ...]) -> Tensor:
    """The full second moment, of the parameter's shape, that stored tensors stand for."""
    whole = torch.empty(shape, dtype=moments[0].dtype, device=moments[0].device)
    for rule, stored in by_rule(rules, moments, len(shape)):
        piece = rule.take(whole)
        dims = rule.averaged_dims(piece.dim())
        if whole.is_complex():
            real = stand_in([torch.view_as_real(part) for part in stored], dims)
            piece.copy_(torch.view_as_complex(real.contiguous()))
        else:
            piece.copy_(stand_in(stored, dims))
    return whole


def convert(name: str, saved: StoredMoment, param: Tensor, rules: Sequence[Rule], dtype: torch.dtype) -> StoredMoment:
    """A saved second moment as this optimizer stores it; full ones are averaged by the rules.

    Args:
        name: The parameter's name, for errors.
        saved: What the state dict holds.
        param: The parameter.
        rules: Its rule, or one for each of its parts.
        dtype: Precision to keep it in.

    Raises:
        PlanError: It was saved under another plan.
    """
    given = [part.to(device=param.device, dtype=dtype, copy=True) for part in parts(saved)]
    shapes = tuple(tuple(part.shape) for part in given)
    shape = tuple(param.shape)
    wanted = state_shapes(rules, shape)
    if shapes == wanted:
        return stored(given)
    if shapes == (shape,):
        return stored(average(given[0].contiguous(), rules))
    described = ", ".join(f"{rule.form}, dims={rule.dims}" for rule in rules)
    raise PlanError(
        f"{name!r}: the state dict holds a second moment of shape {' and '.join(map(str, shapes))}, this "
        f"optimizer's plan ({described}) keeps {' and '.join(map(str, wanted))}; "
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
        TypeError: An argument is of the wrong type.
        ValueError: The state dict does not carry a plan, as that of AdamW (which needs no conversion).
        PlanError: The plan does not fit the saved parameters.
    """
    if not (plan is None or isinstance(plan, CompressionPlan)):
        raise TypeError(f"plan={shown(plan)} must be a CompressionPlan, such as CompressionPlan.load(path), or None")
    check_is_mapping(state_dict)
    check_layout(state_dict)
    if KEY not in state_dict:
        raise ValueError(
            "the state dict carries no plan: it is not SlimAdam's; one of Adam or AdamW is loaded as it is"
        )
    old = CompressionPlan.from_dict(state_dict[KEY]["plan"])
    new = {name: _rules_under(plan, name, rules) for name, rules in old.by_parameter().items()}
    saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
    state = dict(state_dict["state"])
    for saved_id, (name, rules) in zip(saved_ids, new.items(), strict=True):
        before = old.by_parameter()[name]
        if saved_id in state and [rule.storage for rule in rules] != [rule.storage for rule in before]:
            state[saved_id] = _with_rules(state[saved_id], before, rules)
    own = {"format_version": FORMAT_VERSION, "plan": CompressionPlan.of_parameters(new).to_dict()}
    return {**state_dict, "state": state, KEY: own}


def _rules_under(plan: CompressionPlan | None, name: str, old: Sequence[Rule]) -> list[Rule]:
    shape = old[0].owner_shape or ()
    keys = [] if plan is None else plan.keys_of(name)
    if plan is None or not keys:
        role = old[0].role if old[0].part is None else ""
        return [Rule(shape=shape, role=role, reason="not in the plan" if plan else "plan=None: as AdamW")]
    return fit_rules(name, [plan[key] for key in keys], shape)


def _with_rules(state: Mapping[str, Any], before: Sequence[Rule], rules: Sequence[Rule]) -> dict[str, Any]:
    changed = dict(state)
    for key in SECOND_MOMENTS:
        if key in state:
            full = expand(parts(state[key]), before, before[0].owner_shape or ())
            changed[key] = stored(average(full, rules))
    return changed
