"""Computing a training step's loss again, on its own batches and with its own dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimadam.curvature.probe.snapshot import RandomState


@dataclass(frozen=True)
class MicroBatch:
    """One of the batches whose gradients add up to the pending one.

    Attributes:
        random: The random-number generators before its forward pass.
        loss: Computes its share of the loss, whose gradient is its share of the pending one.
    """

    random: RandomState
    loss: Callable[[], Tensor]


def replayed(batches: list[MicroBatch]) -> Callable[[], Tensor]:
    """The loss whose gradient is pending, as a function to be called at any parameters.

    Args:
        batches: All micro-batches since the last step.
    """

    def loss() -> Tensor:
        shares = []
        for batch in batches:
            batch.random.restore()
            shares.append(batch.loss().detach())
        return torch.stack(shares).sum()

    return loss
