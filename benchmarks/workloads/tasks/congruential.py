"""Linear congruential sequences ``x[t+1] = (a x[t] + c) mod m``, continued by a small GPT (arXiv 2502.10390)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.workloads.training import Batch, PredictsNext, in_batches
from benchmarks.workloads.vocabulary import gpt
from slimadam.demo.training import DemoSettings

_HELD_OUT_SHARE = 0.1
_HELD_OUT_SEQUENCES = 2048
_SPLIT_SEED = 0


class Congruential(PredictsNext):
    """Fresh sequences of full period at each step; a tenth of the pairs ``(a, c)`` is held out.

    Args:
        modulus: A power of two, 8 or larger: the number of tokens.
        settings: Sizes of the model and of the batches; embedding and head share a weight.
    """

    betas = (0.9, 0.99)

    def __init__(self, modulus: int, settings: DemoSettings) -> None:
        self._modulus = modulus
        self._settings = settings

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """Return multipliers ``1 mod 4`` with odd increments: those of full period."""
        pairs = torch.cartesian_prod(torch.arange(5, self._modulus, 4), torch.arange(1, self._modulus, 2))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        split = round(len(pairs) * _HELD_OUT_SHARE)
        return pairs[order[split:]], pairs[order[:split]]

    def new_model(self, seed: int) -> nn.Module:
        """Return the demo's GPT with a token for each number."""
        torch.manual_seed(seed)
        model = gpt(self._settings, self._modulus)
        model.lm_head.weight = model.token_embedding.weight
        return model

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield sequences of random pairs from random starts.

        Args:
            steps: Number of batches.
            seed: Seed of the choice.
        """
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield self._sequences(self._pairs[0], self._settings.batch_size, generator)

    def held_out(self) -> Iterator[Batch]:
        """Yield sequences of pairs that training never shows."""
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        return in_batches(*self._sequences(self._pairs[1], _HELD_OUT_SEQUENCES, generator))

    def _sequences(self, pairs: Tensor, count: int, generator: torch.Generator) -> Batch:
        factors, increments = pairs[torch.randint(len(pairs), (count,), generator=generator)].unbind(1)
        numbers = [torch.randint(self._modulus, (count,), generator=generator)]
        for _ in range(self._settings.context):
            numbers.append((factors * numbers[-1] + increments) % self._modulus)
        sequence = torch.stack(numbers, 1)
        return sequence[:, :-1], sequence[:, 1:]
