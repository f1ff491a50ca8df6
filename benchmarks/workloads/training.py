"""Training a workload: a model, batches that a seed decides, and a held-out loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from slimadam import CompressionPlan, SlimAdam, SNRHistory, SNRRecorder, Split, every
from slimadam.demo.training import DemoSettings, learning_rate

Batch = tuple[Tensor, Tensor]
Rate = Callable[[int], float]
"""The learning rate at an optimizer step (from 1)."""
_HELD_OUT_BATCH = 64
_MEASUREMENTS = 8


class Workload(Protocol):
    """Data and model that can be trained.

    Attributes:
        betas: Decay rates of both moments.
    """

    betas: tuple[float, float]

    def new_model(self, seed: int) -> nn.Module:
        """Return a model at the initialisation that the seed decides."""

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Yield batches of inputs and targets, the same ones for the same seed.

        Args:
            steps: Number of batches.
            seed: Seed of the data's order.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of a batch in nats.

        Args:
            model: Model of the workload.
            batch: Inputs and targets.
        """

    def held_out(self) -> Iterator[Batch]:
        """Yield all that the model never trains on, in batches."""


def train(
    workload: Workload,
    make_optimizer: Callable[[nn.Module], Optimizer],
    rate: Rate,
    steps: int,
    seed: int,
    *,
    batch_seed: int | None = None,
    perturbation: float = 0.0,
    max_norm: float | None = None,
) -> tuple[nn.Module, Optimizer]:
    """Train for ``steps``.

    Args:
        workload: Data and model.
        make_optimizer: Makes the optimizer of the new model.
        rate: The learning rate of each step.
        steps: Optimizer steps.
        seed: Seed of the initialisation and of the batches.
        batch_seed: Another seed for the batches.
        perturbation: Relative size of random changes to the initialisation.
        max_norm: Norm to which the gradient of each step is clipped; None: it is not.
    """
    model = workload.new_model(seed)
    _perturb(model, perturbation)
    optimizer = make_optimizer(model)
    for step, batch in enumerate(workload.batches(steps, seed if batch_seed is None else batch_seed), start=1):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # as torchao wants it
                group["lr"].fill_(rate(step))
            else:
                group["lr"] = rate(step)
        optimizer.zero_grad()
        torch.autograd.backward(workload.loss(model, batch))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model, optimizer


def in_batches(inputs: Tensor, targets: Tensor) -> Iterator[Batch]:
    """Yield everything in its order, a few at a time.

    Args:
        inputs: Inputs.
        targets: Targets, as many.
    """
    for start in range(0, len(inputs), _HELD_OUT_BATCH):
        batch = slice(start, start + _HELD_OUT_BATCH)
        yield inputs[batch], targets[batch]


def random_batches(inputs: Tensor, targets: Tensor, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """Yield batches of random examples.

    Args:
        inputs: Inputs.
        targets: Targets, as many.
        size: Examples of a batch.
        steps: Number of batches.
        seed: Seed of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(targets), (size,), generator=generator)
        yield inputs[chosen], targets[chosen]


class PredictsNext:
    """The loss of workloads whose model says what comes next at each place of a sequence."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of what comes next, in nats.

        Args:
            model: Language model.
            batch: Inputs and targets.
        """
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@torch.no_grad()
def held_out_loss(workload: Workload, model: nn.Module, batches: int | None = None) -> float:
    """Return the mean cross-entropy in nats over all that is held out, or over a first part of it.

    Args:
        workload: Data and loss.
        model: The trained model.
        batches: Number of batches; None for all.
    """
    model.eval()
    total, targets = 0.0, 0
    for batch in itertools.islice(workload.held_out(), batches):
        total += workload.loss(model, batch).item() * batch[1].numel()
        targets += batch[1].numel()
    return total / targets


def training_rate(lr: float, steps: int) -> Rate:
    """Return the demo's schedule: a linear warmup over a quarter of the steps, then a cosine to zero.

    Args:
        lr: Peak learning rate.
        steps: Number of steps.
    """
    settings = DemoSettings(lr=lr, steps=steps)
    return lambda step: learning_rate(settings, step)


def calibration_rate(lr: float, steps: int) -> Rate:
    """Return the schedule of the demo's calibration: a tenth of ``lr`` after the same warmup.

    Args:
        lr: Peak learning rate of the training.
        steps: Number of steps.
    """
    settings = DemoSettings(lr=lr, steps=steps)
    warmup = max(1, round(settings.warmup * steps))
    return lambda step: lr * settings.calibration_lr_factor * min(1.0, step / warmup)


def recorded(
    workload: Workload, lr: float, steps: int, seed: int, readings: Mapping[str, Mapping[str, Split]]
) -> dict[str, SNRHistory]:
    """Measure second moments in one run of AdamW at a tenth of the learning rate.

    Args:
        workload: Data and model.
        lr: Peak learning rate of the training.
        steps: Optimizer steps.
        seed: Seed of the initialisation and the batches.
        readings: By label, the parts in which parameters are read, as of :class:`slimadam.SNRRecorder`.
    """
    recorders = {}

    def make(model: nn.Module) -> Optimizer:
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=lr, betas=workload.betas)
        interval = every(max(1, steps // _MEASUREMENTS))
        for label, parts in readings.items():
            recorders[label] = SNRRecorder(optimizer, model, interval, parts=parts)
        return optimizer

    train(workload, make, calibration_rate(lr, steps), steps, seed)
    return {label: recorder.history for label, recorder in recorders.items()}


def loss_with(workload: Workload, plan: CompressionPlan | None, lr: float, steps: int, seed: int) -> float:
    """Train, and return the held-out loss.

    Args:
        workload: Data and model.
        plan: Plan of SlimAdam; None for AdamW.
        lr: Peak learning rate.
        steps: Optimizer steps.
        seed: Seed of the initialisation and the batches.
    """

    def make(model: nn.Module) -> Optimizer:
        if plan is None:
            return torch.optim.AdamW(model.parameters(), lr=lr, betas=workload.betas)
        return SlimAdam(model, lr=lr, betas=workload.betas, plan=plan)

    return held_out_loss(workload, train(workload, make, training_rate(lr, steps), steps, seed)[0])


@torch.no_grad()
def _perturb(model: nn.Module, size: float) -> None:
    for parameter in model.parameters():
        parameter.mul_(1 + size * torch.randn_like(parameter))
