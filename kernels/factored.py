"""The update of parameters with row and column averages: small ones in a few calls, a large matrix block by block.

PyTorch's fused kernel takes the step, given first moments that are updated already, the products of row and column
averages, and gradients of zero. The plain reference beside it is :func:`slimadam.functional.reference_update`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from slimadam.kernels.batches import Batch
from slimadam.kernels.layout import geometry
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.passes import mean_square
from slimadam.kernels.scratch import scratch, split
from slimadam.kernels.torch_fused import takes_eps, update_with
from torch import Tensor

from slimadam.functional import Entry, Hyperparameters, relative_rows


class Matrices(NamedTuple):
    """A parameter, or one of its matrices.

    Attributes:
        param: ``[pre, red, post]``,
        grad: and so its gradient
        exp_avg: and first moment.
        rows: Row averages, ``[pre, red, 1]``.
        columns: Column averages, ``[pre, 1, post]``.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    rows: Tensor
    columns: Tensor


def takes_factored(entry: Entry, hyper: Hyperparameters) -> bool:
    """Whether this update takes a parameter; averages over several ranks are left to others."""
    tensors = (entry.param, entry.grad, entry.exp_avg, *entry.exp_avg_sq)
    plain = len(entry.exp_avg_sq) == 2 and not entry.is_given and takes_eps(hyper)
    return plain and all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in tensors)


def stacks(entry: Entry, most: int) -> Iterator[Matrices]:
    """A parameter's matrices, of about so many elements together, but at least one."""
    _, pre, red, post, _ = geometry(entry)
    values = (tensor.view(pre, red, post) for tensor in (entry.param, entry.grad, entry.exp_avg))
    rows, columns = entry.exp_avg_sq
    tensors = [*values, rows.view(pre, red, 1), columns.view(pre, 1, post)]
    for some in zip(*split(tensors, max(1, most // (red * post))), strict=True):
        yield Matrices(*some)


def update_factored_batch(batch: Batch[Matrices]) -> None:
    """Update all matrices in place."""
    blocks, numbers = batch.blocks, batch.numbers
    params, grads, exp_avgs, rows, columns = (list(kind) for kind in zip(*blocks, strict=True))
    if numbers.gradient_factor != 1:
        grads = list(torch._foreach_mul(grads, numbers.gradient_factor))

    # second moment
    sizes = [param.numel() for param in params]
    memory = scratch(torch.float32, (sum(sizes),)).split(sizes)
    spread = [one.view(param.shape) for one, param in zip(memory, params, strict=True)]
    means = [torch.mul(grad, grad, out=one).mean(2, keepdim=True) for grad, one in zip(grads, spread, strict=True)]
    means += [one.mean(1, keepdim=True) for one in spread]
    torch._foreach_mul_(rows + columns, numbers.beta2)
    torch._foreach_add_(rows + columns, means, alpha=1 - numbers.beta2)
    for row, column, one in zip(rows, columns, spread, strict=True):
        torch.mul(relative_rows(row, (1,)), column, out=one)

    # first moment, weight decay and update
    torch._foreach_lerp_(exp_avgs, grads, 1 - numbers.beta1)
    update_with(params, exp_avgs, spread, numbers)


def update_factored_matrix(matrix: Matrices, numbers: Numbers, most: int) -> None:
    """Update one matrix in place.

    Args:
        matrix: The matrix.
        numbers: Hyperparameters and bias corrections.
        most: About so many elements are worked on at a time.
    """
    param, grad, exp_avg, rows, columns = (tensor[0] for tensor in matrix)
    size = -(-len(param) // max(1, round(param.numel() / most)))
    params, grads, exp_avgs, some_rows = split((param, grad, exp_avg, rows), size)
    memory = scratch(torch.float32, params[0].shape)

    # first and second moment
    weight = 1 - numbers.beta2
    sums = scratch(torch.float32, params[0].shape, "sums").zero_()
    for own, first_moment, averages in zip(grads, exp_avgs, some_rows, strict=True):
        gradient = numbers.gradient(own)
        averages.mul_(numbers.beta2).add_(mean_square(gradient, torch.float32), alpha=weight)
        sums[: len(own)].addcmul_(gradient, gradient)
        first_moment.lerp_(gradient, 1 - numbers.beta1)
    columns.mul_(numbers.beta2).add_(sums.sum(0, keepdim=True), alpha=weight / len(param))

    # weight decay and update, the last blocks first: they may still be in cache
    relative = split([relative_rows(rows, (0,))], size)[0]
    for own, first_moment, averages in zip(params[::-1], exp_avgs[::-1], relative[::-1], strict=True):
        spread = torch.mul(averages, columns, out=memory[: len(own)])
        update_with([own], [first_moment], [spread], numbers)
