"""What a forward pass may change beside the loss: buffers, gradients, random-number generators."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Buffers:
    """The buffers of modules, batch-norm statistics among them, and how they were.

    Args:
        modules: With all their submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = {id(owner): owner for module in modules for owner in module.modules()}
        found = [
            (owner, name, buffer)
            for owner in owners.values()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._kept = [(owner, name, buffer, buffer.detach().clone()) for owner, name, buffer in found]

    def restore(self) -> None:
        """Put the same tensors with the same contents back."""
        for owner, name, buffer, value in self._kept:
            buffer.data.copy_(value)
            owner._buffers[name] = buffer

    @property
    def nbytes(self) -> int:
        """What the copies hold, in bytes."""
        return sum(value.nbytes for *_, value in self._kept)


class Gradients:
    """The gradients of an optimizer's parameters, out of reach while a closure runs.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._kept = [(param, param.grad) for param in params]

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Within the block no parameter has a gradient, so that none can be cleared, scaled or added to."""
        try:
            for param, _ in self._kept:
                param.grad = None
            yield
        finally:
            for param, grad in self._kept:
                param.grad = grad


class RandomState:
    """The global random-number generators of torch (CPU and the given devices), numpy and Python.

    Args:
        devices: Devices whose generators a forward pass may use.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._torch = torch.get_rng_state()
        self._devices: list[tuple[Any, torch.device, Tensor]] = []
        for device in dict.fromkeys(devices):
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                self._devices.append((module, device, module.get_rng_state(device)))
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Set all to where they were."""
        torch.set_rng_state(self._torch)
        for module, device, state in self._devices:
            module.set_rng_state(state, device)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
