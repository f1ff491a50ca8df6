"""A module that has a model's parameters under their names, and no forward pass: what an optimizer needs of it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.workloads.shapes import Shapes

_INIT_STD = 0.02


def skeleton(shapes: Shapes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the parameters of a model, drawn from a normal distribution with standard deviation 0.02.

    Args:
        shapes: Shapes by qualified name.
        device: Their device; on ``"meta"`` they take no memory.
        dtype: Their precision.
    """
    root = nn.Module()
    for name, shape in shapes.items():
        register(root, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=_INIT_STD)))
    return root


def register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter below ``root`` under a qualified name.

    Four-dimensional weights go into convolutions, so that layer roles know which dimensions are inputs.

    Args:
        root: Module that gets the parameter.
        name: Qualified name.
        parameter: The parameter.
    """
    *path, leaf = name.split(".")
    module = root
    for depth, part in enumerate(path, start=1):
        if not hasattr(module, part):
            is_convolution = depth == len(path) and parameter.dim() == 4
            module.add_module(part, _convolution(parameter) if is_convolution else nn.Module())
        module = getattr(module, part)
    module.register_parameter(leaf, parameter)


def _convolution(weight: nn.Parameter) -> nn.Module:
    outputs, inputs, *kernel = weight.shape
    return nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), bias=False, device="meta")
