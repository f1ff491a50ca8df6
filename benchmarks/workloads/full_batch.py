"""A small network on all of 1,000 digits at once, with the squared loss: gradient descent without noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CLASSES = 10
_EXAMPLES, _PIXELS, _LARGEST = 1000, 64, 16.0
_WIDTH = 32


class FullBatch:
    """Scikit-learn's 8 x 8 digits, centred, against one-hot targets, as in arXiv 2103.00065."""

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        digits = load_digits()
        images = torch.tensor(digits.data[:_EXAMPLES], dtype=torch.float32) / _LARGEST
        labels = torch.tensor(digits.target[:_EXAMPLES], dtype=torch.long)
        return images - images.mean(0), F.one_hot(labels, CLASSES).float()

    def new_model(self, seed: int) -> nn.Module:
        """Return two hidden layers of width 32 with tanh, initialised as torch does."""
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(_PIXELS, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, CLASSES)
        )

    def closure(self, model: nn.Module) -> Callable[[], Tensor]:
        """Return a closure that computes half the squared error, summed over classes and averaged over digits."""
        images, targets = self._data
        return lambda: (model(images) - targets).square().sum(1).mean() / 2
