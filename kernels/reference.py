"""The readable update: the definition that every faster implementation is tested against.

Sources: AdamW (arXiv 1711.05101), compressed second moments (arXiv 2503.01843), factored second moments
(arXiv 1804.04235). With nothing compressed each operation is the one that ``torch.optim.AdamW`` performs, in
the same order, so that the results agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .float8 import decode, encode, is_coded
from .interface import Dims, Entry, Hyperparameters, Scalar, second_moment_dtype


def reference_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update each parameter in place, one after the other.

    ``exp_avg <- beta1 exp_avg + (1 - beta1) g``;
    ``exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) mean_K(g**2)``;
    ``p <- (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)`` with the usual bias corrections.
    A pair of second moments (row averages ``r``, column averages ``c``) stands for ``r c / mean(r)``. One in codes is
    used as it is computed, and rounded at random where it is stored.

    Args:
        entries: The tensors, of any shapes; the step counts include this step.
        hyper: Hyperparameters.
    """
    for entry in entries:
        param, grad, exp_avg, parts, maxima, step, dims, seed, _, precomputed = entry
        grad = scale_grad(grad, hyper.clip_factor)
        grad = -grad if hyper.maximize else grad
        if param.is_complex():
            param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
            parts, maxima = [[torch.view_as_real(part) for part in moments] for moments in (parts, maxima)]
        rounds = hyper.stochastic_round and param.dtype == torch.bfloat16
        target = param.float() if rounds else param
        coded = update_codes(entry, grad, hyper.beta2) if is_coded(parts[0]) else None

        # weight decay
        if isinstance(hyper.weight_decay, Tensor) or hyper.weight_decay != 0:
            target.mul_(1 - hyper.lr * hyper.weight_decay)

        # first and second moment
        update_first_moment(exp_avg, grad, hyper.beta1)
        used = parts
        if coded is not None:
            used = [coded]
        elif not precomputed:
            update_second_moment(parts, grad, dims, hyper.beta2)
            used = update_maxima(maxima, parts, hyper.differentiable) if hyper.amsgrad else parts

        # update
        if hyper.keeps_tensors(step):
            if hyper.differentiable:  # what autograd saves must survive the next step's in-place updates
                step, exp_avg, used = step.clone(), exp_avg.clone(), [part.clone() for part in used]
            negative_step_size = hyper.lr / (1 - hyper.beta1**step) * -1
            scale = (1 - hyper.beta2**step) ** 0.5 * negative_step_size
            denominator = (reconstruct(used, dims, precomputed).sqrt() / scale).add_(hyper.eps / negative_step_size)
            target.addcdiv_(exp_avg, denominator)
        else:
            step_size, root = hyper.bias_corrections(step)
            denominator = (reconstruct(used, dims, precomputed).sqrt() / root).add_(hyper.eps)
            target.addcdiv_(exp_avg, denominator, value=-step_size)
        if rounds:
            param.copy_(_stochastic_round(target, seed))


def scale_grad(grad: Tensor, factor: Tensor | None) -> Tensor:
    """Return a gradient times a factor in at least float32, or as it is without one.

    Args:
        grad: The gradient.
        factor: The factor that clips it, 0-dimensional.
    """
    if factor is None:
        return grad
    wide = grad.to(second_moment_dtype(grad.dtype))
    return (wide * factor.to(wide.device)).to(wide.dtype)  # a scalar may have become wider


def update_first_moment(exp_avg: Tensor, grad: Tensor, beta1: Scalar) -> None:
    """Compute ``exp_avg <- beta1 exp_avg + (1 - beta1) grad`` in the wider of both precisions.

    Args:
        exp_avg: The first moment, updated in place.
        grad: The gradient.
        beta1: Decay of the first moment.
    """
    weight = 1 - beta1
    wide = torch.promote_types(exp_avg.dtype, grad.dtype)
    if isinstance(weight, Tensor):
        weight = weight.to(device=grad.device, dtype=wide)
    if exp_avg.dtype == wide:
        exp_avg.lerp_(grad.to(wide), weight)
    else:
        exp_avg.copy_(torch.lerp(exp_avg.to(wide), grad.to(wide), weight))


def update_second_moment(parts: Sequence[Tensor], grad: Tensor, averaged_dims: Sequence[Dims], beta2: Scalar) -> None:
    """Compute ``part <- beta2 part + (1 - beta2) mean_K(grad**2)`` for each part of a second moment.

    Args:
        parts: The tensors of the second moment, updated in place.
        grad: The gradient.
        averaged_dims: For each part the dimensions it is averaged over.
        beta2: Decay of the second moment.
    """
    for part, dims in zip(parts, averaged_dims, strict=True):
        wide = grad.to(part.dtype)
        if isinstance(beta2, Tensor) and beta2.requires_grad:
            part.lerp_(mean_square(wide, dims), (1 - beta2).to(part.dtype))
        elif dims:
            part.mul_(beta2).add_(mean_square(wide, dims), alpha=cast(float, 1 - beta2))
        else:
            part.mul_(beta2).addcmul_(wide, wide, value=cast(float, 1 - beta2))


def update_codes(entry: Entry, grad: Tensor, beta2: Scalar) -> Tensor:
    """Update a second moment in codes; return it as it was before it was rounded.

    Args:
        entry: The parameter's tensors before the step.
        grad: The gradient, scaled.
        beta2: Decay of the second moment.
    """
    (codes,) = entry.exp_avg_sq
    value = decode(codes).to(second_moment_dtype(grad.dtype))
    update_second_moment([value], grad, ((),), beta2)
    codes.copy_(encode(value, entry.param, entry.step))
    return value


def mean_square(grad: Tensor, dims: Dims) -> Tensor:
    """Return the mean of ``grad**2``.

    Args:
        grad: The gradient.
        dims: The dimensions to average over, kept with size 1; empty ones average nothing.
    """
    squared = grad.square()
    return squared.mean(dims, keepdim=True) if dims else squared


def update_maxima(maxima: Sequence[Tensor], parts: Sequence[Tensor], differentiable: bool = False) -> Sequence[Tensor]:
    """Compute ``maximum <- max(maximum, part)`` and return the maxima.

    Args:
        maxima: Running maxima of amsgrad, updated in place.
        parts: The second moments.
        differentiable: Let autograd follow.
    """
    for maximum, part in zip(maxima, parts, strict=True):
        maximum.copy_(torch.maximum(maximum.clone() if differentiable else maximum, part))
    return maxima


def reconstruct(parts: Sequence[Tensor], averaged_dims: Sequence[Dims], is_relative: bool = False) -> Tensor:
    """Return the second moment that stored tensors stand for, broadcastable to the parameter.

    For row and column averages that is ``r c / mean(r)`` (arXiv 1804.04235, equation 4), zero where all rows are zero.

    Args:
        parts: The stored tensors.
        averaged_dims: For each the dimensions it is averaged over; the column averages' are those of the rows.
        is_relative: The rows are ``r / mean(r)`` already.
    """
    if len(parts) == 1:
        return parts[0]
    rows, columns = parts
    return (rows if is_relative else relative_rows(rows, averaged_dims[1])) * columns


def relative_rows(rows: Tensor, dims: Dims) -> Tensor:
    """Return row averages over their mean, ``r / mean(r)``; zero where all are zero.

    Args:
        rows: The row averages.
        dims: The dimension along which the rows lie.
    """
    return rows / rows.mean(dims, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _stochastic_round(value: Tensor, seed: int) -> Tensor:
    """Return float32 rounded to bfloat16, up or down at random so that the expectation is the value."""
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def initial_second_moment(grad: Tensor, dims: Dims) -> Tensor:
    """Return the gradient-initialised second moment ``mean_K(g_1**2)`` (GI-Adam, arXiv 2406.09405).

    Args:
        grad: The first gradient.
        dims: The dimensions to average over.
    """
    wide = grad.to(second_moment_dtype(grad.dtype))
    if wide.is_complex():
        return torch.view_as_complex(mean_square(torch.view_as_real(wide), dims))
    return mean_square(wide, dims)
