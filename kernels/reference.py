"""The update, readable: the definition that every faster implementation is tested against.

Sources: AdamW (arXiv 1711.05101), compressed second moments (arXiv 2503.01843), factored second moments
(arXiv 1804.04235). With nothing compressed each operation is the one that ``torch.optim.AdamW`` performs, in
the same order, so that the results agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .interface import Dims, Entry, Hyperparameters, Scalar, second_moment_dtype


def slim_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Sequence[Tensor]],
    state_steps: list[Tensor],
    *,
    averaged_dims: list[Sequence[Dims]],
    max_exp_avg_sqs: list[Sequence[Tensor]] | None = None,
    lr: Scalar = 1e-3,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 1e-2,
    maximize: bool = False,
    capturable: bool = False,
    differentiable: bool = False,
) -> None:
    """One step of AdamW with compressed second moments, in place.

    ``exp_avg <- beta1 exp_avg + (1 - beta1) g``;
    ``exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) mean_K(g**2)``;
    ``p <- (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)`` with the usual bias corrections.
    A pair of second moments (row averages ``r``, column averages ``c``) stands for ``r c / mean(r)``.

    Args:
        params: Parameters, any shapes.
        grads: Gradients of the same shapes.
        exp_avgs: First moments of the same shapes.
        exp_avg_sqs: Per parameter one tensor with size 1 in the averaged dimensions, or two (factored).
        state_steps: 0-dimensional step counts, advanced by one.
        averaged_dims: Per parameter and second moment the averaged dimensions; ``((),)`` is plain AdamW.
        max_exp_avg_sqs: Running maxima shaped as ``exp_avg_sqs``; given them, the step is amsgrad's.
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        maximize: Ascend instead of descending.
        capturable: Keep the step count on the device.
        differentiable: Let autograd follow the step.
    """
    maxima = max_exp_avg_sqs or [()] * len(params)
    torch._foreach_add_(state_steps, 1)
    entries = map(Entry, params, grads, exp_avgs, exp_avg_sqs, maxima, state_steps, averaged_dims)
    flags = (bool(max_exp_avg_sqs), maximize, capturable, differentiable)
    reference_update(list(entries), Hyperparameters(lr, beta1, beta2, eps, weight_decay, *flags))


def reference_update(entries: Sequence[Entry], hyper: Hyperparameters) -> None:
    """Update each parameter in place, one after the other. Step counts have been advanced before."""
    for entry in entries:
        param, grad, exp_avg, parts, maxima, step, dims, seed, _, precomputed = entry
        grad = scale_grad(grad, hyper.clip_factor)
        grad = -grad if hyper.maximize else grad
        if param.is_complex():
            param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
            parts, maxima = [[torch.view_as_real(part) for part in moments] for moments in (parts, maxima)]
        rounds = hyper.stochastic_round and param.dtype == torch.bfloat16
        target = param.float() if rounds else param

        # weight decay
        if not _is_zero(hyper.weight_decay):
            target.mul_(1 - hyper.lr * hyper.weight_decay)

        # first and second moment
        update_first_moment(exp_avg, grad, hyper.beta1)
        used = parts
        if not precomputed:
            update_second_moment(parts, grad, dims, hyper.beta2)
            used = running_maximum(maxima, parts, hyper.differentiable) if hyper.amsgrad else parts

        # update
        if hyper.keeps_tensors(step):
            if hyper.differentiable:  # what autograd saves must survive the next step's in-place updates
                step, exp_avg, used = step.clone(), exp_avg.clone(), [part.clone() for part in used]
            negative_step_size = hyper.lr / (1 - hyper.beta1**step) * -1
            scale = (1 - hyper.beta2**step) ** 0.5 * negative_step_size
            denominator = (reconstruct(used, dims, precomputed).sqrt() / scale).add_(hyper.eps / negative_step_size)
            target.addcdiv_(exp_avg, denominator)
        else:
            step_size, root = bias_corrections(step, hyper)
            denominator = (reconstruct(used, dims, precomputed).sqrt() / root).add_(hyper.eps)
            target.addcdiv_(exp_avg, denominator, value=-step_size)
        if rounds:
            param.copy_(stochastic_round(target, seed))


def scale_grad(grad: Tensor, factor: Tensor | None) -> Tensor:
    """A gradient times the factor that clips it, in at least float32; without one as it is."""
    if factor is None:
        return grad
    wide = grad.to(second_moment_dtype(grad.dtype))
    return (wide * factor.to(wide.device)).to(wide.dtype)  # a scalar may have become wider


def bias_corrections(step: Tensor, hyper: Hyperparameters) -> tuple[float, float]:
    """``lr / (1 - beta1**t)`` and ``sqrt(1 - beta2**t)`` as numbers."""
    t = step.item()
    return hyper.lr / (1 - hyper.beta1**t), (1 - hyper.beta2**t) ** 0.5  # type: ignore[return-value]


def update_first_moment(exp_avg: Tensor, grad: Tensor, beta1: Scalar) -> None:
    """``exp_avg <- beta1 exp_avg + (1 - beta1) grad``, in the wider of both precisions."""
    weight = 1 - beta1
    wide = torch.promote_types(exp_avg.dtype, grad.dtype)
    if isinstance(weight, Tensor):
        weight = weight.to(device=grad.device, dtype=wide)
    if exp_avg.dtype == wide:
        exp_avg.lerp_(grad.to(wide), weight)
    else:
        exp_avg.copy_(torch.lerp(exp_avg.to(wide), grad.to(wide), weight))


def update_second_moment(parts: Sequence[Tensor], grad: Tensor, averaged_dims: Sequence[Dims], beta2: Scalar) -> None:
    """``part <- beta2 part + (1 - beta2) mean_K(grad**2)`` for each part of a second moment."""
    for part, dims in zip(parts, averaged_dims, strict=True):
        wide = grad.to(part.dtype)
        if isinstance(beta2, Tensor) and beta2.requires_grad:
            part.lerp_(mean_square(wide, dims), (1 - beta2).to(part.dtype))
        elif dims:
            part.mul_(beta2).add_(mean_square(wide, dims), alpha=cast(float, 1 - beta2))
        else:
            part.mul_(beta2).addcmul_(wide, wide, value=cast(float, 1 - beta2))


def mean_square(grad: Tensor, dims: Dims) -> Tensor:
    """Mean of ``grad**2`` over ``dims``, kept with size 1; nothing is averaged for empty ``dims``."""
    squared = grad.square()
    return squared.mean(dims, keepdim=True) if dims else squared


def running_maximum(
    maxima: Sequence[Tensor], parts: Sequence[Tensor], differentiable: bool = False
) -> Sequence[Tensor]:
    """``maximum <- max(maximum, part)``, returned."""
    for maximum, part in zip(maxima, parts, strict=True):
        maximum.copy_(torch.maximum(maximum.clone() if differentiable else maximum, part))
    return maxima


def reconstruct(parts: Sequence[Tensor], averaged_dims: Sequence[Dims], is_relative: bool = False) -> Tensor:
    """The second moment that the stored tensors stand for, broadcastable to the parameter.

    For row and column averages that is ``r c / mean(r)`` (arXiv 1804.04235, equation 4).

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
    """``r / mean(r)`` over the dimensions of the rows, zero where every row is zero."""
    return rows / rows.mean(dims, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def stochastic_round(value: Tensor, seed: int) -> Tensor:
    """float32 rounded to bfloat16, up or down at random so that the expectation is the value.

    Args:
        value: float32, any shape. NaN and infinity stay what they are.
        seed: Seed of the random bits.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def initial_second_moment(grad: Tensor, dims: Dims) -> Tensor:
    """Gradient-initialised second moment: ``mean_K(g_1**2)`` (GI-Adam, arXiv 2406.09405)."""
    wide = grad.to(second_moment_dtype(grad.dtype))
    if wide.is_complex():
        return torch.view_as_complex(mean_square(torch.view_as_real(wide), dims))
    return mean_square(wide, dims)


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0
