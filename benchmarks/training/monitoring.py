"""Does the monitor see that averaging stops holding, and what does it cost? ``python -m benchmarks.monitoring``.

Trains the demo's model under a plan calibrated as the demo does, at a constant learning rate after a warmup: once on
Python source throughout, once on another kind of bytes from half of the steps on. Bars: the monitor takes at most 1%
of the second moments saved and 0.5% of the time of training, warns in the second run and not in the first. Where it
warns, the SNR of the whole second moments, tracked beside it, is shown for comparison.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from slimadam import CompressionPlan, SlimAdam, snr
from slimadam.demo.data import ByteData, load
from slimadam.demo.training import DemoSettings, calibrate
from slimadam.measurement.monitor import SHORTEST_INTERVAL, Monitor
from slimadam.measurement.sampling import MEASUREMENTS

LARGEST_MEMORY_SHARE = 0.01
LARGEST_TIME_SHARE = 0.005
WARMUP_STEPS = 100
SHORTEST = 2 * MEASUREMENTS * SHORTEST_INTERVAL
CHANGES = ("random", "sparse", "repeated")
"""Uniformly random bytes; blanks with 2% random bytes; seven random bytes over and over."""


class Warnings(logging.Handler):
    """Collects the warnings of slimadam."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


@dataclass
class Run:
    """Figures of one training run.

    Attributes:
        losses: Loss of each step's batch, in nats per byte.
        step_seconds: Duration of each training step without the monitor.
        monitor_seconds: Duration of the monitor's part of each step.
        sampled: At each measurement, the SNR of the sample of each parameter.
        whole: That of the whole second moments at the same steps.
        warned_at: Step of the warning, if there was one.
        warning: The warning.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    monitor_seconds: list[float] = field(default_factory=list)
    sampled: list[dict[str, float]] = field(default_factory=list)
    whole: list[dict[str, float]] = field(default_factory=list)
    warned_at: int | None = None
    warning: str = ""

    @property
    def time_share(self) -> float:
        """The monitor's share of the time; both are measured in the same steps, so a busy machine slows both."""
        return sum(self.monitor_seconds) / sum(self.step_seconds)


class WholeMoments:
    """The full second moments of compressed parameters, as AdamW would keep them: the truth to compare with."""

    def __init__(self, named: dict[str, Tensor], plan: CompressionPlan, beta2: float) -> None:
        self.params = {name: param for name, param in named.items() if plan[name].form != "full"}
        self.moments = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.plan = plan
        self.beta2 = beta2

    def update(self) -> None:
        """See this step's gradients."""
        moments = list(self.moments.values())
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        torch._foreach_mul_(moments, self.beta2)
        torch._foreach_addcmul_(moments, grads, grads, 1 - self.beta2)

    def snr(self) -> dict[str, float]:
        """SNR of each under its rule."""
        return {name: snr(moment, self.plan[name].dims or "factored") for name, moment in self.moments.items()}


def other_bytes(data: ByteData, kind: str, seed: int) -> ByteData:
    """Return data of the same length and another kind.

    Args:
        data: The data, whose held-out part stays.
        kind: One of ``CHANGES``.
        seed: Seed of the random bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train)
    noise = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
    if kind == "sparse":
        rare = torch.rand(count, generator=generator) < 0.02
        noise = torch.where(rare, noise, torch.tensor(ord(" "), dtype=torch.uint8))
    elif kind == "repeated":
        noise = noise[:7].repeat(count // 7)
    return ByteData(noise, data.held_out, kind)


def train(settings: DemoSettings, plan: CompressionPlan, halves: tuple[ByteData, ByteData]) -> tuple[Run, Monitor]:
    """Train on one kind of bytes, then on the other.

    Args:
        settings: Model, batches and number of steps.
        plan: How second moments are stored.
        halves: Data of either half of the steps.
    """
    model, beta2 = settings.new_model(), settings.betas[1]
    optimizer = SlimAdam(model, plan=plan, lr=settings.lr, betas=settings.betas, monitor=False)
    named: dict[str, Tensor] = dict(model.named_parameters())
    monitor, whole, run, warnings = Monitor(), WholeMoments(named, plan, beta2), Run(), Warnings()
    groups, rules = [(list(named), optimizer.param_groups[0])], {name: [plan[name]] for name in named}
    for name, param in named.items():
        monitor.add(name, param, [plan[name]])
    logging.getLogger("slimadam").addHandler(warnings)
    for half, data in enumerate(halves):
        for batch in data.batches(settings.steps // 2, settings.batch_size, settings.context, settings.seed + half):
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (monitor.steps + 1) / WARMUP_STEPS)
            optimizer.zero_grad()
            loss = model.loss(*batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            run.step_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            monitor.after_step(groups, rules, optimizer.state)
            run.monitor_seconds.append(time.perf_counter() - start)
            run.losses.append(loss.item())
            whole.update()
            if monitor.steps % monitor.interval == 0:
                run.sampled.append({name: check.snr for name, check in monitor.check().items() if check.ready})
                run.whole.append(whole.snr())
            if warnings.messages and run.warned_at is None:
                run.warned_at, run.warning = monitor.steps, warnings.messages[0]
    logging.getLogger("slimadam").removeHandler(warnings)
    return run, monitor


def figures(run: Run, monitor: Monitor, plan: CompressionPlan) -> dict[str, Any]:
    """Return the figures of a run for the results file.

    Args:
        run: The run.
        monitor: Its monitor.
        plan: The plan it trained under.
    """
    fallen = [name for name, check in monitor.check().items() if "no longer holds" in check.reason]
    shapes = {name: rule.shape or () for name, rule in plan.items()}
    saved = sum(math.prod(shape) - plan[name].stored_elements(shape) for name, shape in shapes.items())
    return {
        "memory_share": monitor.memory_of(plan) / (saved * torch.float32.itemsize),
        "time_share": run.time_share,
        "training_step_ms": 1e3 * statistics.median(run.step_seconds),
        "final_loss": statistics.fmean(run.losses[-50:]),
        "warned_at": run.warned_at,
        "warning": run.warning,
        "monitored": len(run.sampled[-1]),
        "below_cutoff": {
            "sample": [sum(value < monitor.cutoff for value in row.values()) for row in run.sampled],
            "whole": [sum(row[name] < monitor.cutoff for name in run.sampled[-1]) for row in run.whole],
        },
        "fallen": {
            name: {"sample": [row[name] for row in run.sampled], "whole": [row[name] for row in run.whole]}
            for name in fallen
        },
    }


def bars(stationary: dict[str, Any], changed: dict[str, Any]) -> dict[str, bool]:
    """Return each bar, and whether the two runs of a seed meet it.

    Args:
        stationary: Figures of the run on one kind of bytes.
        changed: Figures of the run whose data changed.
    """
    both = (stationary, changed)
    return {
        "memory at most 1% of what was saved": all(run["memory_share"] <= LARGEST_MEMORY_SHARE for run in both),
        "time at most 0.5% of training": all(run["time_share"] <= LARGEST_TIME_SHARE for run in both),
        "quiet where nothing changes": stationary["warned_at"] is None,
        "warns where the data changes": changed["warned_at"] is not None,
    }


def main() -> None:
    """Train, print, write ``results/monitoring.json``; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--change", choices=CHANGES, default="sparse", help="what the data changes to")
    parser.add_argument("--forms", choices=("mean", "best"), default="mean", help="what the plan chooses from")
    arguments = parser.parse_args()
    if arguments.steps < SHORTEST:
        parser.error(f"--steps={arguments.steps} leaves too few measurements to judge by; use at least {SHORTEST}")
    results = []
    for seed in arguments.seeds:
        settings = DemoSettings(seed=seed, steps=arguments.steps, calibration_steps=400)
        data = load(None, settings.context)
        history = calibrate(settings, data, lambda phase, step, loss: None)
        plan = CompressionPlan.from_snr(history, forms=arguments.forms)
        stationary, altered = (
            figures(*train(settings, plan, (data, second)), plan)
            for second in (data, other_bytes(data, arguments.change, seed))
        )
        kept = bars(stationary, altered)
        results.append({"seed": seed, "bars": kept, "stationary": stationary, "changed": altered})
        print_seed(seed, stationary, altered, kept)
    settings_used = {name: getattr(arguments, name) for name in ("steps", "change", "forms")}
    print("written:", machine.write("monitoring", {"settings": settings_used, "runs": results}))
    if not all(all(result["bars"].values()) for result in results):
        raise SystemExit(1)


def print_seed(seed: int, stationary: dict[str, Any], changed: dict[str, Any], kept: dict[str, bool]) -> None:
    """Print one seed's figures, then its bars.

    Args:
        seed: The seed.
        stationary: Figures of the run on one kind of bytes.
        changed: Figures of the run whose data changed.
        kept: Whether each bar is met.
    """
    for label, run in (("stationary", stationary), ("changed", changed)):
        print(
            f"seed {seed} {label:10s} memory {run['memory_share']:.2%} of saved, time {run['time_share']:.2%} of "
            f"{run['training_step_ms']:.1f} ms, warned at {run['warned_at']}, below the cutoff by sample "
            f"{run['below_cutoff']['sample']}, whole {run['below_cutoff']['whole']} of {run['monitored']}"
        )
    print(f"  {changed['warning']}")
    for bar, held in kept.items():
        print(f"  {'pass' if held else 'FAIL'}  {bar}", flush=True)


if __name__ == "__main__":
    main()
