"""Training with and without warmup, at many learning rates: the runs behind ``python -m benchmarks.warmup``."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from benchmarks.workloads.language import Bytes, byte_gpt
from benchmarks.workloads.training import Batch, Workload
from benchmarks.workloads.vision import CLASSES, Digits
from slimadam import CatapultWarmup, SlimAdam, critical_lr
from slimadam.demo.training import DemoSettings

BETAS = (0.9, 0.999)
CRITICAL_BATCHES = 4
_LAST = 0.1
"""Share of the steps over whose losses the final loss is the mean."""
_ALMOST_ZERO = 1e-9


def _mlp() -> nn.Module:
    widths = (64, 128, 128, 128, CLASSES)
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layer = nn.Linear(fan_in, fan_out)
        nn.init.normal_(layer.weight, std=2 * math.sqrt(2 / fan_in))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DigitsMLP(Digits):
    """Four layers of width 128 on 8 x 8 digits, initialised at twice the scale of He: very sharp in the beginning."""

    def __init__(self) -> None:
        super().__init__(_mlp)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the class in nats.

        Args:
            model: The classifier.
            batch: Images and labels.
        """
        return F.cross_entropy(model(batch[0]), batch[1])


class SmallByteGPT(Bytes):
    """The demo's model and data with 2 layers of width 32, windows of 32 bytes, 16 in a batch."""

    def __init__(self) -> None:
        super().__init__(byte_gpt, BETAS)
        self._settings = DemoSettings(layers=2, width=32, heads=2, context=32, batch_size=16)


WORKLOADS: dict[str, Workload] = {"digits MLP": DigitsMLP(), "byte GPT": SmallByteGPT()}


@dataclass(frozen=True)
class Method:
    """A column of the phase diagram.

    Attributes:
        name: Label of the warmup.
        warmup: Steps of plain warmup, which fix its slope; 0 for none.
        catapult: Start the warmup at the critical learning rate.
        variance_init: Option of SlimAdam.
    """

    name: str
    warmup: int = 0
    catapult: bool = False
    variance_init: str = "zeros"

    @property
    def label(self) -> str:
        """Return the name with the warmup's length."""
        return f"{self.name} {self.warmup}" if self.warmup else self.name


@dataclass(frozen=True)
class Study:
    """Runs of the study.

    Attributes:
        steps: Optimizer steps of each run: warmup, then a cosine to zero.
        warmups: Lengths of the plain warmup.
        rates: Target learning rates.
        seeds: Seeds of initialisation and batches.
        workloads: Names of models.
    """

    steps: int = 200
    warmups: tuple[int, ...] = (16, 64)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    workloads: tuple[str, ...] = tuple(WORKLOADS)

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """Return the columns of the table."""
        return (
            Method("no warmup"),
            *(Method("linear", warmup) for warmup in self.warmups),
            *(Method("catapult", warmup, catapult=True) for warmup in self.warmups),
            Method("GI-Adam", variance_init="gradient"),
            *(Method("GI-Adam, linear", warmup, variance_init="gradient") for warmup in self.warmups),
        )


@dataclass(frozen=True)
class Run:
    """Figures of one run.

    Attributes:
        final_loss: Mean over the last tenth of the steps, in nats; infinite where the loss was not finite.
        reached: The first step (from 0) that was taken at the target; None for runs without warmup.
    """

    final_loss: float
    reached: int | None


@dataclass
class Runs:
    """All runs of a study on one workload.

    Attributes:
        study: The runs.
        workload: The model's name.
        critical: The critical learning rate at initialisation by seed: the smallest of a few batches.
        runs: By method's label, rate and seed.
    """

    study: Study
    workload: str
    critical: dict[int, float] = field(default_factory=dict)
    runs: dict[tuple[str, float, int], Run] = field(default_factory=dict)

    def run(self) -> Runs:
        """Run everything."""
        model = WORKLOADS[self.workload]
        for seed in self.study.seeds:
            self.critical[seed] = initial_critical_lr(model, seed, "zeros")
            for method in self.study.methods:
                for rate in self.study.rates:
                    key = (method.label, rate, seed)
                    self.runs[key] = train(model, method, rate, seed, self.study.steps, self.critical[seed])
        return self

    def losses(self, method: Method, rate: float) -> list[float]:
        """Return the final loss of each seed.

        Args:
            method: Way to warm up.
            rate: Target learning rate.
        """
        return [self.runs[method.label, rate, seed].final_loss for seed in self.study.seeds]


def initial_critical_lr(workload: Workload, seed: int, variance_init: str) -> float:
    """Return the critical learning rate of the first step, the smallest of a few batches.

    Args:
        workload: Data and model.
        seed: Seed of initialisation and batches.
        variance_init: Option of :class:`slimadam.SlimAdam`.
    """
    model = workload.new_model(seed)
    return min(
        _critical_lr(workload, model, batch, variance_init) for batch in workload.batches(CRITICAL_BATCHES, seed)
    )


def _critical_lr(workload: Workload, model: nn.Module, batch: Batch, variance_init: str) -> float:
    optimizer = _optimizer(model, 1.0, variance_init)
    optimizer.zero_grad()
    torch.autograd.backward(workload.loss(model, batch))
    return critical_lr(optimizer, lambda: workload.loss(model, batch))


def train(workload: Workload, method: Method, rate: float, seed: int, steps: int, critical: float) -> Run:
    """Train one run; it ends where the loss is no longer finite.

    Args:
        workload: Data and model.
        method: With which optimizer and warmup.
        rate: The target learning rate.
        seed: Seed of initialisation and batches.
        steps: Optimizer steps.
        critical: The critical learning rate at initialisation.
    """
    model = workload.new_model(seed)
    optimizer = _optimizer(model, rate, method.variance_init)
    scheduler = _schedule(optimizer, method, steps, critical)
    losses: list[float] = []
    reached = None
    for step, batch in enumerate(workload.batches(steps, seed)):
        loss = workload.loss(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Run(math.inf, reached)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if method.warmup and reached is None and optimizer.param_groups[0]["lr"] >= rate * (1 - _ALMOST_ZERO):
            reached = step
        optimizer.step()
        scheduler.step()
    last = losses[-max(1, round(_LAST * steps)) :]
    return Run(sum(last) / len(last), reached)


def _schedule(optimizer: SlimAdam, method: Method, steps: int, critical: float) -> LRScheduler:
    """Return the method's warmup, then a cosine to zero over the rest of the steps."""
    if not method.warmup:
        return CosineAnnealingLR(optimizer, steps)
    if not method.catapult:  # LinearLR does not start at zero itself
        linear = LinearLR(optimizer, _ALMOST_ZERO, total_iters=method.warmup)
        return SequentialLR(optimizer, [linear, CosineAnnealingLR(optimizer, steps - method.warmup)], [method.warmup])
    catapult = CatapultWarmup(optimizer, method.warmup, critical_lr=critical)
    after = CosineAnnealingLR(optimizer, steps - catapult.steps)
    return SequentialLR(optimizer, [catapult, after], [catapult.steps]) if catapult.steps else after


def guessing_loss(workload: Workload, seed: int, batches: int = 200) -> float:
    """Return the loss of a guess by frequency of the classes or bytes: the entropy of the targets, in nats.

    Args:
        workload: Data.
        seed: Seed of the batches.
        batches: Number of batches that are counted.
    """
    counts: Counter[int] = Counter()
    for _, targets in workload.batches(batches, seed):
        counts.update(targets.flatten().tolist())
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def _optimizer(model: nn.Module, rate: float, variance_init: str) -> SlimAdam:
    return SlimAdam(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0, plan=None, foreach=True,
                    monitor=False, variance_init=variance_init)  # fmt: skip
