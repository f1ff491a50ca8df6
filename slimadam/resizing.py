"""State for parameters of which rows are reset, dropped or added in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimadam import state as state_format
from slimadam.distributed import is_dtensor
from slimadam.entries import decoded, encode, initial_first_moment
from slimadam.errors import shown
from slimadam.rules import Rule

Index = Tensor | Sequence[int] | Sequence[bool] | slice | int


def positions(index: Index | None, param: Tensor, dim: int, argument: str) -> Tensor:
    """Return the positions along a dimension that an index means, int64.

    Args:
        index: Positions, a mask, a slice or one number; None: all.
        param: Has the dimension.
        dim: The dimension, not negative.
        argument: The index's name in errors.

    Raises:
        IndexError: It does not index the dimension.
    """
    everything = torch.arange(param.shape[dim], device=param.device)
    if index is None:
        return everything
    try:
        found = everything[torch.as_tensor(index, device=param.device) if isinstance(index, (list, tuple)) else index]
        return found.reshape(-1)
    except (IndexError, TypeError, RuntimeError, ValueError) as error:
        raise IndexError(
            f"{argument}={shown(index)} does not index dimension {dim} of a parameter of shape {tuple(param.shape)} "
            f"({error}); pass positions in 0..{param.shape[dim] - 1}, or a mask of {param.shape[dim]}"
        ) from error


def checked_dim(dim: int, param: Tensor) -> int:
    """Return a dimension of a parameter as a number that is not negative.

    Raises:
        IndexError: The parameter has no such dimension.
    """
    if isinstance(dim, bool) or not isinstance(dim, int) or not -param.dim() <= dim < param.dim():
        raise IndexError(f"dim={shown(dim)} is no dimension of a parameter of shape {tuple(param.shape)}")
    return dim % param.dim()


def check_replacement(name: str, old: Tensor, new: Tensor, kept: Tensor, added: int, dim: int) -> None:
    """Refuse a parameter that cannot take another one's place.

    Raises:
        TypeError: It is no tensor.
        ValueError: Its shape is not what follows from ``keep`` and ``added``.
        RuntimeError: One of both is a DTensor.
    """
    if not isinstance(new, Tensor):
        raise TypeError(f"new={shown(new)} must be a tensor")
    if isinstance(added, bool) or not isinstance(added, int) or added < 0:
        raise ValueError(f"added={shown(added)} must be a number of slices, 0 or more")
    if is_dtensor(old) or is_dtensor(new):
        raise RuntimeError(
            f"{name!r}: replace_param does not follow DTensors; build a new optimizer for sharded parameters"
        )
    wanted = (*old.shape[:dim], len(kept) + added, *old.shape[dim + 1 :])
    if tuple(new.shape) != wanted or new.is_complex() != old.is_complex():
        raise ValueError(
            f"{name!r}: {len(kept)} slices kept of {tuple(old.shape)} along dim={dim} and added={added} make a shape "
            f"of {wanted}, but new has {tuple(new.shape)}, {new.dtype}; pass the keep and added that made it"
        )
    if not new.is_leaf:
        raise ValueError(f"{name!r}: new is no leaf tensor; pass torch.nn.Parameter(new.detach())")


def reset_slices(state: Mapping[str, Any], rules: Sequence[Rule], param: Tensor, found: Tensor, dim: int) -> None:
    """Set moments to zero at some positions along a dimension, in place.

    A second moment that is averaged over the dimension stays: it is the other slices' too.

    Args:
        state: The parameter's state.
        rules: Its rule, or one for each of its parts.
        param: The parameter.
        found: Positions along ``dim``.
        dim: The dimension.
    """
    state_format.first_moment(state).index_fill_(dim, found, 0)
    for kind in state_format.SECOND_MOMENTS:
        stored = state_format.moments_of(state, rules, kind)
        if stored and all(rule.form != "factored" and rule.part is None for rule in rules):
            if stored[0].shape[dim] == param.shape[dim]:
                stored[0].index_fill_(dim, found, 0)
        elif stored:
            full = state_format.expand(stored, rules, tuple(param.shape)).index_fill_(dim, found, 0)
            for rule, (_, kept), new in zip(
                rules, state_format.by_rule(rules, stored, param.dim()), _by_rule(full, rules), strict=True
            ):
                if rule.form == "factored" or dim not in rule.dims:
                    for target, value in zip(kept, new, strict=True):
                        target.copy_(value)


def resized_state(
    state: Mapping[str, Any],
    rules: Sequence[Rule],
    old: Tensor,
    new: Tensor,
    new_rules: Sequence[Rule],
    group: Mapping[str, Any],
    kept: Tensor,
    dim: int,
) -> dict[str, Any]:
    """Return a state for a parameter that has some slices of another one, and new ones after them.

    New slices have moments of zero, as where AdamW's state is concatenated with zeros; the count of steps stays.

    Args:
        state: The other parameter's state.
        rules: Its rules.
        old: The other parameter.
        new: The parameter.
        new_rules: Its rules.
        group: The parameter group of both.
        kept: Positions of the slices along ``dim``.
        dim: The dimension.
    """
    made: dict[str, Any] = {}
    value = _resized(decoded(old, state)["exp_avg"], kept, dim, new.shape[dim])
    made.update(initial_first_moment(new, group))
    if "exp_avg_scale" in made:
        encode(new, value, value, made)
    else:
        made["exp_avg"].copy_(value)
    for kind in state_format.SECOND_MOMENTS:
        stored = state_format.moments_of(state, rules, kind)
        if not stored:
            continue
        if rules[0].form == "factored" or rules[0].part is not None:
            full = state_format.expand(stored, rules, tuple(old.shape))
            stored = state_format.average(_resized(full, kept, dim, new.shape[dim]), new_rules)
        elif stored[0].shape[dim] == old.shape[dim] and dim not in rules[0].dims:
            stored = [_resized(stored[0], kept, dim, new.shape[dim])]
        made.update(state_format.by_key(stored, new_rules, kind))
    return {
        **{key: value for key, value in state.items() if not state_format.is_own(key)},
        "step": state["step"],
        **made,
    }


def reset_all(state: MutableMapping[str, Any]) -> None:
    """Set a parameter's state to that before its first step, in place."""
    for key, value in state.items():
        if state_format.is_own(key):
            value.zero_()


def _by_rule(full: Tensor, rules: Sequence[Rule]) -> list[Sequence[Tensor]]:
    averaged = state_format.average(full, rules)
    return [tensors for _, tensors in state_format.by_rule(rules, averaged, full.dim())]


def _resized(tensor: Tensor, kept: Tensor, dim: int, size: int) -> Tensor:
    chosen = tensor.index_select(dim, kept)
    shape = list(tensor.shape)
    shape[dim] = size - chosen.shape[dim]
    return torch.cat([chosen, chosen.new_zeros(shape)], dim)
