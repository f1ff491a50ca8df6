"""The update on lists of tensors at once, for accelerators without a fused kernel.

Line by line the same steps as ``reference_update``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from .float8 import is_coded
from .interface import Entry, Hyperparameters, second_moment_dtype
from .reference import reconstruct, update_codes, update_first_moment, update_maxima, update_second_moment


def foreach_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update every parameter in place, with a few launches for all elementwise work.

    Args:
        entries: The tensors: real, on one device and of one dtype, each first moment of its parameter's dtype.
        hyper: Hyperparameters.
    """
    params = [entry.param for entry in entries]
    exp_avgs = [entry.exp_avg for entry in entries]
    steps = [entry.step for entry in entries]
    grads = [entry.grad for entry in entries]
    if hyper.clip_factor is not None:
        grads = [grad.to(second_moment_dtype(grad.dtype)) for grad in grads]
        scaled = torch._foreach_mul(grads, hyper.clip_factor.to(grads[0].device))
        grads = [new.to(grad.dtype) for new, grad in zip(scaled, grads, strict=True)]  # scalars have become wider
    grads = list(torch._foreach_neg(grads)) if hyper.maximize else grads

    coded = [
        update_codes(entry, grad, hyper.beta2) if is_coded(entry.exp_avg_sq[0]) else None
        for entry, grad in zip(entries, grads, strict=True)
    ]

    # weight decay
    if isinstance(hyper.weight_decay, torch.Tensor) or hyper.weight_decay != 0:
        torch._foreach_mul_(params, 1 - hyper.lr * hyper.weight_decay)

    # first and second moment
    if grads[0].dtype == exp_avgs[0].dtype:
        torch._foreach_lerp_(exp_avgs, grads, cast(float, 1 - hyper.beta1))
    else:
        for exp_avg, grad in zip(exp_avgs, grads, strict=True):
            update_first_moment(exp_avg, grad, hyper.beta1)
    stored = []
    for entry, grad, after in zip(entries, grads, coded, strict=True):
        parts = entry.exp_avg_sq if after is None else [after]
        if after is None and not entry.precomputed:
            update_second_moment(parts, grad, entry.averaged_dims, hyper.beta2)
        if entry.max_exp_avg_sq:
            parts = update_maxima(entry.max_exp_avg_sq, parts)
        stored.append(reconstruct(parts, entry.averaged_dims, entry.precomputed))

    # update
    denominators = list(torch._foreach_sqrt(stored))
    if hyper.keeps_tensors(steps[0]):
        step_sizes = [hyper.lr / (1 - hyper.beta1**step) * -1 for step in steps]
        roots = [(1 - hyper.beta2**step) ** 0.5 for step in steps]
        torch._foreach_div_(denominators, [root * size for root, size in zip(roots, step_sizes, strict=True)])
        torch._foreach_add_(denominators, [hyper.eps / size for size in step_sizes])
        torch._foreach_addcdiv_(params, exp_avgs, denominators)
    else:
        corrections = [hyper.bias_corrections(step) for step in steps]
        torch._foreach_div_(denominators, [root for _, root in corrections])
        torch._foreach_add_(denominators, hyper.eps)
        torch._foreach_addcdiv_(params, exp_avgs, denominators, [-size for size, _ in corrections])
