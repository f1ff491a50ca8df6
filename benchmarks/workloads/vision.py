"""Scikit-learn's 8 x 8 digits, classified by a small vision transformer or a small ResNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.workloads.training import Batch, random_batches

CLASSES = 10
_PIXELS, _LARGEST = 8, 16.0
_HELD_OUT_SHARE = 0.25
_SPLIT_SEED = 0


def vit(width: int = 64, layers: int = 4, pixels: int = _PIXELS) -> nn.Module:
    """Return blocks on patches of 2 x 2 pixels.

    Args:
        width: Size of the residual stream, a multiple of the four heads.
        layers: Number of blocks.
        pixels: Height and width of the images.
    """
    model: nn.Module = ViTForImageClassification(
        ViTConfig(
            image_size=pixels, patch_size=2, num_channels=1, num_labels=CLASSES, hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return model


def resnet(channels: int = 16, blocks: int = 2) -> nn.Module:
    """Return two stages of basic blocks, the second with twice the channels.

    Args:
        channels: Channels of the first stage.
        blocks: Blocks in each stage.
    """
    model: nn.Module = ResNetForImageClassification(
        ResNetConfig(num_channels=1, embedding_size=channels, hidden_sizes=[channels, 2 * channels],
                     depths=[blocks, blocks], layer_type="basic", num_labels=CLASSES)
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
        return random_batches(*self._data[0], self.batch_size, steps, seed)

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


class NoisyDigits(Digits):
    """The digits at random places of a larger image under noise: no image comes twice, and no classifier is perfect.

    Args:
        build: Makes the model; called with the random generator seeded.
        pixels: Height and width of the image, 8 or more; at 8 there is one place.
        noise: Standard deviation of the noise; white is 1.
    """

    _held_out_images = 4096

    def __init__(self, build: Callable[[], nn.Module], pixels: int = 10, noise: float = 0.3) -> None:
        super().__init__(build)
        self._pixels, self._noise = pixels, noise

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield random images, moved and under noise, with their labels.

        Args:
            steps: Number of batches.
            seed: Seed of the choice, the places and the noise.
        """
        generator = torch.Generator().manual_seed(seed)
        for images, labels in super().batches(steps, seed):
            yield self._moved(images, generator), labels

    def held_out(self) -> Iterator[Batch]:
        """Yield the images held out at several places each, always the same ones under the same noise."""
        images, labels = self._data[1]
        generator = torch.Generator().manual_seed(_SPLIT_SEED)
        for _ in range(self._held_out_images // len(labels)):
            yield self._moved(images, generator), labels

    def _moved(self, images: Tensor, generator: torch.Generator) -> Tensor:
        room = self._pixels - _PIXELS + 1
        places = torch.randint(room, (2, len(images), 1), generator=generator)
        rows, columns = (places + torch.arange(_PIXELS)).unbind()
        canvas = torch.randn(len(images), self._pixels, self._pixels, generator=generator).mul_(self._noise)
        index = torch.arange(len(images))[:, None, None]
        canvas[index, rows[:, :, None], columns[:, None, :]] += images.squeeze(1)
        return canvas.unsqueeze(1)
