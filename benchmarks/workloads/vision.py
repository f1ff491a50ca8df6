"""Scikit-learn's 8 x 8 digits, classified by a small vision transformer or a small ResNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.workloads.training import Batch

CLASSES = 10
_PIXELS, _LARGEST = 8, 16.0
_HELD_OUT_SHARE = 0.25
_SPLIT_SEED = 0


def vit() -> nn.Module:
    """Return four blocks of width 64 on patches of 2 x 2 pixels."""
    model: nn.Module = ViTForImageClassification(
        ViTConfig(
            image_size=_PIXELS, patch_size=2, num_channels=1, num_labels=CLASSES, hidden_size=64, num_hidden_layers=4,
            num_attention_heads=4, intermediate_size=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return model


def resnet() -> nn.Module:
    """Return two stages of two basic blocks, 16 and 32 channels."""
    model: nn.Module = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic",
                     num_labels=CLASSES)
    )  # fmt: skip
    return model


class Digits:
    """A quarter of the images is held out; batches are drawn at random from the rest.

    Args:
        build: Makes the model; called with the random generator seeded.
    """

    betas = (0.9, 0.999)
    batch_size = 64

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build

    @cached_property
    def _data(self) -> tuple[Batch, Batch]:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / _LARGEST
        labels = torch.tensor(digits.target, dtype=torch.long)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        split = round(len(labels) * _HELD_OUT_SHARE)
        held_out, train = order[:split], order[split:]
        return (images[train], labels[train]), (images[held_out], labels[held_out])

    def new_model(self, seed: int) -> nn.Module:
        """Return a model at the initialisation that the seed decides."""
        torch.manual_seed(seed)
        return self._build()

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random images with their labels.

        Args:
            steps: Number of batches.
            seed: Seed of the choice.
        """
        images, labels = self._data[0]
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (self.batch_size,), generator=generator)
            yield images[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the class in nats.

        Args:
            model: The classifier.
            batch: Images and labels.
        """
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    def held_out(self) -> Iterator[Batch]:
        """Yield the images held out."""
        yield self._data[1]
