"""Moving parameters along their direction, and back bit for bit, at three prices in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import (
    PendingUpdate,
    averages_of_ranks,
    depends_on_parameters,
    pending_updates,
    unwrapped,
)
from slimadam.kernels.interface import second_moment_dtype
from slimadam.optim.step.direction import nbytes_of, row_blocks
from slimadam.utils.dtensor import local

Memory = Literal["copy", "lean", "offload"]
MEMORY_MODES = ("copy", "lean", "offload")


class Moves(Protocol):
    """Where parameters are on the line, and how they come back."""

    def to(self, eta: float) -> None:
        """Put every parameter at ``parameter - eta D``, from wherever it is."""

    def back(self) -> None:
        """Put every parameter back to where it began, bit for bit."""

    @property
    def extra_bytes(self) -> int:
        """What is held now beside the model and its optimizer, in bytes, on the parameters' device."""


class Copies:
    """``memory="copy"``: keeps the parameters and the direction; a move is two passes over memory.

    Args:
        optimizer: With pending gradients.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        pending = [(update.param, local(update.direction())) for update in pending_updates(optimizer)]
        self._params = [param for param, _ in pending]
        self._directions = [direction for _, direction in pending]
        self._originals = [held(param).clone() for param in self._params]

    def to(self, eta: float) -> None:
        """See :class:`Moves`."""
        self.back()
        torch._foreach_add_([held(param) for param in self._params], self._directions, alpha=-eta)

    def back(self) -> None:
        """See :class:`Moves`."""
        torch._foreach_copy_([held(param) for param in self._params], self._originals)

    @property
    def extra_bytes(self) -> int:
        """See :class:`Moves`."""
        return sum(tensor.nbytes for tensor in (*self._originals, *self._directions))


class Offloaded:
    """``memory="offload"``: keeps the parameters in host memory, pinned for a GPU; directions are made anew.

    Args:
        optimizer: With pending gradients.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        params = (p for group in unwrapped(optimizer).param_groups for p in group["params"] if p.grad is not None)
        self._kept = [(param, _host_copy(held(param))) for param in params]
        self._averages = averages_of_ranks(optimizer)

    def to(self, eta: float) -> None:
        """See :class:`Moves`."""
        self.back()
        for pending in pending_updates(self._optimizer, self._averages):
            held(pending.param).sub_(local(pending.direction()), alpha=eta)

    def back(self) -> None:
        """See :class:`Moves`."""
        for param, kept in self._kept:
            held(param).copy_(kept, non_blocking=True)

    @property
    def extra_bytes(self) -> int:
        """See :class:`Moves`; on a CPU the copies lie in the same memory."""
        on_cpu = sum(kept.nbytes for param, kept in self._kept if param.device.type == "cpu")
        return on_cpu + nbytes_of(self._averages)


class Lean:
    """``memory="lean"``: keeps what is lost in rounding, about one byte per element; directions are made anew.

    From ``moved = round(parameter (1 - eta weight_decay) - eta update)`` the parameter is computed back up to
    rounding; how many representable numbers it is then off is kept in one byte, in two, or, where that is not enough
    for an element in sixteen, as the parameter itself: so at most what it takes. On CUDA the host waits once for each
    2**18 elements.

    Args:
        optimizer: With pending gradients; without weight decay that is part of the gradient.

    Raises:
        ValueError: The optimizer's update depends on its parameters' values.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if depends_on_parameters(optimizer):
            raise ValueError(
                f"memory='lean' makes the update anew from gradients and state, but that of "
                f"{type(unwrapped(optimizer)).__name__} depends on its parameters' values (weight decay that is part "
                "of the gradient, or a step known to itself alone); use memory='copy' or 'offload'"
            )
        self._optimizer = optimizer
        # Asked for once: on the way back, after an error on this rank alone, nobody would answer.
        self._averages = averages_of_ranks(optimizer)
        # By parameter and block, so that running out of memory half-way loses nothing.
        self._moved: dict[tuple[int, int], tuple[float, _Correction]] = {}

    def to(self, eta: float) -> None:
        """See :class:`Moves`."""
        for key, pieces in self._blocks():
            original = self._original(key, pieces)
            moved = _along(pieces, original, eta)
            correction = _Correction.of(original, _backwards(pieces, moved, eta))
            pieces.param.copy_(moved)
            self._moved[key] = (eta, correction)

    def back(self) -> None:
        """See :class:`Moves`."""
        if self._moved:
            for key, pieces in self._blocks():
                pieces.param.copy_(self._original(key, pieces))
                self._moved.pop(key, None)

    def _blocks(self) -> Iterator[tuple[tuple[int, int], PendingUpdate]]:
        """Some rows of each parameter, as real numbers, with those of its update."""
        for pending in pending_updates(self._optimizer, self._averages):
            param, update = _real(held(pending.param)), _real(local(pending.update))
            for index, rows in enumerate(row_blocks(param.shape)):
                yield (id(pending.param), index), pending._replace(param=param[rows], update=update[rows])

    def _original(self, key: tuple[int, int], pieces: PendingUpdate) -> Tensor:
        if key not in self._moved:
            return pieces.param.clone()
        eta, correction = self._moved[key]
        return correction.apply(_backwards(pieces, pieces.param, eta))

    @property
    def extra_bytes(self) -> int:
        """See :class:`Moves`."""
        return sum(correction.nbytes for _, correction in self._moved.values()) + nbytes_of(self._averages)


MOVES: dict[str, type[Copies] | type[Offloaded] | type[Lean]] = {"copy": Copies, "lean": Lean, "offload": Offloaded}


def held(param: Tensor) -> Tensor:
    """What this rank holds of a parameter, out of autograd's sight."""
    return local(param).data


def _host_copy(param: Tensor) -> Tensor:
    kept = torch.empty_like(param, device="cpu", pin_memory=param.device.type == "cuda")
    return kept.copy_(param)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _along(pending: PendingUpdate, original: Tensor, eta: float) -> Tensor:
    """``original (1 - eta rate weight_decay) - eta rate update``, rounded to the parameter's precision."""
    wide = original.to(second_moment_dtype(original.dtype), copy=True)
    reach = eta * pending.rate
    return wide.mul_(1 - reach * pending.weight_decay).sub_(pending.update * reach).to(original.dtype)


def _backwards(pending: PendingUpdate, moved: Tensor, eta: float) -> Tensor:
    """Where ``moved`` came from, up to rounding."""
    wide = moved.to(second_moment_dtype(moved.dtype), copy=True)
    reach = eta * pending.rate
    return wide.add_(pending.update * reach).div_(1 - reach * pending.weight_decay).to(moved.dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Correction:
    """By how many representable numbers an estimate is off, element by element; exact for every bit pattern."""

    def __init__(self, steps: Tensor, places: Tensor, values: Tensor) -> None:
        self.steps = steps
        self.places = places
        self.values = values

    @classmethod
    def of(cls, original: Tensor, estimate: Tensor) -> _Correction:
        """What leads from the estimate to the original, in the fewest bytes."""
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
        """The original."""
        if not self.steps.numel() and estimate.numel():
            return self.values
        ordered = _ordered(estimate).flatten() + self.steps
        original = _from_ordered(ordered, estimate.dtype)
        original[self.places] = self.values
        return original.view(estimate.shape)

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.places.nbytes + self.values.nbytes


def _ordered(values: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers in the numbers' order; neighbours differ by one."""
    bits = values.contiguous().view(_BITS[values.element_size()])
    return torch.where(bits < 0, ~bits ^ torch.iinfo(bits.dtype).min, bits)


def _from_ordered(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    bits = torch.where(ordered < 0, ~(ordered ^ torch.iinfo(ordered.dtype).min), ordered)
    return bits.to(_BITS[dtype.itemsize]).view(dtype)
