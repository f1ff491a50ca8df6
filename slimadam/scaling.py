"""``GradScaler`` on DTensors: whether all ranks have been told of a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from slimadam.distributed import groups_of, is_dtensor, local


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
