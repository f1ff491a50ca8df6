"""Continue training on other data from weights that one workload has trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.workloads.training import Batch, Workload, train, training_rate


class FineTuning:
    """The second workload's data and loss, started for every seed from the same weights of AdamW on the first's.

    Args:
        before: Workload of the pre-training.
        after: Workload with the same model.
        lr: Peak learning rate of the pre-training.
        steps: Its optimizer steps.
    """

    def __init__(self, before: Workload, after: Workload, lr: float, steps: int) -> None:
        self._before, self._after, self._lr, self._steps = before, after, lr, steps
        self.betas = after.betas

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters(), betas=self._before.betas)

        trained, _ = train(self._before, make, training_rate(self._lr, self._steps), self._steps, seed=0)
        return trained.state_dict()

    def new_model(self, seed: int) -> nn.Module:
        """Return the pre-trained model; the seed decides the random numbers drawn after it.

        Args:
            seed: Seed of the random generator.
        """
        weights = self._weights
        model = self._after.new_model(seed)
        model.load_state_dict(weights)
        return model

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield batches of the second workload.

        Args:
            steps: Number of batches.
            seed: Seed of their choice.
        """
        return self._after.batches(steps, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the second workload's loss of a batch in nats.

        Args:
            model: The model.
            batch: Inputs and targets.
        """
        return self._after.loss(model, batch)

    def held_out(self) -> Iterator[Batch]:
        """Yield what the second workload holds out."""
        return self._after.held_out()
