"""Bytes of Python's standard library, predicted by the demo's GPT or by an LSTM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.workloads.training import Batch, PredictsNext, in_batches
from slimadam.demo.data import ByteData, load
from slimadam.demo.model import VOCABULARY, ByteGPT
from slimadam.demo.training import DemoSettings


class ByteLSTM(nn.Module):
    """Two LSTM layers between a byte embedding and a head, initialised as torch does.

    Args:
        width: Size of the embedding and of each layer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, length, 256]`` of the byte after each of ``tokens`` ``[batch, length]``."""
        logits: Tensor = self.lm_head(self.lstm(self.token_embedding(tokens))[0])
        return logits


def byte_gpt(settings: DemoSettings) -> nn.Module:
    """Return the demo's model."""
    return ByteGPT(settings.layers, settings.width, settings.heads, settings.context)


def byte_gpt_as_torch_initialises(settings: DemoSettings) -> nn.Module:
    """Return the demo's model with torch's defaults: larger, and standard normal embeddings."""
    model = byte_gpt(settings)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.reset_parameters()
    return model


def byte_lstm(settings: DemoSettings) -> nn.Module:
    """Return an LSTM as wide as the demo's model."""
    return ByteLSTM(settings.width)


class Bytes(PredictsNext):
    """The demo's data and batches with any model of bytes.

    Args:
        build: Makes the model; called with the random generator seeded.
        betas: Decay rates of both moments; None: the demo's.
        settings: Sizes of the model and of the batches; None: the demo's.
        text: Reads another text than the demo's.
    """

    def __init__(
        self,
        build: Callable[[DemoSettings], nn.Module],
        betas: tuple[float, float] | None = None,
        settings: DemoSettings | None = None,
        text: Callable[[], ByteData] | None = None,
    ) -> None:
        self._build = build
        self._settings = settings or DemoSettings()
        self._text = text
        self.betas = self._settings.betas if betas is None else betas

    @cached_property
    def _data(self) -> ByteData:
        return load(None, self._settings.context) if self._text is None else self._text()

    def new_model(self, seed: int) -> nn.Module:
        """Return a new model; as in the demo, the seed decides the initialisation."""
        torch.manual_seed(seed)
        return self._build(self._settings)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random windows of the training text, as the demo does.

        Args:
            steps: Number of batches.
            seed: Seed of the windows' places.
        """
        return self._data.batches(steps, self._settings.batch_size, self._settings.context, seed)

    def held_out(self) -> Iterator[Batch]:
        """Yield the demo's held-out windows."""
        windows = self._data.held_out_windows(self._settings.held_out_windows, self._settings.context)
        return in_batches(*windows)


def byte_llama(settings: DemoSettings) -> nn.Module:
    """Return a Llama of transformers on bytes, in which two heads share a key and a value.

    Args:
        settings: Sizes of the model; an even number of heads.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=settings.width, intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads // 2, max_position_embeddings=settings.context, use_cache=False,
        )
    )  # fmt: skip
    return model


class LlamaBytes(Bytes):
    """The demo's batches with a model of transformers."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the next byte in nats.

        Args:
            model: Language model.
            batch: Inputs and targets.
        """
        return F.cross_entropy(model(batch[0]).logits.flatten(0, 1), batch[1].flatten())
