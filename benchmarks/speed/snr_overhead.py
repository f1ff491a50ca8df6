"""Measure the time that ``plan="auto"`` spends on measuring: ``python -m benchmarks.snr_overhead``.

Times whole training steps of two models and the measuring of all their second moments, in turn, so that a busy machine
slows both; and with ``start="slim"``, what grids see in each of these steps and the measurements on them. Bar: spread
over the default schedule's steps, measuring costs at most 1% of a step. Before anything is
timed, measured ratios are compared with the float64 formula; a wrong one stops the run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import machine
from slimadam import AutoPlan, SlimAdam
from slimadam.demo.training import DemoSettings
from slimadam.measurement.snr import measure
from slimadam.optim.compression import decision
from slimadam.state.rule import FACTORED, Candidate

BAR = 0.01
TOLERANCE = 1e-6
GPT2_TOKENS = 64
STEPS_SEEN = 2
"""Grids see the gradients of one step in as many."""


def worst_error() -> float:
    """Return the largest relative error of a measured ratio against the float64 formula, over sizes and scales."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for shape, scale in itertools.product([(31, 17), (2000, 700), (24, 16, 3, 3)], [1e-40, 1e-8, 1e37]):
        v = torch.rand(shape, generator=generator).add(0.1).pow(4).mul(scale)
        for candidate, value in measure(v).items():
            errors.append(abs(value / _formula(v.numpy(), candidate) - 1))
    return max(errors)


def _formula(v: np.ndarray[Any, Any], candidate: Candidate) -> float:
    """Return the ratio as defined in arXiv 2503.01843, for entries that vary, in float64."""
    v = v.astype(np.float64) / v.max()
    dims: tuple[int, ...] | None = None
    if candidate == FACTORED:
        v = v.reshape(len(v), -1)
        v = v * v.mean() / (v.mean(1, keepdims=True) * v.mean(0, keepdims=True))
    else:
        dims = candidate
    return float((v.mean(dims) ** 2 / v.var(dims)).mean())


def byte_gpt() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the demo's model and its loss on a batch of the demo's size."""
    settings = DemoSettings()
    model = settings.new_model()
    tokens = torch.randint(256, (settings.batch_size, settings.context + 1))
    return model, lambda: model.loss(tokens[:, :-1], tokens[:, 1:])


def gpt2_small() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return GPT-2 124M and its loss on one short sequence."""
    model = GPT2LMHeadModel(GPT2Config())
    tokens = torch.randint(50257, (1, GPT2_TOKENS + 1))
    return model, lambda: F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())


class Seconds(NamedTuple):
    """Median times.

    Attributes:
        step: A training step.
        measuring: Measuring every second moment once.
        seeing: What a step shows to grids, which see one step in two.
        measuring_grids: Measuring every grid once.
    """

    step: float
    measuring: float
    seeing: float
    measuring_grids: float

    def overhead(self, schedule: AutoPlan, measurements: int) -> float:
        """Return the share of the schedule's steps that measuring takes.

        Args:
            schedule: The schedule.
            measurements: How often it measures.
        """
        return measurements * self.measuring / (schedule.calibration_steps * self.step)

    def overhead_of_grids(self, schedule: AutoPlan, measurements: int) -> float:
        """Return the share of the schedule's steps that grids take.

        Args:
            schedule: The schedule.
            measurements: How often it measures.
        """
        measured = measurements * self.measuring_grids / (schedule.calibration_steps * self.step)
        return measured + self.seeing / self.step


def _seconds(rounds: int, model: nn.Module, loss: Callable[[], Tensor]) -> Seconds:
    optimizer = SlimAdam(model, lr=1e-4, plan=None)
    slim = SlimAdam(model, lr=1e-4, plan=AutoPlan(start="slim"))
    times = []
    for turn in range(rounds + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        stepped = time.perf_counter()
        for state in optimizer.state.values():
            measure(state["exp_avg_sq"])
        measured = time.perf_counter()
        if turn == 0:
            slim.step()  # makes the averages that grids are compared with
        registry = slim._registry
        assert registry.measuring is not None
        before = time.perf_counter()
        for _ in range(STEPS_SEEN):
            if not registry.measuring.counts_only(same_state=True):
                decision(registry, slim.param_groups, slim.state)
        seen = time.perf_counter()
        for slot in registry.slots(slim.param_groups):
            for key in slot.keys:
                if key in registry.measuring.grids:
                    registry.measuring.grids[key].measured(slim.state[slot.param])
        if turn >= 2:
            times.append(
                Seconds(stepped - start, measured - stepped, (seen - before) / STEPS_SEEN, time.perf_counter() - seen)
            )
    return Seconds(*map(statistics.median, zip(*times, strict=True)))


def main() -> None:
    """Measure, print a table, write ``results/snr_overhead.json``; exit 1 if the bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    error = worst_error()
    if not error <= TOLERANCE:
        raise SystemExit(f"not timing a wrong measurement: it is off by {error:.1e} from float64")
    schedule = AutoPlan()
    measured = sum(map(schedule.measures, range(1, schedule.calibration_steps + 1)))
    print(f"{measured} measurements in {schedule.calibration_steps} steps, {torch.get_num_threads()} threads")
    models = {"byte GPT of the demo": byte_gpt, f"GPT-2 124M, {GPT2_TOKENS} tokens a step": gpt2_small}
    figures = {}
    for label, make in models.items():
        torch.manual_seed(0)
        seconds = _seconds(arguments.rounds, *make())
        figures[label] = figure = {
            **{f"{name}_ms": 1e3 * value for name, value in seconds._asdict().items()},
            "overhead": seconds.overhead(schedule, measured),
            "overhead_of_grids": seconds.overhead_of_grids(schedule, measured),
        }
        times = "   ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds._asdict().items())
        print(f"{label}: {times}")
        print(f"   {figure['overhead']:.3%}, from grids {figure['overhead_of_grids']:.3%}   bar {BAR:.0%}")
    found = {"measurements": measured, "steps": schedule.calibration_steps, "worst_error": error, "models": figures}
    print("written:", machine.write("snr_overhead", found, arguments.out))
    if any(max(figure["overhead"], figure["overhead_of_grids"]) > BAR for figure in figures.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
