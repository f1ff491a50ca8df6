"""The tensors and numbers of a step, as every implementation takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


Dims = tuple[int, ...]


class Hyperparameters(NamedTuple):
    """What a step needs beside tensors; names and meanings as in ``torch.optim.AdamW``.

    Gradients are multiplied by ``clip_factor``, 0-dimensional, where there is one.
    """

    lr: Scalar = 1e-3
    beta1: Scalar = 0.9
    beta2: Scalar = 0.999
    eps: float = 1e-8
    weight_decay: Scalar = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    capturable: bool = False
    differentiable: bool = False
    stochastic_round: bool = False
    clip_factor: Tensor | None = None

    def keeps_tensors(self, step: Tensor) -> bool:
        """Whether bias corrections stay tensors: to be traced, or not to make the host wait for a device."""
        on_device = self.capturable and step.device.type != "cpu"
        return on_device or self.differentiable or torch.compiler.is_compiling()


class Entry(NamedTuple):
    """The tensors of one parameter's step; none of them a copy.

    Attributes:
        param: The parameter.
        grad: Its gradient, of the same shape.
        exp_avg: First moment, of the same shape; codes where ``exp_avg_scale`` is a tensor.
        exp_avg_sq: Second moment: one tensor (full, or size 1 in the averaged dimensions) or two (factored).
        max_exp_avg_sq: With amsgrad the running maxima, shaped as ``exp_avg_sq``; else empty.
        step: Steps taken, this one included, 0-dimensional.
        averaged_dims: For each tensor in ``exp_avg_sq`` the dimensions it is averaged over.
        seed: Seed of this step's stochastic rounding.
        exp_avg_scale: The scales of an ``exp_avg`` that holds codes, as uint8 exponents. None: it holds the first
            moment itself, which is all that most implementations take.
        precomputed: ``exp_avg_sq`` is what this step divides by, and is not updated: averages over several ranks. Of
            two the first is ``r / mean(r)``, and ``max_exp_avg_sq`` is empty also with amsgrad.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Sequence[Tensor]
    max_exp_avg_sq: Sequence[Tensor]
    step: Tensor
    averaged_dims: Sequence[Dims]
    seed: int = 0
    exp_avg_scale: Tensor | None = None
    precomputed: bool = False


def second_moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision second moments are kept in: float32, or wider where the parameter is wider."""
    return torch.promote_types(dtype, torch.float32)
