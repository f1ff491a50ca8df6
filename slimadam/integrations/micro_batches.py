"""A training step's loss, computed again on its own batches and with its own dropout masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slimadam.curvature.probe.snapshot import RandomState

Loss = Callable[[], Tensor]


def replayable(loss: Loss, module: nn.Module) -> Loss:
    """Return the loss of a micro-batch as a function that computes it with the random numbers of now.

    Args:
        loss: Computes the micro-batch's share of the loss of a step.
        module: The model, whose devices tell which random-number generators count.
    """
    random = RandomState([param.device for param in module.parameters()])

    def again() -> Tensor:
        random.restore()
        return loss().detach()

    return again


def summed(losses: Sequence[Loss]) -> Loss:
    """Return the loss of a step, to be called at any parameters, from those of all its micro-batches."""
    return lambda: torch.stack([loss() for loss in losses]).sum()
