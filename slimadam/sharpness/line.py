"""The loss along the pending update: at ``parameter - eta D`` for any ``eta``, without a trace.

Source: the restricted loss of arXiv 2601.16979, section 2; catapults of arXiv 2406.09405 are looked for on it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, get_args

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.names import owning_modules
from slimadam.sharpness.directions import check_pending, unwrapped
from slimadam.sharpness.interrupts import HeldSignals
from slimadam.sharpness.moves import MOVES, Memory, Moves
from slimadam.sharpness.surroundings import Buffers, Gradients, RandomState

Closure = Callable[[], "Tensor | float"]
"""Computes the loss, forward only, always on the same batch."""


class LineProbe:
    """Evaluates losses at ``parameter - eta D``, where ``D`` is the optimizer's pending update.

    A context manager, to be entered after ``backward()`` and before ``step()``. When it is left, also by an
    exception or Ctrl-C, parameters are back bit for bit, and gradients, optimizer state, the buffers of modules that
    own the parameters, and the global random-number generators of torch, numpy and Python are as they were. Each
    evaluation starts from the same random numbers, so that dropout masks agree. Evaluations run without gradients.

    Where ``torch.distributed`` has been initialised with several ranks, losses are averaged over all, so that every
    rank sees the same; every rank must evaluate at the same time.

    Args:
        optimizer: SlimAdam, or any torch optimizer whose step needs no closure; see
            :func:`~slimadam.sharpness.directions.pending_directions`.
        memory: What is kept to come back. ``"copy"``: parameters and direction, the fastest. ``"lean"``: about a byte
            for each element, the direction made anew one parameter at a time, for optimizers whose weight decay is
            decoupled or zero. ``"offload"``: the parameters in host memory, the direction as in lean.
        modules: Modules whose buffers the closure may change. None: those alive in the process that own a parameter
            of the optimizer.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: ``memory`` is none of the three, or does not suit the optimizer.
        RuntimeError: On entering: no gradient is pending.
    """

    def __init__(
        self, optimizer: Optimizer, memory: Memory = "copy", modules: Iterable[nn.Module] | None = None
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory={memory!r} must be 'copy', 'lean' or 'offload'")
        self.optimizer = unwrapped(optimizer)
        self.memory: Memory = memory
        self._modules = None if modules is None else list(modules)
        self._owned: list[Tensor] | None = None
        self._signals = HeldSignals()
        self._moves: Moves | None = None

    def __enter__(self) -> LineProbe:
        if self._moves is not None:
            raise RuntimeError("the line is already being probed; leave the with block first")
        check_pending(self.optimizer)
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self._buffers = Buffers(self._modules_of(params))
        self._gradients = Gradients(self.optimizer)
        self._random = RandomState([param.device for param in params])
        self._device = params[0].device
        with torch.no_grad():
            moves = MOVES[self.memory](self.optimizer)
        self._signals.hold()
        self._moves = moves
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        moves, self._moves = self._moves, None
        assert moves is not None
        try:
            with torch.no_grad():
                moves.back()
            torch.clear_autocast_cache()
            self._random.restore()
        finally:
            self._signals.release()

    def _modules_of(self, params: list[Tensor]) -> list[nn.Module]:
        """Those that were given, or found; looked for again only when parameters have changed."""
        known = self._owned is not None and list(map(id, self._owned)) == list(map(id, params))
        if self._modules is None or not (self._owned is None or known):
            self._modules, self._owned = owning_modules(params), params
        return self._modules

    def loss(self, closure: Closure, eta: float = 0.0) -> float:
        """The closure's loss at ``parameter - eta D``.

        Args:
            closure: Returns the loss, a number or a tensor of one element; called once.
            eta: The learning rate of the step that the loss is taken after.

        Raises:
            TypeError: The closure returns something else.
            RuntimeError: Outside the ``with`` block.
        """
        if self._moves is None:
            raise RuntimeError("evaluate inside the with block: `with LineProbe(optimizer) as line: line.loss(...)`")
        with torch.no_grad():
            if eta:
                self._moves.to(eta)
            else:
                self._moves.back()
            self._random.restore()
            # Casts of parameters that an enclosing autocast has cached are of other values.
            torch.clear_autocast_cache()
            try:
                with self._gradients.hidden(), self._signals.allowed():
                    loss = closure()
            finally:
                self._buffers.restore()
            return _read(loss, self._device)

    @property
    def extra_bytes(self) -> int:
        """What is held now beside the model and its optimizer, in bytes; while moving, one direction on top."""
        return 0 if self._moves is None else self._moves.extra_bytes + self._buffers.nbytes


def _read(loss: Any, device: torch.device) -> float:
    """The one read that the host waits for; the mean over all ranks."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise TypeError(f"the closure returned a {loss.dtype} tensor of shape {tuple(loss.shape)}, not one number")
    elif not isinstance(loss, (int, float)):
        raise TypeError(f"the closure returned a {type(loss).__name__}, not the loss: a number or a tensor of one")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            total = torch.as_tensor(loss, dtype=torch.float32, device=device).detach().reshape(1).clone()
            torch.distributed.all_reduce(total)
            return total.item() / ranks
    return float(loss)
