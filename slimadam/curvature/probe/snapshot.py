"""State that a forward pass may change: buffers, gradients, random-number generators, full parameters of FSDP2."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimadam.utils import torch_private
from slimadam.utils.dtensor import is_dtensor, local

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Differences of a loss below some units in its last place are rounding."""
ROUGHNESS = 1e-4
"""Where something is computed in 16 bits the loss jumps by more than that between neighbouring parameters."""
NARROW = (torch.bfloat16, torch.float16)


def rough_share(losses: Iterable[torch.dtype]) -> float:
    """Return the share of a loss that is rounding where something is computed in 16 bits; ``losses`` are its dtypes."""
    return max(ROUGHNESS, *(torch.finfo(dtype).eps for dtype in losses if dtype in NARROW), 0.0)


class Buffers:
    """The buffers of modules and their submodules, batch-norm statistics among them, with copies of their values.

    Attributes:
        tensors: The buffers that are copied.
        nbytes: The bytes of the copies.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = {id(owner): owner for module in modules for owner in module.modules()}
        self._owners = [(owner, dict(torch_private.buffers(owner))) for owner in owners.values()]
        buffers = (buffer for _, names in self._owners for buffer in names.values() if buffer is not None)
        found = {id(buffer): buffer for buffer in map(local, buffers)}
        # Buffers that overlap themselves, as an expanded mask does, cannot have been written to.
        self.tensors = [buffer for buffer in found.values() if not torch_private.overlaps_itself(buffer)]
        self._kept = [(buffer, buffer.data, buffer.detach().clone()) for buffer in self.tensors]
        self.nbytes = sum(value.nbytes for *_, value in self._kept)
        # A forward pass without gradients makes DistributedDataParallel leave the next one's buffers as they are.
        replicated = [owner for owner in owners.values() if isinstance(owner, nn.parallel.DistributedDataParallel)]
        self._synced = [(owner, owner.require_forward_param_sync) for owner in replicated]

    def restore(self) -> None:
        """Put the same tensors with the same contents back, and no others."""
        for buffer, data, value in self._kept:
            buffer.data = data
            data.copy_(value)
        for owner, names in self._owners:
            held = torch_private.buffers(owner)
            held.clear()
            held.update(names)
        for owner, is_synced in self._synced:
            owner.require_forward_param_sync = is_synced


@contextmanager
def entered_autocasts() -> Iterator[list[torch.autocast]]:
    """Collect the autocast contexts that are switched on within the block."""
    enter, entered = torch.autocast.__enter__, []

    def noted(own: torch.autocast) -> Any:
        if torch_private.is_autocast_entered(own):
            entered.append(own)
        return enter(own)  # type: ignore[no-untyped-call]

    torch.autocast.__enter__ = noted  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def check_no_shared_memory(params: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
    """Raise ValueError for parameters that share memory with one another or with a buffer.

    Args:
        params: The parameters.
        buffers: The buffers, which may share memory among themselves.
    """
    spans = []
    for tensor, is_param in [*((param, True) for param in params), *((buffer, False) for buffer in buffers)]:
        if tensor.numel() and tensor.device.type != "meta":
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.element_size(), is_param))
    reach, reached_by_param = 0, False
    for start, end, is_param in sorted(spans):
        if start < reach and (is_param or reached_by_param):
            raise ValueError(
                "memory='lean' computes each parameter back from where it was moved, but two parameters, or a "
                "parameter and a buffer, share memory; use memory='copy' or 'offload'"
            )
        if end > reach:
            reach, reached_by_param = end, is_param


class RandomState:
    """The state of the global random-number generators of torch (CPU and the given devices), numpy and Python."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._states: list[tuple[Callable[[Any], Any], Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (np.random.set_state, np.random.get_state()),
            (random.setstate, random.getstate()),
        ]
        for device in dict.fromkeys(devices):
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                self._states.append((partial(module.set_rng_state, device=device), module.get_rng_state(device)))

    def restore(self) -> None:
        """Set all generators back."""
        for set_state, state in self._states:
            set_state(state)


class Sharding:
    """The FSDP2 modules that hold some parameters' shards: those in ``modules``, or else among all objects.

    A root module keeps its full parameters after a forward pass that no backward pass follows, as do others with
    ``reshard_after_forward=False``; the next forward pass would use those, however the shards have changed.
    """

    def __init__(self, params: Sequence[Tensor], modules: Iterable[nn.Module] = ()) -> None:
        wanted = {id(param) for param in params if is_dtensor(param)}
        fsdp = sys.modules.get("torch.distributed.fsdp")
        self._modules: list[Any] = []
        if wanted and fsdp is not None:
            known = (one for module in modules for one in module.modules())
            self._modules = [one for one in known if isinstance(one, fsdp.FSDPModule)]
            if not wanted <= {one for module in self._modules for one in _shards(module)}:
                # Takes a tenth of a second.
                alive = [one for one in gc.get_objects() if issubclass(type(one), fsdp.FSDPModule)]
                self._modules = [module for module in alive if wanted & _shards(module)]

    def reshard(self) -> None:
        """Free all full parameters: the next forward pass gathers the shards as they are then."""
        for module in self._modules:
            module.reshard()

    def abandon_forward(self) -> None:
        """Make forward passes possible again after one that has ended by an exception."""
        for module in self._modules:
            torch_private.fsdp_forget_forward(module)
        self.reshard()

    @property
    def is_narrow(self) -> bool:
        """True where forward passes use parameters of 16 bits, by ``MixedPrecisionPolicy(param_dtype=...)``."""
        return any(torch_private.fsdp_precision(module) in NARROW for module in self._modules)


def _shards(module: Any) -> set[int]:
    """Return the ids of a module's sharded parameters, from its state: its attributes may be full parameters now."""
    return set(map(id, torch_private.fsdp_params(module)))
