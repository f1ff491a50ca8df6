"""The UV model: two linear layers and one example, small enough for the whole Hessian at every step.

``f(x) = v^T U x / sqrt(width)`` with the loss ``(f - y)**2 / 2`` (arXiv 2311.02076).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UVModel(nn.Module):
    """The model with its one example.

    Args:
        weight: ``U``, of shape ``[width, inputs]``.
        readout: ``v``, of shape ``[width]``.
        example: ``x``, of shape ``[inputs]``.
        target: ``y``.
    """

    example: Tensor

    def __init__(self, weight: Tensor, readout: Tensor, example: Tensor, target: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.readout = nn.Parameter(readout)
        self.register_buffer("example", example)
        self.target = target

    @classmethod
    def random(cls, width: int, inputs: int, target: float, seed: int, dtype: torch.dtype) -> UVModel:
        """Return a model of standard normal parameters, and a random example of length one.

        Args:
            width: Number of hidden units.
            inputs: Number of inputs.
            target: Target of the example.
            seed: Seed of the random numbers.
            dtype: Precision.
        """
        generator = torch.Generator().manual_seed(seed)
        weight, readout, example = (
            torch.randn(shape, generator=generator, dtype=dtype) for shape in ((width, inputs), (width,), (inputs,))
        )
        return cls(weight, readout, example / example.norm(), target)

    def forward(self) -> Tensor:
        """Return ``f``, a scalar."""
        output: Tensor = self.readout @ (self.weight @ self.example) / len(self.readout) ** 0.5
        return output

    def loss(self) -> Tensor:
        """Return ``(f - y)**2 / 2``."""
        loss: Tensor = (self() - self.target).square() / 2
        return loss

    @torch.no_grad()
    def hessian(self) -> Tensor:
        """Return the Hessian of the loss in float64, written out.

        ``grad f grad f^T + (f - y) grad^2 f``, where the second derivative of ``f`` by ``v_i`` and ``U_ij`` is
        ``x_j / sqrt(width)`` and every other is zero. Rows and columns in the order of ``parameters()``: ``U``, ``v``.
        """
        weight, readout, example = (each.double() for each in (self.weight, self.readout, self.example))
        width, inputs = weight.shape
        root = width**0.5
        output = readout @ (weight @ example) / root
        slope = torch.cat([torch.outer(readout, example).flatten(), weight @ example]) / root
        curvature = torch.zeros(len(slope), len(slope), dtype=torch.float64)
        mixed = torch.kron(torch.eye(width, dtype=torch.float64), example[:, None]) / root
        curvature[: width * inputs, width * inputs :] = mixed
        curvature[width * inputs :, : width * inputs] = mixed.T
        whole: Tensor = torch.outer(slope, slope) + (output - self.target) * curvature
        return whole
