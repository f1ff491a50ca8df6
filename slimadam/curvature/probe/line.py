"""The loss along the pending update: at ``parameter - eta D`` for any ``eta``, without a trace.

Source: the restricted loss of arXiv 2601.16979, section 2; catapults of arXiv 2406.09405 are looked for on it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.curvature.probe import snapshot
from slimadam.curvature.probe.directions import check_pending, unwrapped
from slimadam.curvature.probe.displacement import MOVES, Memory, Moves, held
from slimadam.curvature.probe.signals import HeldSignals
from slimadam.layers.names import owning_modules
from slimadam.utils.dtensor import full_tensor, local
from slimadam.utils.torch_private import version

Closure = Callable[[], "Tensor | float"]
"""Computes the loss, forward only, always on the same batch."""


class LineProbe:
    """Evaluates losses at ``parameter - eta D``, where ``D`` is the optimizer's pending update.

    A context manager, to be entered after ``backward()`` and before ``step()``. When it is left, also by an
    exception or Ctrl-C, parameters are back bit for bit, and gradients, optimizer state, the buffers of modules that
    own the parameters, and the global random-number generators of torch, numpy and Python are as they were. Each
    evaluation runs without gradients, and starts from the same random numbers, so that dropout masks agree.

    On several ranks of ``torch.distributed`` losses are averaged over all, and every rank must evaluate at the same
    time. Of DTensors each rank moves its own shard. Modules of FSDP2 are left resharded.

    Args:
        optimizer: SlimAdam, or any torch optimizer whose step needs no closure; see
            :func:`~slimadam.curvature.probe.directions.pending_directions`.
        memory: How to come back. ``"copy"``: keep parameters and direction, the fastest. ``"lean"``: about a byte
            for each element, and one parameter's direction, made anew, for optimizers whose weight decay is decoupled
            or zero, parameters that share no memory, and closures that do not write to them. ``"offload"``: the
            parameters in host memory, the direction as in lean.
        modules: Modules whose buffers the closure may change; None: those alive that own a parameter.

    Raises:
        RuntimeError: On entering: no gradient is pending.
        TypeError: It is no torch optimizer.
        ValueError: There is no such way to come back; on entering: none with this optimizer or these parameters.
    """

    def __init__(
        self, optimizer: Optimizer, memory: Memory = "copy", modules: Iterable[nn.Module] | None = None
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory={memory!r} must be 'copy', 'lean' or 'offload'")
        self.optimizer = unwrapped(optimizer)
        self.memory: Memory = memory
        self._finds_modules = modules is None
        self._modules = list(modules or ())
        self._params: list[Tensor] | None = None
        self._signals = HeldSignals()
        self._moves: Moves | None = None

    def __enter__(self) -> LineProbe:
        if self._moves is not None:
            raise RuntimeError("the line is already being probed; leave the with block first")
        check_pending(self.optimizer)
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        kinds = {type(held(param)).__name__ for param in params} - {"Tensor"}
        if kinds:
            raise RuntimeError(
                f"parameters of type {', '.join(sorted(kinds))} cannot be probed yet; measure on a model whose "
                "parameters are plain tensors, or DTensors of such"
            )
        if self._params is None or list(map(id, self._params)) != list(map(id, params)):
            self._params, self._sharding = params, snapshot.Sharding(params, self._modules)
            self._sharding.reshard()  # full parameters are not the optimizer's
            if self._finds_modules:
                self._modules = owning_modules(params)
        self._sharding.reshard()
        self._buffers = snapshot.Buffers(self._modules)
        self._random = snapshot.RandomState(param.device for param in params)
        self._has_autocast = any(torch.is_autocast_enabled(kind) for kind in {param.device.type for param in params})
        self._loss_dtypes: set[torch.dtype] = set()
        if self.memory == "lean":
            snapshot.check_no_shared_memory(map(held, params), self._buffers.tensors)
        with torch.no_grad():
            moves = MOVES[self.memory](self.optimizer)
        try:
            self._signals.hold()
            self._moves = moves
        except BaseException:
            self._signals.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        moves, self._moves = self._moves, None
        assert moves is not None
        try:
            with torch.no_grad():
                moves.back()
            self._sharding.reshard()
            torch.clear_autocast_cache()
            self._random.restore()
            del self._buffers, self._random
        finally:
            self._signals.release()

    def loss(self, closure: Closure, eta: float = 0.0) -> float:
        """Return the closure's loss at ``parameter - eta D``.

        Args:
            closure: Returns the loss, a number or a tensor of one element; called once.
            eta: The learning rate of the step that the loss is taken after.

        Raises:
            RuntimeError: The block is not entered, or the closure does more than compute the loss.
            TypeError: The closure does not return a number.
        """
        if self._moves is None or self._params is None:
            raise RuntimeError("evaluate inside the with block: `with LineProbe(optimizer) as line: line.loss(...)`")
        shards = [local(param) for param in self._params]
        with torch.no_grad():
            if eta:
                self._moves.to(eta)
            else:
                self._moves.back()
            self._sharding.reshard()
            self._random.restore()
            # Casts of parameters that an enclosing autocast has cached are of other values.
            torch.clear_autocast_cache()
            before = [(shard.data_ptr(), version(shard)) for shard in shards]
            grads = [param.grad for param in self._params]
            try:
                for param in self._params:
                    param.grad = None  # so that the closure can neither clear it nor add to it
                with snapshot.entered_autocasts() as autocasts, self._signals.allowed():
                    loss = closure()
            except BaseException as error:
                self._sharding.abandon_forward()
                if isinstance(error, RuntimeError) and "does not require grad" in str(error):
                    raise RuntimeError(
                        "the closure must only compute and return the loss: no backward(), zero_grad() or step() in it"
                    ) from error
                raise
            finally:
                self._buffers.restore()
                for param, grad in zip(self._params, grads, strict=True):
                    param.grad = grad
            # A parameter that has only moved to other memory, as in recurrent layers on CUDA, has not been written to.
            if self.memory == "lean" and any(
                shard.data_ptr() == address and version(shard) != writes
                for shard, (address, writes) in zip(shards, before, strict=True)
            ):
                raise RuntimeError(
                    "the closure has written to parameters (as an embedding with max_norm does): memory='lean' cannot "
                    "tell what they were; use memory='copy' or 'offload'"
                )
            self._has_autocast = self._has_autocast or bool(autocasts)
            if isinstance(loss, Tensor):
                self._loss_dtypes.add(loss.dtype)
            return _mean_over_ranks(loss, self._params[0].device)

    @property
    def rounding(self) -> float:
        """Inside the block: the share of the loss that is rounding, as far as evaluations have shown."""
        dtypes = self._loss_dtypes.union(param.dtype for param in self._params or ())
        if self._has_autocast or self._sharding.is_narrow or not dtypes.isdisjoint(snapshot.NARROW):
            return snapshot.rough_share(self._loss_dtypes)
        return snapshot.ROUNDING

    @property
    def extra_bytes(self) -> int:
        """Bytes held now beside the model and its optimizer; while moving, one direction on top."""
        return 0 if self._moves is None else self._moves.extra_bytes + self._buffers.nbytes


def _mean_over_ranks(loss: Any, device: torch.device) -> float:
    """Return the mean over all ranks, by the one read that the host waits for."""
    if isinstance(loss, Tensor):
        loss = full_tensor(loss)
        if loss.numel() != 1 or loss.is_complex():
            raise TypeError(f"the closure returned a {loss.dtype} tensor of shape {tuple(loss.shape)}, not one number")
    elif not isinstance(loss, (int, float, np.number)) and not (isinstance(loss, np.ndarray) and loss.ndim == 0):
        raise TypeError(f"the closure returned a {type(loss).__name__}, not the loss: a number or a tensor of one")
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return float(loss)
    if device.type == "cpu" and isinstance(loss, Tensor):  # parameters offloaded by FSDP, and nothing else
        device = loss.device
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    total = torch.as_tensor(loss, dtype=dtype, device=device).detach().reshape(1).clone()
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()
