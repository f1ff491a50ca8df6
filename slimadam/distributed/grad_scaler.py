"""The part of a ``GradScaler`` that it leaves to the step, with a check that all ranks agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimadam.utils.dtensor import groups_of, is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def unscale(grads: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
    """Divide gradients by the scale of a ``GradScaler``, unless one of them is not finite.

    Args:
        grads: The gradients, divided in place.
        grad_scale: Their scale.
        found_inf: A number that is not zero if one of them is not finite.

    Returns:
        True if one was not finite: the gradients are unchanged, and the step is skipped.
    """
    found = found_inf is not None and bool(found_inf.item())
    if may_differ(grads):
        _check_agreement(found, [grad for grad in grads if is_dtensor(grad)])
    if not found and grad_scale is not None:
        for grad in map(local, grads):
            grad.div_(grad_scale.to(grad.device))
    return found


def may_differ(grads: Iterable[Tensor]) -> bool:
    """Return whether a ``GradScaler`` may report an infinite gradient to some ranks only.

    It asks the ranks over which its first gradient is sharded, however the others lie.
    """
    layouts = {
        (grad.device_mesh, *(placement.is_replicate() for placement in grad.placements))
        for grad in grads
        if is_dtensor(grad)
    }
    return len(layouts) > 1


def _check_agreement(found: bool, grads: Sequence[DTensor]) -> None:
    """Raise on every rank if only some of those that share gradients found an infinite one. Collective."""
    flags = torch.tensor([found, not found], dtype=torch.float32, device=local(grads[0]).device)
    groups = (
        group
        for grad in grads
        for group in groups_of(grad, [index for index, one in enumerate(grad.placements) if not one.is_replicate()])
    )
    for group in dict.fromkeys(groups):
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group)
    if flags.all():
        raise RuntimeError(
            "GradScaler found a gradient that is not finite on some ranks only: it asks those over which the first "
            "gradient is sharded, and others are sharded over more; use ShardedGradScaler of "
            "torch.distributed.fsdp.sharded_grad_scaler, whose unscale_(optimizer), called before its step, asks all"
        )
