"""The state: its format in memory and in state dicts, and what stored second moments stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.errors import shown
from slimadam.functional import stand_in
from slimadam.rules import Rule

KEY: Final = "slimadam"
FORMAT_VERSION: Final = 2
"""1: second moments of several tensors were saved as lists, which are still read."""
SECOND_MOMENTS: Final = ("exp_avg_sq", "max_exp_avg_sq")

StoredMoment = Tensor | list[Tensor]
SavedMoment = StoredMoment | Mapping[str, Tensor]


def step_dtype() -> torch.dtype:
    """The precision torch counts steps in."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def is_of_no_step(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state was made by a step of zero, which counts none."""
    return "step" in state and not state["step"] > 0


def parts(stored: SavedMoment | tuple[()]) -> Sequence[Tensor]:
    """A second moment, as it is stored or saved, as a sequence of tensors."""
    if isinstance(stored, Mapping):
        return [stored[str(index)] for index in range(len(stored))]
    return [stored] if isinstance(stored, Tensor) else stored


def stored(moments: Sequence[Tensor]) -> StoredMoment:
    """How a second moment is kept in the state: one tensor as itself, several in a list."""
    return moments[0] if len(moments) == 1 else list(moments)


def as_saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as a state dict holds it.

    Several tensors go under their numbers, ``{"0": rows, "1": columns}``: distributed checkpoints flatten nested dicts,
    but refuse lists. Codes of a first moment go under ``exp_avg_codes``: such checkpoints copy what has the name and
    shape they look for, and would take them for a first moment.
    """
    saved = {
        key: {str(index): part for index, part in enumerate(value)}
        if key in SECOND_MOMENTS and isinstance(value, (list, tuple))
        else value
        for key, value in state.items()
    }
    if "exp_avg_scale" in saved and "exp_avg" in saved:
        saved["exp_avg_codes"] = saved.pop("exp_avg")
    return saved


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
        if key in SECOND_MOMENTS and isinstance(value, Mapping):
            if set(value) != {str(index) for index in range(len(value))}:
                raise ValueError(f"{name!r}: the state dict's {key} has the keys {list(value)}, not '0', '1', ...")
            value = parts(value)
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
    if version not in range(1, FORMAT_VERSION + 1) or isinstance(version, bool):
        raise ValueError(
            f"the state dict has format version {version!r}; this release reads 1 to {FORMAT_VERSION}: update slimadam"
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
