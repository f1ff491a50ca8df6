"""The update as one compiled pass on the CPU.

The arithmetic is in ``adamw.cpp``, and a table of addresses and sizes is its input. Each tensor is read from memory
once (averages over rows) or a second time out of the cache (averages over columns): 20 bytes per float32 parameter,
AdamW 28 and 22 with a second moment in codes. The plain reference beside it is ``reference_update``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..float8 import is_coded
from ..interface import Dims, Entry, Hyperparameters, addresses_of
from ..layout import layout, overlap
from .build import library as library

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}
_GRAD, _SEED = 1, 15
"""Columns of the table that each step fills in."""


def supports(param: Tensor, exp_avg_dtype: torch.dtype, averaged_dims: Sequence[Dims]) -> bool:
    """Return whether the compiled step supports a parameter, if its library can be loaded or built.

    Args:
        param: A real CPU parameter.
        exp_avg_dtype: Precision of its first moment, ``torch.int8`` for codes.
        averaged_dims: For each of its second moments, the averaged dimensions.
    """
    if param.dtype not in _CODES or param.dtype == torch.int8:
        return False
    if exp_avg_dtype not in (param.dtype, torch.float32, torch.bfloat16, torch.int8):
        return False
    found = layout(param, averaged_dims)
    # Where rows have one element, the table's pitch is between rows of averaged elements: factored ones have none.
    return found is not None and (len(averaged_dims) == 1 or found.post != 1 or found.pitch == 1)


def compiled_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update every parameter in place.

    Args:
        entries: The tensors; :func:`supports` must be true of each parameter, and the others laid out as it is.
        hyper: Hyperparameters.
    """
    Table(entries).run([entry.grad for entry in entries], [entry.seed for entry in entries], hyper)


class Table:
    """Addresses and sizes of tensors, as the compiled step reads them.

    Args:
        entries: The tensors of parameters for which :func:`supports` is true; their gradients and seeds are not used.
        counts: True if a step adds 1 to each step count.

    Attributes:
        is_lasting: True if the table is valid for more than one step, as long as nothing moves.
    """

    def __init__(self, entries: Sequence[Entry], counts: bool = False) -> None:
        self._aside: list[tuple[Tensor, Tensor]] = []
        first = {id(entry.step): number for number, entry in reversed(list(enumerate(entries)))} if counts else {}
        self._rows = np.array(
            [_row(entry, self._aside, first.get(id(entry.step)) == number) for number, entry in enumerate(entries)],
            dtype=np.int64,
        )
        self._in_turn = overlap(entry.param for entry in entries)
        self.is_lasting = not self._aside

    def run(self, grads: Sequence[Tensor], seeds: Sequence[int], hyper: Hyperparameters) -> None:
        """Update every parameter in place.

        Args:
            grads: The gradient of each parameter, laid out as it is.
            seeds: The seed of each parameter's stochastic rounding.
            hyper: Hyperparameters.
        """
        compiled = library()
        assert compiled is not None
        factor = 1.0 if hyper.clip_factor is None else float(hyper.clip_factor)
        if factor == 0:  # an infinite norm: sums of squares may be infinite where no gradient is
            grads, factor = [grad * 0 for grad in grads], 1.0
        self._rows[:, _GRAD] = addresses_of(grads)
        if hyper.stochastic_round:
            self._rows[:, _SEED] = seeds
        numbers = struct.pack(  # struct Hyper in the source
            "6dq",
            *map(float, (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)),
            -factor if hyper.maximize else factor,
            hyper.stochastic_round,
        )
        threads = 1 if self._in_turn else torch.get_num_threads()
        compiled.slimadam_step(self._rows.ctypes.data, len(self._rows), numbers, threads)
        for moment, ordered in self._aside:
            moment.copy_(ordered)


def _row(entry: Entry, aside: list[tuple[Tensor, Tensor]], counts: bool) -> tuple[int, ...]:
    """Return a row of the table, as ``struct Entry`` in the source; ``aside`` receives second moments to copy back."""
    param, _, exp_avg, parts, maxima, step, dims, _, scale, precomputed = entry
    found = layout(param, dims)
    assert found is not None
    order, pre, red, post, pitch = found
    simple = not order and len(parts) == 1 and not maxima and parts[0].is_contiguous()
    if not simple and (order or not all(moment.is_contiguous() for moment in (*parts, *maxima))):
        order = order or tuple(range(param.dim()))
        parts, maxima = [[_in_order(part, order, aside) for part in moments] for moments in (parts, maxima)]
    return (
        param.data_ptr(),
        0,
        exp_avg.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        parts[0].data_ptr(),
        parts[1].data_ptr() if len(parts) == 2 else 0,
        maxima[0].data_ptr() if maxima else 0,
        step.data_ptr(),
        _CODES[step.dtype],
        _CODES[param.dtype],
        _CODES[exp_avg.dtype],
        pre,
        red,
        post,
        pitch,
        0,
        precomputed,
        counts,
        is_coded(parts[0]),
    )


def _in_order(moment: Tensor, order: tuple[int, ...], aside: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a second moment in the parameter's memory order: itself, or a copy where strides demand one."""
    view = moment.permute(order)
    ordered = view.contiguous()
    if ordered.data_ptr() != view.data_ptr():
        aside.append((view, ordered))
    return ordered
