"""Calibration in one call: trains for a while, measures the SNR and chooses a plan.

Source: arXiv 2503.01843.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from slimadam.layers.splits import Split
from slimadam.measurement.recorder import Schedule, SNRRecorder, paper_schedule
from slimadam.measurement.snr import check_count
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms


def calibrate(
    model: nn.Module,
    train_step: Callable[[], Tensor],
    steps: int = 500,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    cutoff: float = 1.0,
    budget: float | None = None,
    forms: Forms = "closest",
    keep: Iterable[str] = (),
    parts: Mapping[str, Split] | None = None,
    schedule: Schedule = paper_schedule,
    on_step: Callable[[int], None] | None = None,
) -> CompressionPlan:
    """Train for a while with AdamW, measure, and choose a plan. The model is restored at the end.

    Args:
        model: The model to calibrate; its parameters, buffers, gradients and modes are restored.
        train_step: Computes the loss of the next batch; called once a step, takes no arguments and returns a
            scalar tensor to call ``backward()`` on.
        steps: Optimizer steps to run.
        lr: Learning rate; about a tenth of the one you will train with, as arXiv 2503.01843 recommends: it finds that
            the SNR falls with the rate, and that rules found at a small rate hold at a large one.
        betas: As in AdamW.
        weight_decay: As in AdamW.
        cutoff: As in :meth:`CompressionPlan.from_snr`.
        budget: As in :meth:`CompressionPlan.from_snr`.
        forms: As in :meth:`CompressionPlan.from_snr`; ``"mean"`` is the paper exactly.
        keep: As in :meth:`CompressionPlan.from_snr`.
        parts: As in :class:`SNRRecorder`.
        schedule: As in :class:`SNRRecorder`.
        on_step: Called after each step with its number, for progress bars.

    Raises:
        ValueError: ``steps`` is not positive.
        TypeError: ``train_step`` did not return a scalar tensor.
    """
    check_count("steps", steps, 1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
    recorder = SNRRecorder(optimizer, model, schedule, parts=parts)
    restore = _snapshot(model)
    try:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = train_step()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise TypeError(f"train_step must return the loss as a scalar tensor, not {loss!r}")
            torch.autograd.backward(loss)
            optimizer.step()
            if on_step is not None:
                on_step(step)
    finally:
        recorder.detach()
        restore()
    return CompressionPlan.from_snr(recorder.history, cutoff, budget=budget, forms=forms, keep=keep)


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts parameters, buffers, gradients and modes back as they are now."""
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in values:
            tensor.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training

    return restore
