"""Blocks of tensors, and working memory that a thread uses again for every one."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class _Memory(threading.local):
    """Working memory of each thread, by precision and use."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[torch.dtype, str], Tensor] = {}


_memory = _Memory()


def split(tensors: Iterable[Tensor], size: int) -> list[list[Tensor]]:
    """For each tensor its blocks of so many slices of the first dimension."""
    return [list(tensor.split(size)) for tensor in tensors]  # type: ignore[no-untyped-call]


def scratch(dtype: torch.dtype, shape: Sequence[int], use: str = "") -> Tensor:
    """Uninitialised memory of this thread; valid until the next call for the same precision and use."""
    wanted, key = math.prod(shape), (dtype, use)
    held = _memory.tensors.get(key)
    if held is None or held.numel() < wanted:
        with torch.inference_mode(False):  # else of no use once that mode has ended
            held = _memory.tensors[key] = torch.empty(wanted, dtype=dtype, device="cpu")
    return held[:wanted].view(shape)


def zeros(count: int) -> Tensor:
    """So many float32 zeros of this thread, never to be written to."""
    held = _memory.tensors.get(key := (torch.float32, "zeros"))
    if held is None or held.numel() < count:
        with torch.inference_mode(False):
            held = _memory.tensors[key] = torch.zeros(count, dtype=torch.float32, device="cpu")
    return held[:count]


def scaled(grad: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """A gradient times a factor, in a thread's working memory."""
    target = scratch(dtype, grad.shape, "gradient")
    if grad.dtype == dtype:
        return torch.mul(grad, factor, out=target)
    return target.copy_(grad).mul_(factor)


def squares(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad**2`` in a thread's working memory."""
    target = scratch(dtype, grad.shape)
    if grad.dtype == dtype:
        return torch.mul(grad, grad, out=target)
    return target.copy_(grad).square_()
