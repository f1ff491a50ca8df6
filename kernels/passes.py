"""A parameter's update in chains of eager operations, block by block, in any precision.

The plain reference beside it is :func:`slimadam.functional.reference_update`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from slimadam.kernels.layout import geometry
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.scratch import scratch, split, squares
from torch import Tensor

from slimadam.functional import (
    Entry,
    Hyperparameters,
    relative_rows,
    running_maximum,
    stochastic_round,
    update_first_moment,
)

LONGEST_NORM = 1 << 16
"""Longest row summed by ``vector_norm``, whose running sums lose precision where ``mean``'s do not."""


def update_share(entry: Entry, hyper: Hyperparameters, number: int, of: int, most: int) -> None:
    """Update one of several equal shares of a parameter's slices.

    Args:
        entry: The parameter's tensors.
        hyper: Hyperparameters.
        number: Which share, from 0.
        of: How many there are.
        most: Elements of a block.
    """
    order, pre, red, post, _ = geometry(entry)
    averages = [(pre, 1, post)] if len(entry.exp_avg_sq) == 1 else [(pre, red, 1), (pre, 1, post)]
    update = Update(
        param=_view(entry.param, order, (pre, red, post)),
        grad=_view(entry.grad, order, (pre, red, post)),
        exp_avg=_view(entry.exp_avg, order, (pre, red, post)),
        parts=[_view(part, order, shape) for part, shape in zip(entry.exp_avg_sq, averages, strict=True)],
        maxima=[_view(part, order, averages[0]) for part in entry.max_exp_avg_sq],
        numbers=Numbers.of(hyper, entry.step),
        rounds=hyper.stochastic_round and entry.param.dtype == torch.bfloat16,
        is_given=entry.is_given,
        seed=entry.seed,
    )
    if len(averages) == 1 and red * post <= most:
        size = max(1, most // max(1, red * post))
        count = -(-pre // size)
        first, last = (count * place // of * size for place in (number, number + 1))
        _one_pass(update.between(first, min(last, pre)), size)
    else:
        for index in range(pre * number // of, pre * (number + 1) // of):
            _two_passes(update.at(index), most)
    if entry.is_given:
        return
    stored, views = [*entry.exp_avg_sq, *entry.max_exp_avg_sq], [*update.parts, *update.maxima]
    for moment, view in zip(stored, views, strict=True):
        if moment.data_ptr() != view.data_ptr():
            target = moment.permute(order) if order else moment
            target.copy_(view.reshape(target.shape))


def _view(tensor: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor in memory order (empty: as it is) and in a new shape; a copy only where strides demand one."""
    return tensor.permute(order).reshape(shape) if order else tensor.reshape(shape)


class Update(NamedTuple):
    """One parameter's step: ``[pre, red, post]`` views of its tensors, and what goes with them.

    Attributes:
        param: The parameter.
        grad: Its gradient.
        exp_avg: First moment.
        parts: Second moments.
        maxima: With amsgrad their running maxima.
        numbers: Hyperparameters and bias corrections.
        rounds: Whether the parameter is rounded at random.
        is_given: Whether the second moments are not updated.
        seed: Of the random bits.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    parts: list[Tensor]
    maxima: list[Tensor]
    numbers: Numbers
    rounds: bool
    is_given: bool
    seed: int

    def between(self, first: int, last: int) -> Update:
        """The same for some slices of the first dimension."""
        return self._at(slice(first, last), first)

    def at(self, index: int) -> Update:
        """The same for one slice of the first dimension, as ``[red, post]``."""
        return self._at(index, index)

    def _at(self, place: int | slice, before: int) -> Update:
        return self._replace(
            param=self.param[place],
            grad=self.grad[place],
            exp_avg=self.exp_avg[place],
            parts=[part[place] for part in self.parts],
            maxima=[part[place] for part in self.maxima],
            seed=self.seed + before * math.prod(self.param.shape[1:]),
        )

    def denominator(self, second_moment: Tensor) -> Tensor:
        """``sqrt(v_hat) + eps``."""
        return second_moment.sqrt().div_(self.numbers.root).add_(self.numbers.eps)

    def update_param(self, param: Tensor, exp_avg: Tensor, denominator: Tensor, seed: int) -> None:
        """Weight decay and step of one block."""
        work = param.float() if self.rounds else param
        if self.numbers.decay != 1:
            work.mul_(self.numbers.decay)
        work.addcdiv_(exp_avg, denominator, value=-self.numbers.step_size)
        if self.rounds:
            param.copy_(stochastic_round(work, seed))


def _one_pass(update: Update, size: int) -> None:
    """For each block of so many whole slices: moments, then the parameter while everything is in cache."""
    numbers, seed = update.numbers, update.seed
    tensors = (update.param, update.grad, update.exp_avg, *update.parts, *update.maxima)
    for param, grad, exp_avg, used, *maxima in zip(*split(tensors, size), strict=True):
        # first and second moment
        grad = numbers.gradient(grad)
        update_first_moment(exp_avg, grad, numbers.beta1)
        if not update.is_given:
            used.mul_(numbers.beta2).add_(mean_square(grad, used.dtype), alpha=1 - numbers.beta2)
        if maxima:
            (used,) = running_maximum(maxima, [used])

        # weight decay and update
        update.update_param(param, exp_avg, update.denominator(used), seed)
        seed += param.numel()


def _two_passes(update: Update, most: int) -> None:
    """Second moments first, then the parameter: column averages need all rows."""
    numbers, seed = update.numbers, update.seed
    *rows, columns = update.parts
    width = max(1, columns.shape[1])

    # first and second moment
    if not update.is_given:
        _update_rows_and_columns(update, max(1, most // width))
    if update.maxima:
        (columns,) = running_maximum(update.maxima, [columns])

    # weight decay and update
    size = max(1, most // width)
    params, grads, exp_avgs = split((update.param, update.grad, update.exp_avg), size)
    denominators = _denominators(update, rows, columns, size)
    for param, grad, exp_avg, denominator in zip(params, grads, exp_avgs, denominators, strict=False):
        if update.is_given:
            update_first_moment(exp_avg, numbers.gradient(grad), numbers.beta1)
        update.update_param(param, exp_avg, denominator, seed)
        seed += param.numel()


def _denominators(update: Update, rows: list[Tensor], columns: Tensor, size: int) -> Iterator[Tensor]:
    """``sqrt(v_hat) + eps`` for each block of so many rows, good until the next."""
    if not rows:
        denominator = update.denominator(columns)
        while True:
            yield denominator
    row_roots = (rows[0] if update.is_given else relative_rows(rows[0], (0,))).sqrt()
    column_roots = columns.sqrt().div_(update.numbers.root)
    for (some,) in zip(*split([row_roots], size), strict=True):
        target = scratch(columns.dtype, (len(some), columns.shape[1]))
        yield torch.mul(some, column_roots, out=target).add_(update.numbers.eps)


def _update_rows_and_columns(update: Update, size: int) -> None:
    """Every block's first moment, and second moments of its squares, read once."""
    numbers = update.numbers
    *rows, columns = update.parts
    weight = 1 - numbers.beta2
    sums = torch.zeros_like(columns)
    tensors = (update.grad, update.exp_avg, *rows)
    for grad, exp_avg, *some in zip(*split(tensors, size), strict=True):
        grad = numbers.gradient(grad)
        squared = squares(grad, columns.dtype)
        sums += squared.sum(0, keepdim=True)
        for row in some:
            row.mul_(numbers.beta2).add_(squared.mean(1, keepdim=True), alpha=weight)
        update_first_moment(exp_avg, grad, numbers.beta1)
    columns.mul_(numbers.beta2).add_(sums, alpha=weight / len(update.param))


def mean_square(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of squares over the second dimension of ``[pre, red, post]`` or ``[pre, red]``, kept with size 1."""
    norm = row_norms(grad, dtype)
    mean: Tensor = squares(grad, dtype).mean(1, keepdim=True) if norm is None else norm.square_().div_(grad.shape[1])
    return mean


def row_norms(grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The norms of rows, a dimension kept with size 1, without a temporary of the rows' size; None of other shapes."""
    pre, red, *post = grad.shape
    if not 1 < red <= LONGEST_NORM or math.prod(post) != 1:
        return None
    # Two dimensions: only a reduction over the last one is fast.
    norms: Tensor = torch.linalg.vector_norm(grad.view(pre, red) if post else grad, dim=1, keepdim=True, dtype=dtype)
    return norms.unsqueeze(2) if post else norms
