"""FSDP2 modules keep full parameters after some forward passes: none may outlive a move."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimadam.utils import torch_private
from slimadam.utils.dtensor import is_dtensor


class Sharding:
    """The FSDP2 modules that hold some parameters' shards.

    A root module keeps its full parameters after a forward pass that no backward pass follows, as do others with
    ``reshard_after_forward=False``; the next forward pass would use those, however the shards have changed.

    Args:
        params: Parameters, as an optimizer holds them.
        modules: Where to look first; looking among all objects of the process takes a tenth of a second.
    """

    def __init__(self, params: Sequence[Tensor], modules: Iterable[nn.Module] = ()) -> None:
        wanted = {id(param) for param in params if is_dtensor(param)}
        fsdp = sys.modules.get("torch.distributed.fsdp")
        self._modules: list[Any] = []
        if wanted and fsdp is not None:
            known = (one for module in modules for one in module.modules())
            self._modules = [one for one in known if isinstance(one, fsdp.FSDPModule)]
            if not wanted <= {one for module in self._modules for one in _shards(module)}:
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
        return any(torch_private.fsdp_precision(module) in (torch.bfloat16, torch.float16) for module in self._modules)


def _shards(module: Any) -> set[int]:
    """Return the ids of a module's sharded parameters, from its state: its attributes may be full parameters now."""
    return set(map(id, torch_private.fsdp_params(module)))
