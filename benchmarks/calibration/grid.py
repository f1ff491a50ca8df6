"""What the calibration studies cover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.calibration.runs import Setting


@dataclass(frozen=True)
class Grid:
    """What the calibration studies cover.

    Attributes:
        seeds: Of initialisation and batches.
        learning_rates: Peak learning rates of each workload that is compressed in several ways.
        steps: Optimizer steps of a run.
        long_steps: Of the longer runs.
        long_workloads: Which workloads have longer runs, at the first two learning rates.
        automatic_workload: Where AutoPlan decides by itself, at the first two learning rates.
        automatic_steps: After how many steps it does.
        finding_rates: Peak learning rates at which the paper's findings are looked for, the smallest first.
        swept_rates: Learning rates at which the SNR is measured to see whether it falls.
        compared_steps: After how many steps its choice is compared with that of the whole run.
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
        """Every workload, learning rate and seed."""
        for seed in self.seeds:
            for name, rates in self.learning_rates.items():
                for lr in rates:
                    yield Setting(name, lr, self.steps, seed)

    def long_settings(self) -> Iterator[Setting]:
        """The longer runs."""
        for setting in self.short_settings():
            if setting.workload in self.long_workloads and setting.lr in self.learning_rates[setting.workload][:2]:
                yield replace(setting, steps=self.long_steps)

    def automatic_settings(self) -> Iterator[Setting]:
        """Where AutoPlan decides by itself."""
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
