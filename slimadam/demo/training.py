"""Calibrate, then train with AdamW and with SlimAdam, side by side on the same batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimadam.demo.data import ByteData
from slimadam.demo.model import ByteGPT
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import SNRRecorder, every
from slimadam.optim.slimadam import SlimAdam
from slimadam.plans.plan import CompressionPlan

Phase = Literal["calibration", "AdamW", "SlimAdam", "SlimAdam, best form"]
Progress = Callable[[Phase, int, float], None]
"""Called after each step with the phase, the step (from 1) and the loss of its batch."""


@dataclass(frozen=True)
class DemoSettings:
    """The model of the demo, its text windows and its training.

    Over the share ``warmup`` of the steps the learning rate rises to ``lr``, then it falls as a cosine to the share
    ``final_lr`` of it. Calibration has as many steps unless ``calibration_steps`` says otherwise; after the same
    warmup its rate stays at the share ``calibration_lr_factor`` of ``lr``. It measures the SNR ``measurements`` times,
    training computes ``evaluations`` losses on held-out windows. A window has ``context`` bytes.

    Raises:
        ValueError: A setting is out of range.
    """

    steps: int = 400
    width: int = 128
    layers: int = 4
    lr: float = 1e-3
    seed: int = 0
    heads: int = 4
    context: int = 64
    batch_size: int = 8
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.25
    final_lr: float = 0.0
    calibration_steps: int | None = None
    calibration_lr_factor: float = 0.1
    measurements: int = 8
    evaluations: int = 5
    held_out_windows: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "width", "layers", "heads", "context", "batch_size", "measurements",
                     "evaluations", "held_out_windows"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of the {self.heads} attention heads")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a positive number")

    def new_model(self) -> ByteGPT:
        """Return the model at its initialisation: the same numbers each time."""
        torch.manual_seed(self.seed)
        return ByteGPT(self.layers, self.width, self.heads, self.context)


class DivergedError(ArithmeticError):
    """A loss was no longer finite; the message says where and what to try."""


@dataclass(eq=False)
class Trainee:
    """A model in training, its optimizer and the measurements of its run.

    Losses are in nats per byte: of each step's batch, and by step on the held-out windows. Durations are in
    milliseconds: of each ``optimizer.step()``, and of each full step with forward and backward.
    """

    phase: Phase
    model: ByteGPT
    optimizer: Optimizer
    progress: Progress
    train_losses: list[float] = field(default_factory=list)
    held_out_losses: dict[int, float] = field(default_factory=dict)
    optimizer_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return len(self.train_losses)

    @property
    def held_out_loss(self) -> float:
        """The held-out loss after the last step."""
        return self.held_out_losses[max(self.held_out_losses)]

    @property
    def second_moment_bytes(self) -> int:
        """Bytes of the optimizer's state under keys that begin with ``exp_avg_sq``."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for key, value in state.items() if key.startswith("exp_avg_sq"))

    @property
    def state_bytes(self) -> int:
        """Bytes of all of the optimizer's state."""
        return sum(value.nbytes for state in self.optimizer.state.values() for value in state.values())

    def step(self, batch: tuple[Tensor, Tensor], lr: float) -> None:
        """Train for one step and time it.

        Args:
            batch: Inputs and targets.
            lr: Learning rate of the step.

        Raises:
            DivergedError: The loss is infinite or NaN.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model.loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        before_update = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer_ms.append((end - before_update) * 1e3)
        self.step_ms.append((end - start) * 1e3)
        self.train_losses.append(loss.item())
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss became {loss.item()} at step {self.steps} of {self.phase} with lr={lr:g}; "
                "choose a smaller learning rate"
            )
        self.progress(self.phase, self.steps, loss.item())


@dataclass(frozen=True)
class DemoResult:
    """The calibration and the three training runs: with AdamW, with ``plan`` and with ``best_plan``.

    In ``best_plan`` row and column averages compete with plain averages (``forms="best"``).
    """

    settings: DemoSettings
    history: SNRHistory
    plan: CompressionPlan
    best_plan: CompressionPlan
    adamw: Trainee
    slimadam: Trainee
    best: Trainee

    def gap_of(self, run: Trainee) -> float:
        """Return how much higher a run's held-out loss is, as a share of AdamW's."""
        return run.held_out_loss / self.adamw.held_out_loss - 1

    @property
    def second_moments_saved(self) -> float:
        """Share of AdamW's second-moment bytes that SlimAdam does without."""
        return 1 - self.slimadam.second_moment_bytes / self.adamw.second_moment_bytes


def run_demo(settings: DemoSettings, data: ByteData, progress: Progress) -> DemoResult:
    """Calibrate, then train with AdamW and two plans from the same initialisation on the same batches.

    The runs alternate step by step, so that whatever else the machine does slows all alike.

    Args:
        settings: Model and training.
        data: Text to train on.
        progress: Called after each step.

    Raises:
        DivergedError: A loss was no longer finite.
    """
    history = calibrate(settings, data, progress)
    plan, best_plan = CompressionPlan.from_snr(history), CompressionPlan.from_snr(history, forms="best")
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas}
    first, second, third = (settings.new_model() for _ in range(3))
    adamw = Trainee("AdamW", first, torch.optim.AdamW(first.named_parameters(), **options), progress)
    slim = Trainee("SlimAdam", second, SlimAdam(second, plan=plan, **options), progress)
    best = Trainee("SlimAdam, best form", third, SlimAdam(third, plan=best_plan, **options), progress)
    train(settings, data, (adamw, slim, best))
    return DemoResult(settings, history, plan, best_plan, adamw, slim, best)


def calibrate(settings: DemoSettings, data: ByteData, progress: Progress) -> SNRHistory:
    """Train with AdamW at a small learning rate and measure the SNR of its second moments on the way.

    Args:
        settings: Model and training.
        data: Text to train on; the batches are those of the training runs.
        progress: Called after each step.
    """
    steps = settings.calibration_steps or settings.steps
    model = settings.new_model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=settings.lr, betas=settings.betas)
    recorder = SNRRecorder(optimizer, model, every(max(1, steps // settings.measurements)))
    trainee = Trainee("calibration", model, optimizer, progress)
    for batch in data.batches(steps, settings.batch_size, settings.context, settings.seed):
        warmed_up = min(1.0, (trainee.steps + 1) / max(1, round(settings.warmup * steps)))
        trainee.step(batch, settings.lr * settings.calibration_lr_factor * warmed_up)
    recorder.detach()
    return recorder.history


def train(settings: DemoSettings, data: ByteData, trainees: Sequence[Trainee]) -> None:
    """Train all on the same batches, in turn, and evaluate them on the same held-out windows.

    Args:
        settings: Steps, batches and learning rates.
        data: Text to train on.
        trainees: The models.
    """
    windows = data.held_out_windows(settings.held_out_windows, settings.context)
    held_out = list(zip(*(torch.split(part, settings.batch_size) for part in windows), strict=True))
    interval = max(1, settings.steps // settings.evaluations)
    batches = data.batches(settings.steps, settings.batch_size, settings.context, settings.seed)
    for step, batch in enumerate(batches, start=1):
        for trainee in trainees:
            trainee.step(batch, learning_rate(settings, step))
            if step % interval == 0 or step == settings.steps:
                with torch.no_grad():
                    total = sum(trainee.model.loss(*part).item() * len(part[0]) for part in held_out)
                trainee.held_out_losses[step] = total / len(windows[0])


def learning_rate(settings: DemoSettings, step: int) -> float:
    """Return the training rate at a step: a linear warmup, then a cosine.

    Args:
        settings: Peak, warmup and end.
        step: The step, from 1.
    """
    warmup = max(1, round(settings.warmup * settings.steps))
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / (settings.steps - warmup)
    floor = settings.final_lr
    return settings.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
