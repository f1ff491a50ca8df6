"""The update in eager PyTorch on blocks that stay in the CPU's cache.

Each block is read from memory once, however many operations work on it, so that a row-averaged step moves
20 bytes per float32 parameter and a column-averaged one 24 (AdamW: 28). Where there are enough parameters, each core
takes some of its own (workers.py); the results are those of one core, bit for bit. In float32 PyTorch's own fused CPU
kernel takes the step (torch_fused.py): of small parameters together (batches.py), of large matrices by blocks of rows
(columns.py), and with row and column averages (factored.py). What it cannot take goes through chains of operations
(passes.py). The plain reference beside all of them is :func:`slimadam.functional.reference_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from slimadam.kernels import workers
from slimadam.kernels.batches import batches, blocks, takes_blocks, update_batch
from slimadam.kernels.columns import matrices, update_matrix
from slimadam.kernels.factored import stacks, takes_factored, update_factored_batch, update_factored_matrix
from slimadam.kernels.layout import geometry, overlap
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.passes import update_share
from slimadam.kernels.torch_fused import is_plain, update_plain

from slimadam.functional import Entry, Hyperparameters

BLOCK_ELEMENTS = 1 << 19
"""Elements worked on at a time; ``python -m benchmarks.throughput --block N`` measures another size."""

SHARE_ELEMENTS = 1 << 21
"""Elements of a large parameter that one core takes at once."""

WORTH_WAKING = 1 << 21
"""Elements from which on several cores take parameters of their own."""


def blocked_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update every parameter in place: those without gaps that :func:`~slimadam.kernels.layout.geometry_of` knows."""
    plain: list[Entry] = []
    averaged: list[Entry] = []
    for entry in entries:
        (plain if is_plain(entry) else averaged).append(entry)
    _update_averaged(averaged, hyper)
    update_plain(plain, hyper, BLOCK_ELEMENTS)


class _Task(NamedTuple):
    """What one core does at a time, and for how many elements."""

    elements: int
    run: Callable[[], None]


def _update_averaged(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Each task on one core where there are enough to keep all of them busy; else one after the other."""
    tasks = sorted(_tasks(entries, hyper), key=lambda task: -task.elements)
    total = sum(task.elements for task in tasks)
    enough = total >= WORTH_WAKING and tasks[0].elements * workers.count() <= total
    if enough and not overlap(entry.param for entry in entries):
        workers.run(task.run for task in tasks)
    else:
        for task in tasks:
            task.run()


def _tasks(entries: Sequence[Entry], hyper: Hyperparameters) -> Iterator[_Task]:
    batched, factored = [], []
    for entry in entries:
        _, _, red, post, _ = geometry(entry)
        if takes_factored(entry, hyper):
            if red * post <= BLOCK_ELEMENTS:
                factored.append(entry)
                continue
            numbers = Numbers.of(hyper, entry.step)
            for one in stacks(entry, 1):
                yield _Task(red * post, partial(update_factored_matrix, one, numbers, -(-BLOCK_ELEMENTS // 2)))
        elif not takes_blocks(entry, hyper):
            of = _shares(entry)
            for number in range(of):
                run = partial(update_share, entry, hyper, number, of, BLOCK_ELEMENTS)
                yield _Task(entry.param.numel() // of, run)
        elif 2 * red * post > BLOCK_ELEMENTS and (post > 1 or red > BLOCK_ELEMENTS):
            numbers = Numbers.of(hyper, entry.step)
            for matrix in matrices(entry):
                yield _Task(red * post, partial(update_matrix, matrix, numbers, -(-BLOCK_ELEMENTS // 2)))
        else:
            batched.append(entry)
    for batch in batches(batched, hyper, BLOCK_ELEMENTS, blocks):
        yield _Task(sum(block.param.numel() for block in batch.blocks), partial(update_batch, batch))
    for several in batches(factored, hyper, BLOCK_ELEMENTS, stacks):
        yield _Task(sum(one.param.numel() for one in several.blocks), partial(update_factored_batch, several))


def _shares(entry: Entry) -> int:
    """Into how many shares a parameter is divided: 1, unless it is large and no view of a share would be a copy."""
    tensors = (entry.param, entry.grad, entry.exp_avg, *entry.exp_avg_sq, *entry.max_exp_avg_sq)
    if entry.param.numel() < 2 * SHARE_ELEMENTS or not all(tensor.is_contiguous() for tensor in tensors):
        return 1
    slices: int = geometry(entry).pre
    return max(1, min(entry.param.numel() // SHARE_ELEMENTS, slices))
