"""``GradScaler``: unscaling in its place, and whether all ranks were told of a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from slimadam.utils.dtensor import groups_of, is_dtensor, local


@torch.no_grad()
def unscale(grads: Sequence[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
    """Do what a ``GradScaler`` left to the step.

    Args:
        grads: The gradients; divided by the scale.
        grad_scale: What they are scaled by.
        found_inf: Not zero: one of them is not finite.

    Returns:
        Whether one was not finite: they are as they were then, and the step is left out.
    """
    found = found_inf is not None and bool(found_inf.item())
    if may_differ(grads):
        found = agreed(found, grads)
    if not found and grad_scale is not None:
        for grad in map(local, grads):
            grad.div_(grad_scale.to(grad.device))
    return found


def may_differ(grads: Iterable[Tensor]) -> bool:
    """Whether a ``GradScaler`` can tell some ranks of an infinite gradient, and others not.

    It asks the ranks over which its first gradient is sharded, however the others lie.

    Args:
        grads: The gradients that it looks at.
    """
    layouts = {
        (grad.device_mesh, *(placement.is_replicate() for placement in grad.placements))
        for grad in grads
        if is_dtensor(grad)
    }
    return len(layouts) > 1


def agreed(found: bool, grads: Iterable[Tensor]) -> bool:
    """What this rank was told, if the ranks that share gradients were all told the same; each of them must ask.

    Args:
        found: Whether this rank was told of an infinite gradient.
        grads: The gradients.

    Raises:
        RuntimeError: Only some ranks were told. All of them raise.
    """
    shared = [grad for grad in grads if is_dtensor(grad)]
    said = torch.tensor([found, not found], dtype=torch.float32, device=local(shared[0]).device)
    groups = (
        group
        for grad in shared
        for group in groups_of(grad, [index for index, one in enumerate(grad.placements) if not one.is_replicate()])
    )
    for group in dict.fromkeys(groups):
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=group)
    if said.all():
        raise RuntimeError(
            "GradScaler found a gradient that is not finite on some ranks only: it asks those over which the first "
            "gradient is sharded, and others are sharded over more; use ShardedGradScaler of "
            "torch.distributed.fsdp.sharded_grad_scaler, whose unscale_(optimizer), called before its step, asks all"
        )
    return found
