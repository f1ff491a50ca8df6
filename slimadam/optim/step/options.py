"""Checking the options of a parameter group before anything is changed."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimadam.kernels.interface import Scalar
from slimadam.state.first_moment import MOMENTUM_DTYPES
from slimadam.utils.errors import did_you_mean, shown

logger = logging.getLogger("slimadam")

FLAGS = ("amsgrad", "maximize", "capturable", "differentiable", "bf16_stochastic_round")
OPTIONAL_FLAGS = ("foreach", "fused")
VARIANCE_INITS = ("zeros", "gradient")
OPTIONS = (
    "params", "param_names", "lr", "betas", "eps", "weight_decay", "amsgrad", "plan", "variance_init",
    "momentum_dtype", "bf16_stochastic_round", "maximize", "foreach", "capturable", "differentiable", "fused",
)  # fmt: skip
NOT_IN_ADAMW = ("variance_init", "momentum_dtype", "bf16_stochastic_round")
"""Options that the groups of ``torch.optim.AdamW`` do not have."""


def normalize_group(group: dict[str, Any]) -> None:
    """Turn what configuration files say into what an option means, in place: text for numbers, dtypes and ``none``.

    So are 0 and 1 for flags. What means nothing is left as it is, for :func:`check_group` to refuse.
    """
    for name in ("lr", "eps", "weight_decay"):
        if name in group:
            group[name] = number_in(group[name])
    betas = group.get("betas")
    if isinstance(betas, Sequence) and not isinstance(betas, str):
        group["betas"] = tuple(map(number_in, betas))
    for name in (*FLAGS, *OPTIONAL_FLAGS):
        if _is_flag(group.get(name)):
            group[name] = bool(group[name])
    dtype = group.get("momentum_dtype")
    if isinstance(dtype, str):
        group["momentum_dtype"] = _DTYPES_IN_TEXT.get(dtype, dtype)


def number_in(value: Any) -> Any:
    """Return the number that a text says, and everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def check_group(group: Mapping[str, Any]) -> None:
    """Check every option of a parameter group whose defaults have been filled in.

    Raises:
        ValueError: An option has a value outside its range.
        TypeError: An option has the wrong type.
    """
    _check_names(group)
    _check_numbers(group)
    for name in FLAGS:
        if not _is_flag(group[name]):
            raise TypeError(f"{name}={group[name]!r} must be True or False")
    for name in OPTIONAL_FLAGS:
        if group[name] is not None and not _is_flag(group[name]):
            raise TypeError(f"{name}={group[name]!r} must be True, False or None")
    if group["variance_init"] not in VARIANCE_INITS:
        raise ValueError(f"variance_init={group['variance_init']!r} must be 'zeros' or 'gradient'")
    _check_momentum_dtype(group["momentum_dtype"])
    _check_combinations(group)


def _check_names(group: Mapping[str, Any]) -> None:
    if "max_grad_norm" in group:
        raise TypeError(
            "max_grad_norm is no option of a parameter group: it clips the norm of all groups together; pass "
            "SlimAdam(..., max_grad_norm=...)"
        )
    for name in group:
        if name not in OPTIONS:
            _tell_of_slip(str(name))


@cache
def _tell_of_slip(name: str) -> None:
    """Warn once of a user's own key in a group that looks like a misspelt option."""
    hint = did_you_mean(name, OPTIONS, cutoff=0.85)
    if hint:
        logger.warning("a parameter group has the key %r, which is kept but is no option; %s", name, hint)


def _check_numbers(group: Mapping[str, Any]) -> None:
    _check_scalar("lr", group["lr"], "Tensor lr must be 1-element")
    if not group["lr"] >= 0:
        raise ValueError(f"Invalid learning rate: {group['lr']} (lr must be a number >= 0)")
    if not _is_number(group["eps"]) or not group["eps"] >= 0:
        raise ValueError(f"Invalid epsilon value: {group['eps']} (eps must be a number >= 0)")
    _check_scalar("weight_decay", group["weight_decay"], "Tensor weight_decay must be 1-element")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']} (must be a number >= 0)")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be a pair (beta1, beta2)")
    for index, beta in enumerate(betas):
        _check_scalar(f"betas[{index}]", beta, f"Tensor betas[{index}] must be 1-element")
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta} (must be in [0, 1))")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, not {betas!r}")


def checked_max_grad_norm(value: Any) -> float | None:
    """Return the norm to clip to, which may be text from a configuration file.

    Raises:
        TypeError: It is no number.
        ValueError: It is not above zero.
    """
    value = number_in(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"max_grad_norm={shown(value)} must be a number > 0, or None to clip nothing")
    if not float(value) > 0:
        raise ValueError(f"max_grad_norm={value} must be a number > 0 (inf only measures), or None to clip nothing")
    return float(value)


def _check_scalar(name: str, value: Scalar, not_single: str) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{not_single}, not of shape {tuple(value.shape)}")
    elif not _is_number(value):
        raise TypeError(f"{name}={shown(value)} must be a number or a 1-element tensor")


def _check_momentum_dtype(dtype: object) -> None:
    if not any(dtype is known or dtype == known for known in MOMENTUM_DTYPES):
        raise ValueError(f"momentum_dtype={dtype!r} must be None, torch.float32, torch.bfloat16 or 'int8'")


def _check_combinations(group: Mapping[str, Any]) -> None:
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`: set one of them to False")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together: set one of them to None")
    if group["momentum_dtype"] == "int8" and group["differentiable"]:
        raise RuntimeError(
            "momentum_dtype='int8' does not support `differentiable`: rounding to codes has no gradient; use "
            "torch.bfloat16, or None"
        )
    check_foreach(group)


def check_foreach(group: Mapping[str, Any]) -> None:
    """Refuse tensors as numbers where ``foreach=True`` takes none; one may have been assigned since the group was made.

    Raises:
        ValueError: Names the option.
    """
    if group["foreach"] and not group["capturable"]:
        tensors = {"lr": group["lr"], "betas[0]": group["betas"][0], "betas[1]": group["betas"][1]}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")


_DTYPES_IN_TEXT: Mapping[Any, Any] = {
    "none": None,
    **{text: dtype for dtype in (torch.float32, torch.bfloat16) for text in (str(dtype), str(dtype)[len("torch.") :])},
}


def _is_flag(value: object) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:  # an integer above all floating-point numbers
        return False
    return True
