"""Training runs of the calibration studies: each is done once, and its figures stay on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.calibration.statistics import Measurements, Recorder
from benchmarks.workloads.language import Bytes, byte_gpt, byte_gpt_as_torch_initialises, byte_lstm
from benchmarks.workloads.training import Rate, Workload, calibration_rate, held_out_loss, train, training_rate
from benchmarks.workloads.vision import Digits, resnet, vit
from benchmarks.workloads.vocabulary import Words
from slimadam import AutoPlan, CompressionPlan, SlimAdam
from slimadam.measurement.recorder import every

SNR_INTERVAL = 10
"""Divides every interval at which AutoPlan measures in the lengths compared, so that its plans can be computed."""
CHANGE_MEASUREMENTS = 8

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "byte GPT": lambda: Bytes(byte_gpt),
    "byte GPT, torch's initialisation": lambda: Bytes(byte_gpt_as_torch_initialises),
    "byte GPT, torch's betas": lambda: Bytes(byte_gpt, betas=(0.9, 0.999)),
    "byte LSTM": lambda: Bytes(byte_lstm),
    "word GPT": lambda: Words(4096),
    "word GPT, 256 words": lambda: Words(256),
    "digits ViT": lambda: Digits(vit),
    "digits ResNet": lambda: Digits(resnet),
}


@cache
def workload(name: str) -> Workload:
    """Return the workload of that name, its data read once."""
    return WORKLOADS[name]()


@dataclass(frozen=True)
class Setting:
    """The initialisation, batches and schedule that compared runs have in common.

    Attributes:
        workload: A key of :data:`WORKLOADS`.
        lr: Peak learning rate.
        steps: Optimizer steps.
        seed: Seed of the initialisation and the batches.
    """

    workload: str
    lr: float
    steps: int
    seed: int

    def __str__(self) -> str:
        return f"{self.workload}, lr {self.lr:g}, {self.steps} steps, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """Settings that the calibration studies cover.

    Attributes:
        seeds: Seeds of initialisation and batches.
        learning_rates: Peak learning rates of each workload that is compressed in several ways.
        steps: Optimizer steps of a run.
        long_steps: Optimizer steps of the longer runs.
        long_workloads: Workloads that have longer runs, at the first two learning rates.
        automatic_workload: Workload in which AutoPlan decides by itself, at the first two learning rates.
        automatic_steps: Numbers of steps after which it does.
        finding_rates: Peak learning rates at which the paper's findings are looked for, the smallest first.
        swept_rates: Learning rates at which the SNR is measured to see whether it falls.
        compared_steps: Numbers of steps after which its choice is compared with that of the whole run.
    """

    seeds: tuple[int, ...]
    learning_rates: Mapping[str, tuple[float, ...]]
    steps: int
    long_steps: int
    long_workloads: tuple[str, ...]
    automatic_workload: str
    automatic_steps: tuple[int, ...]
    finding_rates: tuple[float, ...]
    swept_rates: tuple[float, ...]
    compared_steps: tuple[int, ...]

    def short_settings(self) -> Iterator[Setting]:
        """Yield every workload, learning rate and seed."""
        for seed in self.seeds:
            for name, rates in self.learning_rates.items():
                for lr in rates:
                    yield Setting(name, lr, self.steps, seed)

    def long_settings(self) -> Iterator[Setting]:
        """Yield the settings of the longer runs."""
        for setting in self.short_settings():
            if setting.workload in self.long_workloads and setting.lr in self.learning_rates[setting.workload][:2]:
                yield replace(setting, steps=self.long_steps)

    def automatic_settings(self) -> Iterator[Setting]:
        """Yield the settings in which AutoPlan decides by itself."""
        for setting in self.short_settings():
            if setting.workload == self.automatic_workload and setting.lr in self._rates(setting):
                yield setting

    def _rates(self, setting: Setting) -> tuple[float, ...]:
        return self.learning_rates[setting.workload][:2]


FULL = Grid(
    seeds=(0, 1, 2),
    learning_rates={"byte GPT": (1e-3, 3e-3), "byte LSTM": (1e-3, 3e-3, 1e-2, 3e-2), "word GPT": (1e-3, 3e-3)},
    steps=400,
    long_steps=1200,
    long_workloads=("byte GPT", "byte LSTM"),
    automatic_workload="byte GPT",
    automatic_steps=(50, 100, 200),
    finding_rates=(1e-3, 3e-3),
    swept_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    compared_steps=(40, 80, 120, 160, 200, 280, 400),
)


QUICK = Grid(
    seeds=(0,),
    learning_rates={"digits ResNet": (1e-3,), "digits ViT": (1e-3,)},
    steps=3,
    long_steps=4,
    long_workloads=("digits ResNet",),
    automatic_workload="digits ResNet",
    automatic_steps=(1, 2),
    finding_rates=(1e-3,),
    swept_rates=(1e-3, 1e-2),
    compared_steps=(2, 3),
)


@dataclass(frozen=True)
class Outcome:
    """Figures at the end of a run.

    Attributes:
        held_out_loss: Nats per target after the last step.
        second_moments_saved: Share of AdamW's second-moment elements that it did without.
        seconds: Duration of the run.
    """

    held_out_loss: float
    second_moments_saved: float
    seconds: float


class UnfinishedError(Exception):
    """A run is not on disk and was not to be done."""


class Runs:
    """The runs on disk, and the means to add to them.

    Args:
        folder: Folder of the finished runs.
        held_out_batches: Compute the held-out loss on only so many batches.
        may_train: Do what is missing. Otherwise whatever needs it raises :class:`UnfinishedError`.
    """

    def __init__(self, folder: Path, *, held_out_batches: int | None = None, may_train: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._held_out_batches = held_out_batches
        self._may_train = may_train
        self._log = folder / "runs.jsonl"
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.exists() else []
        self._done: dict[str, dict[str, Any]] = {line["run"]: line for line in map(json.loads, lines)}

    def adamw(self, setting: Setting) -> Outcome:
        """Return the outcome of AdamW, measured on the way."""
        return self._measured(setting, "AdamW", training_rate(setting.lr, setting.steps))

    def perturbed(self, setting: Setting) -> Outcome:
        """Return the outcome of AdamW from an initialisation that differs in the sixth digit."""
        return self._outcome(setting, "AdamW, perturbed", _adamw(setting), perturbation=1e-6)

    def other_batches(self, setting: Setting) -> Outcome:
        """Return the outcome of AdamW from the same initialisation on other batches."""
        return self._outcome(setting, "AdamW, other batches", _adamw(setting), batch_seed=setting.seed + 1000)

    def compressed(self, setting: Setting, plan: CompressionPlan) -> Outcome:
        """Return the outcome of SlimAdam with a plan; plans with the same forms share a run.

        Args:
            setting: Initialisation, batches and schedule.
            plan: Plan of the optimizer.
        """
        forms = {name: (rule.form, rule.dims) for name, rule in plan.items()}
        digest = hashlib.sha256(repr(forms).encode()).hexdigest()[:16]
        return self._outcome(setting, f"plan {digest}", _slimadam(setting, plan))

    def automatic(self, setting: Setting, plan: AutoPlan) -> Outcome:
        """Return the outcome of SlimAdam with a plan that it decides while it trains.

        Args:
            setting: Initialisation, batches and schedule.
            plan: How the optimizer measures and decides.
        """
        label = (
            f"AutoPlan, {plan.calibration_steps} steps, {plan.measurements} measurements, forms {plan.forms}, "
            f"cutoff {plan.cutoff:g}"
        )
        return self._outcome(setting, label, _slimadam(setting, plan))

    def calibration(self, setting: Setting) -> Measurements:
        """Return the measurements of the demo's calibration, at a tenth of the learning rate."""
        self._measured(setting, "calibration", calibration_rate(setting.lr, setting.steps))
        return Measurements.load(self._measurements_path(setting, "calibration"))

    def measurements(self, setting: Setting) -> Measurements:
        """Return the measurements of :meth:`adamw`, at the full learning rate."""
        self.adamw(setting)
        return Measurements.load(self._measurements_path(setting, "AdamW"))

    def _measured(self, setting: Setting, label: str, rate: Rate) -> Outcome:
        recorders: list[Recorder] = []

        def make(model: nn.Module) -> Optimizer:
            optimizer = _adamw(setting)(model)
            changes = every(max(1, setting.steps // CHANGE_MEASUREMENTS))
            interval = min(SNR_INTERVAL, max(1, setting.steps // CHANGE_MEASUREMENTS))
            recorders.append(Recorder(optimizer, model, every(interval), changes))
            return optimizer

        path = self._measurements_path(setting, label)
        return self._outcome(setting, label, make, rate, lambda: recorders[0].measurements.save(path))

    def _outcome(
        self,
        setting: Setting,
        label: str,
        make_optimizer: Callable[[nn.Module], Optimizer],
        rate: Rate | None = None,
        finish: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> Outcome:
        key = f"{setting}: {label}"
        if key not in self._done:
            if not self._may_train:
                raise UnfinishedError(key)
            start = time.perf_counter()
            task = workload(setting.workload)
            rate = rate or training_rate(setting.lr, setting.steps)
            model, optimizer = train(task, make_optimizer, rate, setting.steps, setting.seed, **options)
            finish()
            loss = held_out_loss(task, model, self._held_out_batches)
            outcome = Outcome(loss, _saved(optimizer), time.perf_counter() - start)
            self._add({"run": key, **asdict(outcome)})
            print(f"{outcome.seconds:5.1f} s  {outcome.held_out_loss:.4f}  {key}", flush=True)
        done = self._done[key]
        return Outcome(done["held_out_loss"], done["second_moments_saved"], done["seconds"])

    def _add(self, line: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._done[line["run"]] = line

    def _measurements_path(self, setting: Setting, label: str) -> Path:
        return self._folder / f"{setting}, {label}.json"


def _adamw(setting: Setting) -> Callable[[nn.Module], Optimizer]:
    betas = workload(setting.workload).betas
    return lambda model: torch.optim.AdamW(model.named_parameters(), lr=setting.lr, betas=betas)


def _slimadam(setting: Setting, plan: CompressionPlan | AutoPlan) -> Callable[[nn.Module], Optimizer]:
    betas = workload(setting.workload).betas
    return lambda model: SlimAdam(model, lr=setting.lr, betas=betas, plan=plan)


def _saved(optimizer: Optimizer) -> float:
    return optimizer.memory().second_moments_saved if isinstance(optimizer, SlimAdam) else 0.0
