"""The update of a matrix too large for cache whose columns share second moments: its gradient is read twice.

Squares are summed block by block, then PyTorch's fused kernel is given the averages. The plain reference beside it is
:func:`slimadam.functional.reference_update`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from slimadam.kernels.batches import Block
from slimadam.kernels.layout import geometry
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.scratch import scratch, split
from slimadam.kernels.torch_fused import update_beside
from torch import Tensor

from slimadam.functional import Entry


def matrices(entry: Entry) -> Iterator[Block]:
    """The matrices ``[red, post]`` of a parameter for which :func:`~slimadam.kernels.batches.takes_blocks` said yes."""
    _, pre, red, post, _ = geometry(entry)
    values = (tensor.view(pre, red, post) for tensor in (entry.param, entry.grad, entry.exp_avg))
    moments = (tensor.view(pre, 1, post) for tensor in (*entry.exp_avg_sq, *entry.max_exp_avg_sq))
    tensors = [*values, *moments]
    for index in range(pre):
        yield Block(*(tensor[index] for tensor in tensors))


def update_matrix(matrix: Block, numbers: Numbers, most: int) -> None:
    """Update a matrix in place.

    Args:
        matrix: The matrix.
        numbers: Hyperparameters and bias corrections.
        most: About so many elements are worked on at a time.
    """
    param, grad, exp_avg, columns, maxima = matrix
    count = max(1, round(param.numel() / most))
    size = -(-len(param) // count)
    params, grads, exp_avgs = split((param, grad, exp_avg), size)
    memory = scratch(columns.dtype, params[0].shape)

    # second moment
    sums = _sums_of_squares(grads, numbers, memory)
    columns.mul_(numbers.beta2).add_(sums, alpha=(1 - numbers.beta2) / len(param))
    if maxima is not None:
        columns = torch.maximum(maxima, columns, out=maxima)

    # first moment, weight decay and update, the last blocks first: they may still be in cache
    spread = [memory if len(one) == size else memory[: len(one)] for one in params]
    memory.copy_(columns)
    for kind in (params, grads, exp_avgs, spread):
        kind.reverse()
    if numbers.gradient_factor == 1:
        update_beside(params, grads, exp_avgs, spread, numbers)
    else:
        for own, gradient, first_moment, second_moment in zip(params, grads, exp_avgs, spread, strict=True):
            update_beside([own], [numbers.gradient(gradient)], [first_moment], [second_moment], numbers)


def _sums_of_squares(grads: list[Tensor], numbers: Numbers, memory: Tensor) -> Tensor:
    """Of each column; ``memory`` is as large as the largest block."""
    first, *rest = grads
    grad = numbers.gradient(first)
    torch.mul(grad, grad, out=memory)
    for block in rest:
        grad = numbers.gradient(block)
        (memory if len(grad) == len(memory) else memory[: len(grad)]).addcmul_(grad, grad)
    return memory.sum(0, keepdim=True)
