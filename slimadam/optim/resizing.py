"""State for parameters of which rows are reset, dropped or added in the middle of training."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimadam.distributed.slots import ParamSlot
from slimadam.optim.step.dispatch import steps_on_device
from slimadam.state import second_moment
from slimadam.state.first_moment import momentum_in, momentum_of
from slimadam.utils.dtensor import is_dtensor
from slimadam.utils.errors import shown

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
    size = param.shape[dim] if param.dim() else 1
    everything = torch.arange(size, device=param.device)
    if index is None:
        return everything
    try:
        at = torch.as_tensor(index, device=param.device) if isinstance(index, (list, tuple)) else index
        if isinstance(at, Tensor) and at.shape == (0,) and at.is_floating_point():
            at = at.long()  # what an empty list becomes
        if isinstance(at, bool) or (isinstance(at, Tensor) and at.dim() > 1):
            raise IndexError("neither one number nor a list of them")
        return everything[at].reshape(-1)
    except (IndexError, TypeError, RuntimeError, ValueError) as error:
        raise IndexError(
            f"{argument}={shown(index)} does not index dimension {dim} of a parameter of shape {tuple(param.shape)} "
            f"({error}); pass positions in 0..{size - 1}, or a mask of {size}"
        ) from error


def checked_dim(dim: int, param: Tensor) -> int:
    """Return a dimension of a parameter as a number that is not negative; a scalar counts as one of size 1.

    Args:
        dim: The dimension, from the front or the back.
        param: The parameter.

    Raises:
        IndexError: The parameter has no such dimension.
    """
    count = max(1, param.dim())
    if isinstance(dim, bool) or not isinstance(dim, int) or not -count <= dim < count:
        raise IndexError(
            f"dim={shown(dim)} is no dimension of a parameter of shape {tuple(param.shape)}; pass one of "
            f"{-count}..{count - 1}"
        )
    return dim % count


def check_replacement(slot: ParamSlot, new: Tensor, kept: Tensor, added: int, dim: int) -> None:
    """Check that a parameter can take another one's place.

    Args:
        slot: The parameter that goes.
        new: The parameter that comes.
        kept: Positions of the slices that stay.
        added: Number of new slices.
        dim: Their dimension.

    Raises:
        TypeError: It is no tensor.
        ValueError: Its shape does not follow from ``keep`` and ``added``, or no step can update it.
        RuntimeError: One of both is a DTensor.
    """
    name, old = slot.name, slot.param
    if not isinstance(new, Tensor):
        raise TypeError(f"new={shown(new)} must be a tensor")
    if isinstance(added, bool) or not isinstance(added, int) or added < 0:
        raise ValueError(f"added={shown(added)} must be a number of slices, 0 or more")
    if is_dtensor(old) or is_dtensor(new):
        raise RuntimeError(
            f"{name!r}: replace_param does not follow DTensors; build a new optimizer for sharded parameters"
        )
    wanted = (*old.shape[:dim], len(kept) + added, *old.shape[dim + 1 :])
    if not old.dim() and len(kept) == 1 and not added:
        wanted = ()
    if new.layout != torch.strided or new.is_meta or not (new.is_floating_point() or new.is_complex()):
        raise ValueError(
            f"{name!r}: new is {new.dtype} with layout={new.layout} on {new.device}; a step updates dense tensors of "
            "floating-point or complex numbers that have values"
        )
    if tuple(new.shape) != wanted or new.is_complex() != old.is_complex():
        raise ValueError(
            f"{name!r}: {len(kept)} slices kept of {tuple(old.shape)} along dim={dim} and added={added} make a shape "
            f"of {wanted}, but new has {tuple(new.shape)}, {new.dtype}; pass the keep and added that made it"
        )
    if not new.is_leaf:
        raise ValueError(f"{name!r}: new is no leaf tensor; pass torch.nn.Parameter(new.detach())")


def reset_slices(slot: ParamSlot, state: Mapping[str, Any], found: Tensor, dim: int) -> None:
    """Set moments to zero at some positions along a dimension, in place.

    A second moment that is averaged over the dimension stays: it is the other slices' too. Of a first moment in codes a
    block that is not finite becomes zero as a whole.

    Args:
        slot: The parameter.
        state: Its state.
        found: Positions along ``dim``.
        dim: The dimension.
    """
    momentum_in(state).zero(state, found, dim)
    rules, param = slot.rules, slot.param
    for kind in second_moment.SECOND_MOMENTS:
        stored = second_moment.moments_of(state, rules, kind)
        if len(stored) == 1 and rules[0].part is None:
            if not param.dim() or stored[0].shape[dim] == param.shape[dim]:
                stored[0].index_fill_(dim, found, 0)
        elif stored:
            full = second_moment.expand(stored, rules, slot.shape).index_fill_(dim, found, 0)
            averaged = second_moment.by_rule(rules, second_moment.average(full, rules))
            for rule, kept, new in zip(rules, second_moment.by_rule(rules, stored), averaged, strict=True):
                if len(kept) > 1 or dim not in rule.dims:
                    for target, value in zip(kept, new, strict=True):
                        target.copy_(value)


def resized_state(old: ParamSlot, new: ParamSlot, state: Mapping[str, Any], kept: Tensor, dim: int) -> dict[str, Any]:
    """Return a state for a parameter that has some slices of another one, and new ones after them.

    New slices have moments of zero, as where AdamW's state is concatenated with zeros; the count of steps stays. All
    of it is where the parameter is, in its precision. Entries that a user has put there stay as they are.

    Args:
        old: The other parameter.
        new: The parameter, in the same group.
        state: The state of the other parameter.
        kept: Positions of the slices along ``dim``.
        dim: The dimension.
    """
    of_users = {key: value for key, value in state.items() if not second_moment.is_own(key)}
    if not second_moment.is_made(state):
        return of_users
    param = new.param
    size = param.shape[dim] if param.dim() else 1
    momentum = momentum_of(param, new.group)
    made = momentum.init(param)
    value = _resized(momentum_in(state).read(old.param, state), kept, dim, size).to(param.device, momentum.dtype)
    momentum.write(param, value, value, made)
    for kind in second_moment.SECOND_MOMENTS:
        stored = second_moment.moments_of(state, old.rules, kind)
        if stored:
            moments = new.placed(_resized_moments(old, new, stored, kept, dim, size))
            made.update(second_moment.by_key(moments, new.rules, kind))
    device = param.device if steps_on_device(param, new.group) else torch.device("cpu")
    return {**of_users, "step": state["step"].to(device), **made}


def reset_all(state: MutableMapping[str, Any]) -> None:
    """Set a parameter's state to that before its first step, in place."""
    for key, value in state.items():
        if second_moment.is_own(key):
            value.zero_()


def _resized_moments(
    old: ParamSlot, new: ParamSlot, stored: list[Tensor], kept: Tensor, dim: int, size: int
) -> list[Tensor]:
    """Return second moments of some slices and of new ones; an average over the dimension is that of what is kept."""
    alike = [rule.storage for rule in old.rules] == [rule.storage for rule in new.rules]
    if alike and len(stored) == 1 and old.rules[0].part is None:
        return stored if dim in old.rules[0].dims else [_resized(stored[0], kept, dim, size)]
    full = second_moment.expand(stored, old.rules, old.shape)
    averaged = dim in new.rules[0].dims and kept.numel()
    return second_moment.average(
        full.index_select(dim, kept) if averaged else _resized(full, kept, dim, size), new.rules
    )


def _resized(tensor: Tensor, kept: Tensor, dim: int, size: int) -> Tensor:
    if not tensor.dim():
        return tensor
    chosen = tensor.index_select(dim, kept)
    shape = list(tensor.shape)
    shape[dim] = size - chosen.shape[dim]
    return torch.cat([chosen, chosen.new_zeros(shape)], dim)
