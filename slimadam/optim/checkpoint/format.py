"""The layout of a state dict, and checks of those that are to be loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.state.first_moment import FIRST_MOMENTS
from slimadam.state.second_moment import SECOND_MOMENTS, is_key_of
from slimadam.utils.errors import shown

KEY: Final = "slimadam"


FORMAT_VERSION: Final = 3
"""1: second moments of several tensors were saved as lists; 2: as dicts by number. Both are still read."""


def check_is_mapping(state_dict: object) -> None:
    """Check that a state dict is a dict.

    Raises:
        TypeError: Says what it should be.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict={shown(state_dict)} must be what an optimizer's state_dict() returned")


def check_layout(state_dict: Mapping[str, Any]) -> None:
    """Check that a dict is an optimizer's state dict that this release reads.

    Raises:
        ValueError: Names the entry that is missing or wrong.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the state dict's {key!r} is {type(state_dict.get(key)).__name__}; pass an optimizer's")
    if not isinstance(state_dict.get(KEY, {}), Mapping):
        raise ValueError(f"the state dict's {KEY!r} is {state_dict[KEY]!r}; pass what SlimAdam.state_dict() returned")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"the state dict's param_groups[{index}]={shown(group)} is no dict with a list of 'params'; pass an "
                "optimizer's"
            )
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
    """Check the entries of a saved state, which would else fail only in the next step.

    Args:
        name: The parameter's name.
        saved: Its entry in the state dict.
        param: The parameter.

    Raises:
        ValueError: Names the parameter and the entry.
    """
    step = saved["step"]
    is_one = isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta)
    if not is_one or not 0 <= step < 2**53:
        raise ValueError(f"{name!r}: the state dict's step is {shown(step)}; it must be one number >= 0")
    for key, value in saved.items():
        if key in FIRST_MOMENTS or any(is_key_of(key, kind) for kind in SECOND_MOMENTS):
            _check_tensor_entry(name, key, value, param)


def _check_tensor_entry(name: str, key: str, value: Any, param: Tensor) -> None:
    if key in SECOND_MOMENTS and isinstance(value, Mapping):
        if set(value) != {str(index) for index in range(len(value))}:
            raise ValueError(f"{name!r}: the state dict's {key} has the keys {list(value)}, not '0', '1', ...")
        value = list(value.values())
    for tensor in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name!r}: the state dict's {key} holds {type(tensor).__name__}, not a dense tensor")
        if tensor.is_meta and not param.is_meta:
            raise ValueError(f"{name!r}: the state dict's {key} has no values (device='meta'); pass it as it was saved")
        codes = key in ("exp_avg_codes", "exp_avg_scale") or (key == "exp_avg" and tensor.dtype == torch.int8)
        if not codes and tensor.is_complex() != param.is_complex():
            raise ValueError(f"{name!r}: the state dict's {key} is {tensor.dtype}, the parameter {param.dtype}")
    if not isinstance(value, Tensor) and key not in SECOND_MOMENTS:
        raise ValueError(f"{name!r}: the state dict's {key} holds {type(value).__name__}, not a dense tensor")


def check_version(state_dict: Mapping[str, Any]) -> None:
    """Check that no later release wrote a state dict.

    Raises:
        ValueError: Names the version found and those that are read.
    """
    version = state_dict.get(KEY, {}).get("format_version", FORMAT_VERSION)
    known = isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION
    if not known:
        raise ValueError(
            f"the state dict has format version {shown(version)}; this release reads 1 to "
            f"{FORMAT_VERSION}: update slimadam"
        )
