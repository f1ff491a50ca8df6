"""Words of Python's standard library: a vocabulary as heavy-tailed as natural language's, of any size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.workloads.training import Batch, PredictsNext, in_batches
from slimadam.demo.data import ByteData, load
from slimadam.demo.model import ByteGPT
from slimadam.demo.training import DemoSettings

_WORD = re.compile(r"\w+|\s+|[^\w\s]")
_WIDTH, _LAYERS = 64, 2


def gpt(settings: DemoSettings, vocabulary: int) -> ByteGPT:
    """Return the demo's GPT with another vocabulary, initialised as it is.

    Args:
        settings: Sizes of the model.
        vocabulary: Number of tokens.
    """
    model = ByteGPT(settings.layers, settings.width, settings.heads, settings.context)
    model.token_embedding = nn.Embedding(vocabulary, settings.width)
    model.lm_head = nn.Linear(settings.width, vocabulary, bias=False)
    for layer in (model.token_embedding, model.lm_head):
        nn.init.normal_(layer.weight, std=0.02)
    return model


class Words(PredictsNext):
    """The demo's text in words, runs of white space and single signs, predicted by a small GPT.

    Args:
        size: Tokens: the most frequent ones, and one for all others.
        settings: Sizes of the model and of the batches; None: two layers of width 64.
    """

    def __init__(self, size: int, settings: DemoSettings | None = None) -> None:
        self._size = size
        self._settings = settings or DemoSettings(width=_WIDTH, layers=_LAYERS)
        self.betas = self._settings.betas

    @cached_property
    def data(self) -> ByteData:
        """Return the demo's text as token numbers, 0 for the most frequent."""
        text = load(None, self._settings.context)
        train, held_out = (
            _WORD.findall(bytes(part.tolist()).decode("latin-1")) for part in (text.train, text.held_out)
        )
        frequent = [word for word, _ in Counter(train).most_common(self._size - 1)]
        number = {word: index for index, word in enumerate(frequent)}

        def tokens(words: list[str]) -> Tensor:
            return torch.tensor([number.get(word, self._size - 1) for word in words])

        return ByteData(tokens(train), tokens(held_out), f"{text.source}, in {self._size} words")

    def new_model(self, seed: int) -> nn.Module:
        """Return the demo's GPT with another vocabulary, initialised as it is."""
        torch.manual_seed(seed)
        return gpt(self._settings, self._size)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random windows of the training text, as the demo does.

        Args:
            steps: Number of batches.
            seed: Seed of the windows' places.
        """
        return self.data.batches(steps, self._settings.batch_size, self._settings.context, seed)

    def held_out(self) -> Iterator[Batch]:
        """Yield windows of the held-out text, spread evenly."""
        windows = self.data.held_out_windows(self._settings.held_out_windows, self._settings.context)
        return in_batches(*windows)
