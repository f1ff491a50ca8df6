"""Moving parameters along their direction, and back bit for bit, at three prices in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import PendingUpdate, averages_of_ranks, depends_on_parameters, pending_updates
from slimadam.kernels.interface import second_moment_dtype
from slimadam.optim.step.direction import nbytes_of, row_blocks
from slimadam.utils.dtensor import local

Memory = Literal["copy", "lean", "offload"]

# Each of the classes below begins where the parameters are, with gradients pending. ``to(eta)`` puts every parameter at
# ``parameter - eta D`` from wherever it is, ``back()`` where it began, bit for bit; ``extra_bytes`` are held beside the
# model and its optimizer, on the parameters' device.


class _Copies:
    """Keeps the parameters and the direction; a move is two passes over memory."""

    def __init__(self, optimizer: Optimizer) -> None:
        pending = [(update.param, local(update.direction())) for update in pending_updates(optimizer)]
        self._params = [param for param, _ in pending]
        self._directions = [direction for _, direction in pending]
        self._originals = [held(param).clone() for param in self._params]
        self.extra_bytes = sum(tensor.nbytes for tensor in (*self._originals, *self._directions))

    def to(self, eta: float) -> None:
        self.back()
        torch._foreach_add_([held(param) for param in self._params], self._directions, alpha=-eta)

    def back(self) -> None:
        torch._foreach_copy_([held(param) for param in self._params], self._originals)


class _Offloaded:
    """Keeps the parameters in host memory, pinned for a GPU; directions are made anew."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._averages = averages_of_ranks(optimizer)
        self.extra_bytes = nbytes_of(self._averages)
        self._kept: list[tuple[Tensor, Tensor]] = []
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if param.grad is not None:
                host = torch.empty_like(held(param), device="cpu", pin_memory=param.device.type == "cuda")
                self._kept.append((param, host.copy_(held(param))))
                self.extra_bytes += host.nbytes if param.device.type == "cpu" else 0

    def to(self, eta: float) -> None:
        self.back()
        for pending in pending_updates(self._optimizer, self._averages):
            held(pending.param).sub_(local(pending.direction()), alpha=eta)

    def back(self) -> None:
        for param, kept in self._kept:
            held(param).copy_(kept, non_blocking=True)


class _Lean:
    """Keeps the rounding errors of moves, about one byte per element; directions are made anew.

    From ``moved = round(parameter (1 - eta weight_decay) - eta update)`` the parameter is computed back up to
    rounding. The number of representable numbers in between is kept in one byte, or in two. Where that is not enough
    for an element in sixteen, the parameter itself is kept. On CUDA the host waits once for each 2**18 elements.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if depends_on_parameters(optimizer):
            raise ValueError(
                f"memory='lean' makes the update anew from gradients and state, but that of {type(optimizer).__name__} "
                "depends on its parameters' values (weight decay that is part of the gradient, or a step known to "
                "itself alone); use memory='copy' or 'offload'"
            )
        self._optimizer = optimizer
        # Only once: on the way back, after an error on this rank alone, no other rank would join the collective.
        self._averages = averages_of_ranks(optimizer)
        # By parameter and block, so that running out of memory half-way loses nothing.
        self._moved: dict[tuple[int, int], tuple[float, _Correction]] = {}

    def to(self, eta: float) -> None:
        for key, block in self._blocks():
            original, reach = self._original(key, block), eta * block.rate
            wide = _widened(original).mul_(1 - reach * block.weight_decay)
            moved = wide.sub_(block.update * reach).to(original.dtype)
            correction = _Correction.of(original, _estimate(block, moved, eta))
            block.param.copy_(moved)
            self._moved[key] = (eta, correction)

    def back(self) -> None:
        if self._moved:
            for key, block in self._blocks():
                block.param.copy_(self._original(key, block))
                self._moved.pop(key, None)

    def _blocks(self) -> Iterator[tuple[tuple[int, int], PendingUpdate]]:
        """Yield blocks of rows of each parameter, as real numbers, with those of its update."""
        for pending in pending_updates(self._optimizer, self._averages):
            param, update = _real(held(pending.param)), _real(local(pending.update))
            for index, rows in enumerate(row_blocks(param.shape)):
                yield (id(pending.param), index), pending._replace(param=param[rows], update=update[rows])

    def _original(self, key: tuple[int, int], block: PendingUpdate) -> Tensor:
        if key not in self._moved:
            return block.param.clone()
        eta, correction = self._moved[key]
        return correction.apply(_estimate(block, block.param, eta))

    @property
    def extra_bytes(self) -> int:
        corrections = (tensor.nbytes for _, correction in self._moved.values() for tensor in correction)
        return sum(corrections) + nbytes_of(self._averages)


Moves = _Copies | _Lean | _Offloaded
MOVES: dict[str, type[Moves]] = {"copy": _Copies, "lean": _Lean, "offload": _Offloaded}


def held(param: Tensor) -> Tensor:
    """Return this rank's shard of a parameter, out of autograd's sight."""
    return local(param).data


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(second_moment_dtype(tensor.dtype), copy=True)


def _estimate(block: PendingUpdate, moved: Tensor, eta: float) -> Tensor:
    """Return the original of ``moved``, up to rounding."""
    reach = eta * block.rate
    return _widened(moved).add_(block.update * reach).div_(1 - reach * block.weight_decay).to(moved.dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Correction(NamedTuple):
    """By how many representable numbers an estimate is off, element by element; exact for every bit pattern."""

    steps: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, original: Tensor, estimate: Tensor) -> _Correction:
        """Return the correction from the estimate to the original, in the fewest bytes."""
        flat = original.flatten()
        off = _ordered(original).flatten() - _ordered(estimate).flatten()
        for dtype in (torch.int8, torch.int16):
            limits = torch.iinfo(dtype)
            # A difference that has overflowed is far outside too, or correct modulo its width.
            far = (off < limits.min) | (off > limits.max)
            places = far.nonzero().flatten()
            if len(places) * 16 <= flat.numel():
                return cls(off.masked_fill_(far, 0).to(dtype), places, flat[places])
        return cls(off.new_empty(0), places.new_empty(0), original.clone())

    def apply(self, estimate: Tensor) -> Tensor:
        """Return the original."""
        if not self.steps.numel() and estimate.numel():
            return self.values
        ordered = _ordered(estimate).flatten() + self.steps
        bits = torch.where(ordered < 0, ~(ordered ^ torch.iinfo(ordered.dtype).min), ordered)
        original = bits.to(_BITS[estimate.element_size()]).view(estimate.dtype)
        original[self.places] = self.values
        return original.view(estimate.shape)


def _ordered(values: Tensor) -> Tensor:
    """Return the bits of floating-point numbers as integers in the numbers' order; neighbours differ by one."""
    bits = values.contiguous().view(_BITS[values.element_size()])
    return torch.where(bits < 0, ~bits ^ torch.iinfo(bits.dtype).min, bits)
