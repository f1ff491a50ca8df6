"""What a parameter's step needs beside tensors, as numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from slimadam.kernels.scratch import scaled
from torch import Tensor

from slimadam.functional import Hyperparameters, bias_corrections


class Numbers(NamedTuple):
    """Hyperparameters and bias corrections of one step.

    Attributes:
        beta1: Decay rate of the first moment,
        beta2: and of the second.
        eps: Added to ``sqrt(v) / root``.
        decay: What the parameter is multiplied by.
        step_size: ``lr / (1 - beta1**t)``.
        root: ``sqrt(1 - beta2**t)``.
        gradient_factor: What gradients are multiplied by, to clip and to maximize.
    """

    beta1: float
    beta2: float
    eps: float
    decay: float
    step_size: float
    root: float
    gradient_factor: float

    @classmethod
    def of(cls, hyper: Hyperparameters, step: Tensor) -> Numbers:
        """Those of a parameter that has taken so many steps."""
        lr, beta1, beta2 = float(hyper.lr), float(hyper.beta1), float(hyper.beta2)
        step_size, root = bias_corrections(step, Hyperparameters(lr, beta1, beta2))
        factor = 1.0 if hyper.clip_factor is None else float(hyper.clip_factor)
        decay = 1 - lr * float(hyper.weight_decay)
        return cls(beta1, beta2, hyper.eps, decay, step_size, root, -factor if hyper.maximize else factor)

    def gradient(self, grad: Tensor) -> Tensor:
        """A block's, clipped and negated where it must be; good until the next."""
        if self.gradient_factor != 1:
            grad = scaled(grad, self.gradient_factor, torch.promote_types(grad.dtype, torch.float32))
        return grad
