"""The update as one compiled pass on the CPU.

The arithmetic is in ``adamw.cpp``; here a table tells it where the tensors lie. Each tensor is read from memory
once (averages over rows) or a second time out of the cache (averages over columns): 20 bytes per float32 parameter,
AdamW 28. The plain reference beside it is ``reference_update``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..interface import Dims, Entry, Hyperparameters
from ..layout import geometry, geometry_of, overlap
from .build import library as library

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}
_PARAM_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
_MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.int8)

_GRAD, _SEED = 1, 15
"""Columns of the table that each step fills in."""


class _Hyper(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "gradient_factor")),
        ("stochastic_round", ctypes.c_int64),
    )


def supports(param: Tensor, exp_avg_dtype: torch.dtype, averaged_dims: Sequence[Dims]) -> bool:
    """Whether the compiled step takes a parameter, if its library is to be had.

    Args:
        param: A real CPU parameter.
        exp_avg_dtype: Precision of its first moment, ``torch.int8`` for codes.
        averaged_dims: For each of its second moments, the averaged dimensions.
    """
    if param.dtype not in _PARAM_DTYPES or exp_avg_dtype not in (param.dtype, *_MOMENTUM_DTYPES):
        return False
    return geometry_of(param, averaged_dims) is not None


def compiled_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update every parameter in place. For each, :func:`supports` must have said yes, and all must lie as it does."""
    Table(entries).run([entry.grad for entry in entries], [entry.seed for entry in entries], hyper)


class Table:
    """Where tensors lie, as the compiled step reads it.

    Args:
        entries: The tensors of parameters for which :func:`supports` has said yes; gradients and seeds are given later.
        counts: Whether a step of it adds to the step counts, to each once.

    Attributes:
        is_lasting: Whether it is good for more than one step, if nothing moves.
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
            grads: Of each, laid out as it is.
            seeds: Of each, for stochastic rounding.
            hyper: Hyperparameters.
        """
        compiled = library()
        assert compiled is not None
        factor = 1.0 if hyper.clip_factor is None else float(hyper.clip_factor)
        if factor == 0:  # an infinite norm: sums of squares may be infinite where no gradient is
            grads, factor = [grad * 0 for grad in grads], 1.0
        self._rows[:, _GRAD] = list(map(Tensor.data_ptr, grads))
        if hyper.stochastic_round:
            self._rows[:, _SEED] = seeds
        numbers = _Hyper(
            float(hyper.lr),
            float(hyper.beta1),
            float(hyper.beta2),
            hyper.eps,
            float(hyper.weight_decay),
            -factor if hyper.maximize else factor,
            hyper.stochastic_round,
        )
        threads = 1 if self._in_turn else torch.get_num_threads()
        compiled.slimadam_step(
            ctypes.c_void_p(self._rows.ctypes.data),
            ctypes.c_int64(len(self._rows)),
            ctypes.byref(numbers),
            ctypes.c_int64(threads),
        )
        for moment, ordered in self._aside:
            moment.copy_(ordered)


def _row(entry: Entry, aside: list[tuple[Tensor, Tensor]], counts: bool) -> tuple[int, ...]:
    """One row of the table, as ``struct Entry`` in the source, without gradient and seed.

    Args:
        entry: The tensors.
        aside: Gets second moments to copy back.
        counts: Whether the step count goes up with this one.
    """
    param, _, exp_avg, parts, maxima, step, _, _, scale, precomputed = entry
    order, pre, red, post, pitch = geometry(entry)
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
    )


def _in_order(moment: Tensor, order: tuple[int, ...], aside: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A second moment in the parameter's memory order: itself, or a copy where strides demand one."""
    view = moment.permute(order)
    ordered = view.contiguous()
    if ordered.data_ptr() != view.data_ptr():
        aside.append((view, ordered))
    return ordered
