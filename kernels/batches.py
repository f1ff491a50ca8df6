"""The update of many small parameters, or of a block of a large one, in a few calls.

Second moments are averaged by operations on lists of tensors and spread over their elements in cache; PyTorch's fused
kernel does the rest. The plain reference beside it is :func:`slimadam.functional.reference_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from slimadam.kernels.layout import geometry
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.passes import row_norms
from slimadam.kernels.scratch import scratch, split
from slimadam.kernels.torch_fused import takes_averages, takes_eps, update_beside
from torch import Tensor

from slimadam.functional import Entry, Hyperparameters


class Block(NamedTuple):
    """Some slices of a parameter, or all, with averages of their own.

    Attributes:
        param: ``[pre, red, post]``, or ``[pre, red]`` or ``[red, post]`` where the third would be 1,
        grad: and so its gradient
        exp_avg: and first moment.
        exp_avg_sq: Second moment, ``[pre, 1, post]``, ``[pre, 1]`` or ``[1, post]``.
        max_exp_avg_sq: With amsgrad its running maximum, shaped as it.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None


Together = TypeVar("Together", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Batch(Generic[Together]):
    """Blocks that are updated together, and by which numbers."""

    blocks: list[Together]
    numbers: Numbers


def takes_blocks(entry: Entry, hyper: Hyperparameters) -> bool:
    """Whether PyTorch's fused kernel takes blocks of a parameter."""
    if len(entry.exp_avg_sq) == 2 or not takes_eps(hyper):
        return False
    tensors = (entry.param, entry.grad, entry.exp_avg, *entry.exp_avg_sq, *entry.max_exp_avg_sq)
    averaged = geometry(entry).red
    return takes_averages(entry, averaged, float(hyper.beta2)) and all(tensor.is_contiguous() for tensor in tensors)


def batches(
    entries: Iterable[Entry],
    hyper: Hyperparameters,
    most: int,
    blocks_of: Callable[[Entry, int], Iterator[Together]],
) -> Iterator[Batch[Together]]:
    """Batches of about so many elements.

    Args:
        entries: Parameters.
        hyper: Hyperparameters.
        most: Elements of a batch, unless one block has more.
        blocks_of: The blocks of a parameter, of about so many elements; the first tensor of each is the parameter's.
    """
    by_step: dict[float, list[Entry]] = {}
    for entry in entries:
        by_step.setdefault(entry.step.item(), []).append(entry)
    for alike in by_step.values():
        numbers = Numbers.of(hyper, alike[0].step)
        together: list[Together] = []
        elements = 0
        for block in (block for entry in alike for block in blocks_of(entry, most)):
            size = block[0].numel()
            if elements + size > most and together:
                yield Batch(together, numbers)
                together, elements = [], 0
            together.append(block)
            elements += size
        yield Batch(together, numbers)


def blocks(entry: Entry, most: int) -> Iterator[Block]:
    """Those of a parameter for which :func:`takes_blocks` said yes."""
    _, pre, red, post, _ = geometry(entry)
    shape: tuple[int, ...] = (pre, red, post)
    averages: tuple[int, ...] = (pre, 1, post)
    if post == 1:
        shape, averages = (pre, red), (pre, 1)
    elif pre == 1:
        shape, averages = (red, post), (1, post)
    values = (entry.param, entry.grad, entry.exp_avg)
    moments = (*entry.exp_avg_sq, *entry.max_exp_avg_sq)
    tensors = [*(_seen(value, shape) for value in values), *(_seen(moment, averages) for moment in moments)]
    count = round(math.prod(shape) / most)
    if count <= 1:
        yield Block(*tensors)
    else:
        size = -(-len(tensors[0]) // count)
        for some in zip(*split(tensors, size), strict=True):
            yield Block(*some)


def _seen(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.view(shape)


def update_batch(batch: Batch[Block]) -> None:
    """Update all blocks in place."""
    together, numbers = batch.blocks, batch.numbers
    params, grads, exp_avgs, moments, maxima = (list(kind) for kind in zip(*together, strict=True))
    if numbers.gradient_factor != 1:
        grads = list(torch._foreach_mul(grads, numbers.gradient_factor))

    # second moment
    sizes = [param.numel() for param in params]
    memory = scratch(torch.float32, (sum(sizes),)).split(sizes)
    spread = [one.view(param.shape) for one, param in zip(memory, params, strict=True)]
    torch._foreach_mul_(moments, numbers.beta2)
    _add_mean_squares(moments, grads, 1 - numbers.beta2, spread)
    if maxima[0] is not None:
        torch._foreach_maximum_(maxima, moments)
        moments = maxima

    # first moment, weight decay and update
    torch._foreach_copy_(spread, moments)
    update_beside(params, grads, exp_avgs, spread, numbers)


def _add_mean_squares(moments: list[Tensor], grads: list[Tensor], weight: float, working: list[Tensor]) -> None:
    """Add the weighted means of squares; ``working`` is memory shaped as the gradients."""
    means, norms, averaged, of_rows, shares = [], [], [], [], []
    for moment, grad, memory in zip(moments, grads, working, strict=True):
        of_columns = moment.shape[-1] > 1
        norm = None if of_columns else row_norms(grad, moment.dtype)
        if norm is None:
            means.append(torch.mul(grad, grad, out=memory).mean(-2 if of_columns else -1, keepdim=True))
            averaged.append(moment)
        else:
            norms.append(norm)
            of_rows.append(moment)
            shares.append(weight / grad.shape[1])
    if means:
        torch._foreach_add_(averaged, means, alpha=weight)
    if norms:
        torch._foreach_addcmul_(of_rows, norms, norms, shares)
