"""PyTorch's own fused CPU kernel, for parameters stored in full and for blocks whose second moments are known.

It runs through memory once, where a chain of operations needs a call and a temporary for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from slimadam.kernels.layout import layout
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.scratch import scaled, split, zeros
from torch import Tensor

from slimadam.functional import Entry, Hyperparameters
from slimadam.torch_private import fused_adamw_

_NO_CORRECTION = torch.tensor(math.inf, device="cpu")
"""Steps after which bias corrections are 1."""

_DECAY = 1 - 2**-53
"""The largest decay rate below 1. With it a squared gradient below 2**28 times the second moment does not change it in
float32: what is added is less than half of the last bit."""


def is_plain(entry: Entry) -> bool:
    """Whether PyTorch's fused kernel takes it as it is: nothing averaged, one dtype."""
    same_dtype = entry.param.dtype == entry.exp_avg.dtype == entry.exp_avg_sq[0].dtype
    return not any(entry.averaged_dims) and same_dtype and entry.step.dtype == torch.float32


def update_plain(entries: Sequence[Entry], hyper: Hyperparameters, most: int) -> None:
    """Update parameters for which :func:`is_plain` said yes.

    Args:
        entries: Of any dtypes.
        hyper: Hyperparameters.
        most: Elements whose clipped gradients are held at once.
    """
    factor = 1.0 if hyper.clip_factor is None else float(hyper.clip_factor)
    by_dtype: dict[torch.dtype, list[Entry]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.param.dtype, []).append(entry)
    for same_dtype in by_dtype.values():
        for together in [same_dtype] if factor == 1 else _clipped(same_dtype, factor, most):
            _update_together(together, hyper)


_SMALLEST_EPS = 1e-30
"""Next to which ``eps * root`` is a normal float32 number."""


def takes_eps(hyper: Hyperparameters) -> bool:
    """Whether :func:`update_beside` can multiply ``eps`` by a bias correction."""
    return hyper.eps == 0 or hyper.eps >= _SMALLEST_EPS


def takes_averages(entry: Entry, averaged: int, beta2: float) -> bool:
    """Whether :func:`update_beside` takes a parameter's blocks and leaves their averages what they are.

    Args:
        entry: The parameter's tensors.
        averaged: How many elements share one second moment. A squared gradient is at most ``averaged / (1 - beta2)``
            times that; of averages over several ranks this is not known.
        beta2: Decay rate of the second moment.
    """
    tensors = (entry.param, entry.grad, entry.exp_avg, *entry.exp_avg_sq)
    known = len(entry.exp_avg_sq) == 1 and not entry.is_given
    return known and averaged < 2**27 * (1 - beta2) and all(tensor.dtype == torch.float32 for tensor in tensors)


def update_beside(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], second_moments: list[Tensor], numbers: Numbers
) -> None:
    """First moments, weight decay and step where second moments are known, see :func:`takes_averages`.

    Args:
        params: Blocks of parameters, float32.
        grads: Of the same shapes.
        exp_avgs: First moments, of the same shapes.
        second_moments: Of the same shapes; unchanged, but not finite where a squared gradient is not.
        numbers: Hyperparameters and bias corrections.
    """
    lr = numbers.step_size * numbers.root
    fused_adamw_(
        params,
        grads,
        exp_avgs,
        second_moments,
        [],
        [_NO_CORRECTION] * len(params),
        lr=lr,
        beta1=numbers.beta1,
        beta2=_DECAY,
        weight_decay=(1 - numbers.decay) / lr if lr else 0.0,
        eps=numbers.eps * numbers.root,
        amsgrad=False,
        maximize=False,
    )


def update_with(params: list[Tensor], exp_avgs: list[Tensor], second_moments: list[Tensor], numbers: Numbers) -> None:
    """Weight decay and step where both moments are known.

    With gradients of zero and decay rates next to 1 neither changes in float32.

    Args:
        params: Blocks of parameters, float32.
        exp_avgs: First moments, of the same shapes.
        second_moments: Of the same shapes.
        numbers: Hyperparameters and bias corrections.
    """
    sizes = [param.numel() for param in params]
    memory = zeros(max(sizes))
    grads = [memory[:size].view(param.shape) for size, param in zip(sizes, params, strict=True)]
    update_beside(params, grads, exp_avgs, second_moments, numbers._replace(beta1=_DECAY))


def _update_together(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    fused_adamw_(
        [entry.param for entry in entries],
        [entry.grad for entry in entries],
        [entry.exp_avg for entry in entries],
        [entry.exp_avg_sq[0] for entry in entries],
        [entry.max_exp_avg_sq[0] for entry in entries] if hyper.amsgrad else [],
        [entry.step for entry in entries],
        lr=float(hyper.lr),
        beta1=float(hyper.beta1),
        beta2=float(hyper.beta2),
        weight_decay=float(hyper.weight_decay),
        eps=hyper.eps,
        amsgrad=hyper.amsgrad,
        maximize=hyper.maximize,
    )


def _clipped(entries: Sequence[Entry], factor: float, most: int) -> Iterator[list[Entry]]:
    """What the entries consist of, some elements at a time, with gradients times a factor, good until the next."""
    together: list[Entry] = []
    used = 0
    for entry in entries:
        size = entry.param.numel()
        if size > most or entry.grad.dtype != entry.param.dtype:
            yield from _clipped_blocks(entry, factor, most)
            continue
        if used + size > most:
            yield _clipped_whole(together, factor)
            together, used = [], 0
        together.append(entry)
        used += size
    if together:
        yield _clipped_whole(together, factor)


def _clipped_whole(entries: Sequence[Entry], factor: float) -> list[Entry]:
    grads = torch._foreach_mul([entry.grad for entry in entries], factor)
    return [Entry(entry.param, grad, *entry[2:]) for entry, grad in zip(entries, grads, strict=True)]


def _clipped_blocks(entry: Entry, factor: float, most: int) -> Iterator[list[Entry]]:
    found = layout(entry.param, ())
    assert found is not None
    moments = (entry.exp_avg, entry.exp_avg_sq[0], *entry.max_exp_avg_sq)
    flat = (tensor.permute(found.order).reshape(-1) for tensor in (entry.param, entry.grad, *moments))
    for param, grad, exp_avg, exp_avg_sq, *largest in zip(*split(flat, most), strict=True):
        clipped = scaled(grad, factor, param.dtype)
        yield [Entry(param, clipped, exp_avg, [exp_avg_sq], largest, entry.step, entry.averaged_dims)]
