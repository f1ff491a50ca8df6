"""The update in eager PyTorch on blocks that stay in the CPU's cache.

Each block is read from memory once, however many operations work on it, so that a row-averaged step moves
20 bytes per float32 parameter and a column-averaged one 24 (AdamW: 28). Where there are enough parameters, each core
takes some of its own (workers.py); the results are those of one core, bit for bit. The plain reference beside it is
:func:`slimadam.functional.reference_update`; parameters stored in full, where everything has one dtype, go to
PyTorch's own fused CPU kernel.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from slimadam.kernels import workers
from slimadam.kernels.layout import Layout, layout, overlap
from torch import Tensor

from slimadam.functional import (
    Dims,
    Entry,
    Hyperparameters,
    bias_corrections,
    relative_rows,
    running_maximum,
    stochastic_round,
    update_first_moment,
)

BLOCK_ELEMENTS = 1 << 19
"""Elements worked on at a time; ``python -m benchmarks.throughput --block N`` measures another size."""

SHARE_ELEMENTS = 1 << 21
"""Elements of a large parameter that one core takes at once."""

WORTH_WAKING = 1 << 21
"""Elements from which on several cores take parameters of their own."""

LONGEST_NORM = 1 << 16
"""Longest row summed by ``vector_norm``, whose running sums lose precision where ``mean``'s do not."""


def layouts(param: Tensor, averaged_dims: Sequence[Dims]) -> list[Layout] | None:
    """The layout of each second moment of a parameter, or None if this implementation cannot take it.

    Args:
        param: A real CPU parameter.
        averaged_dims: For each second moment, the dimensions it is averaged over.
    """
    if len(averaged_dims) == 2 and not param.is_contiguous():
        return None
    found = [layout(param, dims) for dims in averaged_dims]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


def blocked_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update every parameter in place. For each, :func:`layouts` must have found a view."""
    whole: dict[torch.dtype, list[Entry]] = {}
    averaged = []
    for entry in entries:
        if _is_plain(entry):
            whole.setdefault(entry.param.dtype, []).append(entry)
        else:
            averaged.append(entry)
    _update_averaged(averaged, hyper)
    factor = _factor(hyper)
    for same_dtype in whole.values():
        for together in [same_dtype] if factor == 1 else _scaled(same_dtype, factor):
            _torch_fused(together, hyper)


class _Share(NamedTuple):
    """One of several equal shares of a parameter's slices."""

    entry: Entry
    number: int
    of: int

    @property
    def elements(self) -> int:
        return self.entry.param.numel() // self.of


def _update_averaged(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Each share on one core where there are enough to keep all of them busy; else one parameter after the other."""
    shares = sorted((share for entry in entries for share in _shares(entry)), key=lambda share: -share.elements)
    total = sum(share.elements for share in shares)
    enough = total >= WORTH_WAKING and shares[0].elements * workers.count() <= total
    if enough and not overlap(entry.param for entry in entries):
        workers.run(partial(_update_share, share, hyper) for share in shares)
    else:
        for entry in entries:
            _update_share(_Share(entry, 0, 1), hyper)


def _shares(entry: Entry) -> Iterator[_Share]:
    """A parameter whole, or in shares if it is large and no view of a share would copy anything outside of it."""
    tensors = (entry.param, entry.grad, entry.exp_avg, *entry.exp_avg_sq, *entry.max_exp_avg_sq)
    divisible = all(tensor.is_contiguous() for tensor in tensors)
    most = entry.param.numel() // SHARE_ELEMENTS if divisible else 1
    of = max(1, min(most, _geometry(entry).pre))
    return (_Share(entry, number, of) for number in range(of))


def _is_plain(entry: Entry) -> bool:
    """Whether PyTorch's fused kernel takes it: nothing averaged, one dtype."""
    same_dtype = entry.param.dtype == entry.exp_avg.dtype == entry.exp_avg_sq[0].dtype
    return not any(entry.averaged_dims) and same_dtype and entry.step.dtype == torch.float32


def _factor(hyper: Hyperparameters) -> float:
    return 1.0 if hyper.clip_factor is None else float(hyper.clip_factor)


def _scaled(entries: Sequence[Entry], factor: float) -> Iterator[list[Entry]]:
    """What the entries consist of, some elements at a time, with gradients times a factor, good until the next."""
    together: list[Entry] = []
    used = 0
    for entry in entries:
        size = entry.param.numel()
        if size > BLOCK_ELEMENTS or entry.grad.dtype != entry.param.dtype:
            yield from _scaled_blocks(entry, factor)
            continue
        if used + size > BLOCK_ELEMENTS:
            yield _scaled_whole(together, factor)
            together, used = [], 0
        together.append(entry)
        used += size
    if together:
        yield _scaled_whole(together, factor)


def _scaled_whole(entries: Sequence[Entry], factor: float) -> list[Entry]:
    grads = torch._foreach_mul([entry.grad for entry in entries], factor)
    return [Entry(entry.param, grad, *entry[2:]) for entry, grad in zip(entries, grads, strict=True)]


def _scaled_blocks(entry: Entry, factor: float) -> Iterator[list[Entry]]:
    found = layouts(entry.param, ((),))
    assert found is not None
    order, size, _, _ = found[0]
    flat = [
        _view(tensor, order, (size,))
        for tensor in (entry.param, entry.grad, entry.exp_avg, entry.exp_avg_sq[0], *entry.max_exp_avg_sq)
    ]
    for block in _blocks(size, 1):
        param, grad, exp_avg, exp_avg_sq, *largest = (tensor[block] for tensor in flat)
        scaled = _times(grad, factor, _scratch(param.dtype, grad.shape, "gradient"))
        yield [Entry(param, scaled, exp_avg, [exp_avg_sq], largest, entry.step, entry.averaged_dims)]


def _torch_fused(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    steps = [entry.step for entry in entries]
    torch._fused_adamw_(
        [entry.param for entry in entries],
        [entry.grad for entry in entries],
        [entry.exp_avg for entry in entries],
        [entry.exp_avg_sq[0] for entry in entries],
        [entry.max_exp_avg_sq[0] for entry in entries] if hyper.amsgrad else [],
        steps,
        lr=float(hyper.lr),
        beta1=float(hyper.beta1),
        beta2=float(hyper.beta2),
        weight_decay=float(hyper.weight_decay),
        eps=hyper.eps,
        amsgrad=hyper.amsgrad,
        maximize=hyper.maximize,
    )


def _update_share(share: _Share, hyper: Hyperparameters) -> None:
    entry = share.entry
    order, pre, red, post = _geometry(entry)
    shapes = [(pre, 1, post)] if len(entry.exp_avg_sq) == 1 else [(pre, red, 1), (pre, 1, post)]
    numbers = hyper._replace(lr=float(hyper.lr), beta1=float(hyper.beta1), beta2=float(hyper.beta2))
    step_size, root = bias_corrections(entry.step, numbers)
    update = Update(
        param=_view(entry.param, order, (pre, red, post)),
        grad=_view(entry.grad, order, (pre, red, post)),
        exp_avg=_view(entry.exp_avg, order, (pre, red, post)),
        parts=[_view(part, order, shape) for part, shape in zip(entry.exp_avg_sq, shapes, strict=True)],
        maxima=[_view(part, order, shapes[0]) for part in entry.max_exp_avg_sq],
        beta1=float(hyper.beta1),
        beta2=float(hyper.beta2),
        eps=hyper.eps,
        decay=1 - float(hyper.lr) * float(hyper.weight_decay),
        step_size=step_size,
        root=root,
        gradient_factor=-_factor(hyper) if hyper.maximize else _factor(hyper),
        rounds=hyper.stochastic_round and entry.param.dtype == torch.bfloat16,
        is_given=entry.is_given,
        seed=entry.seed,
    )
    blocks = list(_blocks(pre, red * post))
    blocks = blocks[len(blocks) * share.number // share.of : len(blocks) * (share.number + 1) // share.of]
    if len(shapes) == 1 and red * post <= BLOCK_ELEMENTS:
        _one_pass(update, blocks)
    else:
        for index in (index for block in blocks for index in range(block.start, block.stop)):
            _two_passes(update.at(index))
    if entry.is_given:
        return
    stored, views = [*entry.exp_avg_sq, *entry.max_exp_avg_sq], [*update.parts, *update.maxima]
    for moment, view in zip(stored, views, strict=True):
        if moment.data_ptr() != view.data_ptr():
            target = moment.permute(order) if order else moment
            target.copy_(view.reshape(target.shape))


def _geometry(entry: Entry) -> Layout:
    """How an entry is seen as ``[pre, red, post]``, with no order where it lies in that of its dimensions."""
    found = layouts(entry.param, entry.averaged_dims)
    assert found is not None
    if len(found) == 2:
        ((row_dim,), shape) = entry.averaged_dims[1], entry.param.shape
        return Layout((), math.prod(shape[:row_dim]), shape[row_dim], math.prod(shape[row_dim + 1 :]))
    return found[0]._replace(order=()) if entry.param.is_contiguous() else found[0]


def _view(tensor: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor in memory order (empty: as it is) and in a new shape; a copy only where strides demand one."""
    return tensor.permute(order).reshape(shape) if order else tensor.reshape(shape)


class Update(NamedTuple):
    """One parameter's step: ``[pre, red, post]`` views of its tensors, and numbers."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    parts: list[Tensor]
    maxima: list[Tensor]
    beta1: float
    beta2: float
    eps: float
    decay: float
    step_size: float
    root: float
    gradient_factor: float
    rounds: bool
    is_given: bool
    seed: int

    def at(self, index: int) -> Update:
        """The same for one slice of the first dimension, as ``[red, post]``."""
        return self._replace(
            param=self.param[index],
            grad=self.grad[index],
            exp_avg=self.exp_avg[index],
            parts=[part[index] for part in self.parts],
            maxima=[part[index] for part in self.maxima],
            seed=self.seed + index * self.param[index].numel(),
        )

    def denominator(self, second_moment: Tensor) -> Tensor:
        """``sqrt(v_hat) + eps``."""
        return second_moment.sqrt().div_(self.root).add_(self.eps)

    def gradient(self, block: slice) -> Tensor:
        """That of one block, clipped and negated where it must be; good until the next."""
        grad = self.grad[block]
        if self.gradient_factor == 1:
            return grad
        wide = torch.promote_types(grad.dtype, torch.float32)
        return _times(grad, self.gradient_factor, _scratch(wide, grad.shape, "gradient"))

    def update_first_moment(self, block: slice, grad: Tensor) -> None:
        """The first moment of one block."""
        update_first_moment(self.exp_avg[block], grad, self.beta1)

    def update_param(self, block: slice, denominator: Tensor) -> None:
        """Weight decay and step of one block."""
        target = self.param[block]
        work = target.float() if self.rounds else target
        if self.decay != 1:
            work.mul_(self.decay)
        work.addcdiv_(self.exp_avg[block], denominator, value=-self.step_size)
        if self.rounds:
            target.copy_(stochastic_round(work, self.seed + block.start))


def _one_pass(update: Update, blocks: Sequence[slice]) -> None:
    """For each block of whole slices: moments, then the parameter while everything is in cache."""
    (part,) = update.parts
    for block in blocks:
        # first and second moment
        grad = update.gradient(block)
        update.update_first_moment(block, grad)
        used = part[block]
        if not update.is_given:
            mean_square = _mean_square(grad, used.dtype)
            used.mul_(update.beta2).add_(mean_square, alpha=1 - update.beta2)
        if update.maxima:
            (used,) = running_maximum([update.maxima[0][block]], [used])

        # weight decay and update
        update.update_param(block, update.denominator(used))


def _two_passes(update: Update) -> None:
    """Moments of every block of rows first, then the parameter: column averages need all rows."""
    *rows, columns = update.parts
    red, post = update.param.shape
    blocks = list(_blocks(red, post))

    # first and second moment
    if not update.is_given:
        _update_rows_and_columns(update, blocks)
    if update.maxima:
        (columns,) = running_maximum(update.maxima, [columns])

    # weight decay and update
    if not rows:
        denominator = update.denominator(columns)
        for block in blocks:
            if update.is_given:
                update.update_first_moment(block, update.gradient(block))
            update.update_param(block, denominator)
        return
    row_roots = (rows[0] if update.is_given else relative_rows(rows[0], (0,))).sqrt()
    column_roots = columns.sqrt().div_(update.root)
    for block in blocks:
        if update.is_given:
            update.update_first_moment(block, update.gradient(block))
        scratch = _scratch(columns.dtype, update.param[block].shape)
        torch.mul(row_roots[block], column_roots, out=scratch)
        update.update_param(block, scratch.add_(update.eps))


def _update_rows_and_columns(update: Update, blocks: Sequence[slice]) -> None:
    """Every block's first moment, and second moments of its squares, read once."""
    *rows, columns = update.parts
    weight = 1 - update.beta2
    sums = torch.zeros_like(columns)
    for block in blocks:
        grad = update.gradient(block)
        squared = squares(grad, columns.dtype)
        sums += squared.sum(0, keepdim=True)
        for row in rows:
            row[block].mul_(update.beta2).add_(squared.mean(1, keepdim=True), alpha=weight)
        update.update_first_moment(block, grad)
    columns.mul_(update.beta2).add_(sums, alpha=weight / update.param.shape[0])


def _blocks(count: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, width))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _mean_square(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of squares over the middle dimension of ``[pre, red, post]``, without a temporary for rows."""
    red, post = grad.shape[1:]
    if post == 1 and 1 < red <= LONGEST_NORM:
        # Two dimensions: only a reduction over the last one is fast.
        norm: Tensor = torch.linalg.vector_norm(grad[:, :, 0], dim=1, keepdim=True, dtype=dtype)
        return norm.square_().div_(red).unsqueeze(2)
    return squares(grad, dtype).mean(1, keepdim=True)


def _times(grad: Tensor, factor: float, target: Tensor) -> Tensor:
    if grad.dtype == target.dtype:
        return torch.mul(grad, factor, out=target)
    return target.copy_(grad).mul_(factor)


def squares(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad**2`` in memory that the next block uses again."""
    scratch = _scratch(dtype, grad.shape)
    if grad.dtype == dtype:
        return torch.mul(grad, grad, out=scratch)
    return scratch.copy_(grad).square_()


_scratches = threading.local()


def _scratch(dtype: torch.dtype, shape: Sequence[int], use: str = "") -> Tensor:
    """Uninitialised memory of this thread; valid until the next call for the same precision and use."""
    wanted, key = math.prod(shape), f"{use}{dtype}"
    held: Tensor | None = getattr(_scratches, key, None)
    if held is None or held.numel() < wanted:
        with torch.inference_mode(False):  # else of no use once that mode has ended
            held = torch.empty(wanted, dtype=dtype, device="cpu")
        setattr(_scratches, key, held)
    return held[:wanted].view(shape)
