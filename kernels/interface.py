"""Tensors and numbers of a step, as they are passed to every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
Dims = tuple[int, ...]


class Hyperparameters(NamedTuple):
    """Hyperparameters of a step; names and meanings as in ``torch.optim.AdamW``.

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
        """Return whether bias corrections stay tensors: to be traced, or not to make the host wait for a device."""
        on_device = self.capturable and step.device.type != "cpu"
        return on_device or self.differentiable or torch.compiler.is_compiling()

    def bias_corrections(self, step: Tensor) -> tuple[float, float]:
        """Return ``lr / (1 - beta1**t)`` and ``sqrt(1 - beta2**t)`` as numbers."""
        t = step.item()
        return self.lr / (1 - self.beta1**t), (1 - self.beta2**t) ** 0.5  # type: ignore[return-value]


class Entry(NamedTuple):
    """Tensors of one parameter's step; none of them is a copy.

    Attributes:
        param: The parameter.
        grad: Its gradient, of the same shape.
        exp_avg: First moment, of the same shape; codes where ``exp_avg_scale`` is a tensor.
        exp_avg_sq: Second moment: one tensor (full, or size 1 in the averaged dimensions) or two (factored). In uint8
            it holds codes of the full one, see :mod:`.float8`.
        max_exp_avg_sq: With amsgrad the running maxima, shaped as ``exp_avg_sq``; else empty.
        step: Steps taken, this one included, 0-dimensional.
        averaged_dims: For each tensor in ``exp_avg_sq`` the dimensions it is averaged over.
        seed: Seed of this step's stochastic rounding.
        exp_avg_scale: The scales of an ``exp_avg`` that holds codes, as uint8 exponents. None: it holds the first
            moment itself, which most implementations require.
        precomputed: True if ``exp_avg_sq`` is updated already, as averages over several ranks are, and only read. Of
            two tensors the first is then ``r / mean(r)``; ``max_exp_avg_sq`` is empty also with amsgrad.
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


class Gradients(list[Tensor]):
    """Gradients of a step, whose addresses several of its parts ask for."""

    @cached_property
    def addresses(self) -> list[int]:
        """The address of each."""
        return list(map(Tensor.data_ptr, self))


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return the address of each tensor."""
    return tensors.addresses if isinstance(tensors, Gradients) else list(map(Tensor.data_ptr, tensors))


def number(value: Scalar) -> float:
    """Return a hyperparameter as a number, without the warning that ``float`` of a tensor with a gradient gives."""
    return value.item() if isinstance(value, Tensor) else value


def second_moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of second moments: float32, or wider where the parameter is wider."""
    return torch.promote_types(dtype, torch.float32)
