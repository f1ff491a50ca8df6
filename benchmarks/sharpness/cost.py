"""Measure the cost of critical sharpness: ``python -m benchmarks.sharpness_cost``.

Memory: the allocator's peak during a measurement whose closure allocates nothing, beside what was allocated before, in
bytes per parameter of GPT-2 small's shapes, for each way to keep the parameters.
Time and forward passes: the demo's byte GPT trained as the demo does, measured every 100 and every 10 steps. Checked
first: parameters are bit for bit what they were.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import machine
from benchmarks.workloads.shapes import gpt2, gpt2_small
from benchmarks.workloads.skeleton import skeleton
from slimadam import CriticalSharpness, SlimAdam
from slimadam.curvature.probe.displacement import Memory
from slimadam.demo.data import ByteData, load
from slimadam.demo.training import DemoSettings, learning_rate

MOST_FORWARD_PASSES = 6.5
LARGEST_TIME_SHARE = 0.08
INTERVALS = (100, 10)
"""Steps from one measurement to the next."""

ALLOWANCE = 0.25
"""Bytes per parameter beside what a mode keeps and its one direction: blocks in work."""


@dataclass
class MemoryRow:
    """Extra bytes per parameter of one way to keep the parameters.

    Attributes:
        optimizer: Its label.
        memory: The mode.
        kept: Bytes that it holds between evaluations, as it reports.
        direction: The largest tensor's direction, of which one exists at a time; 0 where all are kept.
        peak: Most bytes that the allocator saw.
    """

    optimizer: str
    memory: str
    kept: float
    direction: float
    peak: float

    @property
    def is_met(self) -> bool:
        """Return whether nothing else of any size was held."""
        return self.peak <= self.kept + self.direction + ALLOWANCE


@dataclass
class TimeRow:
    """Cost of measuring in one training run.

    Attributes:
        optimizer: Its label.
        memory: The mode.
        interval: Steps from one measurement to the next.
        forward_passes: Mean of the measurements after the first.
        time_share: Share of the training steps' time, by medians: a measurement over ``interval`` steps.
        total_share: Likewise, by sums, the first measurement included.
    """

    optimizer: str
    memory: str
    interval: int
    forward_passes: float
    time_share: float
    total_share: float


def optimizers(lr: float) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Return the optimizers that are measured with."""
    return {
        "SlimAdam rules": lambda model: SlimAdam(model, lr=lr, plan="rules", betas=(0.9, 0.95)),
        "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95)),
    }


def _memory_row(label: str, optimizer: Optimizer, memory: Memory) -> MemoryRow:
    """Measure along the pending update with a loss that never rises, up to 4 times the learning rate."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    elements = sum(param.numel() for param in params)
    lr = optimizer.param_groups[0]["lr"]
    probe = CriticalSharpness(optimizer, memory=memory, max_lr=4 * lr, modules=[])
    before = [param.detach().clone() for param in params]
    kept = 0

    def closure() -> float:
        nonlocal kept
        kept = max(kept, probe.extra_bytes)
        return 0.0

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        probe.measure(closure)
    if not all(map(torch.equal, before, params)):
        raise SystemExit(f"{label}, memory={memory!r}: the parameters are not what they were; no figure is reported")
    largest = max(param.numel() for param in params) * 4 if memory != "copy" else 0
    return MemoryRow(label, memory, kept / elements, largest / elements, peak_bytes(seen) / elements)


def peak_bytes(seen: Any) -> int:
    """Return the most that was allocated at once while the profiler watched, over what was at its start."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return int(max(itertools.accumulate(sizes, initial=0)))


def memory_rows(shapes: dict[str, tuple[int, ...]]) -> list[MemoryRow]:
    """Measure every mode with every optimizer."""
    rows = []
    for label, make in optimizers(1e-3).items():
        model = skeleton(shapes, "cpu", torch.float32)
        optimizer = make(model)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        rows += [_memory_row(label, optimizer, memory) for memory in get_args(Memory)]
    return rows


def _time_row(settings: DemoSettings, data: ByteData, label: str, memory: Memory, interval: int) -> TimeRow:
    """Train as the demo does, and measure every so many steps."""
    model = settings.new_model()
    optimizer = optimizers(settings.lr)[label](model)
    probe = CriticalSharpness(optimizer, memory=memory)
    step_seconds, measure_seconds, passes = [], [], []
    batches = data.batches(settings.steps, settings.batch_size, settings.context, settings.seed)
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step)

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            return model.loss(*batch)

        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(closure())
        measuring = time.perf_counter()
        if step % interval == 0:
            passes.append(probe.measure(closure).forward_passes)
            measure_seconds.append(time.perf_counter() - measuring)
        stepping = time.perf_counter()
        optimizer.step()
        step_seconds.append(measuring - start + time.perf_counter() - stepping)
    share = statistics.median(measure_seconds) / (interval * statistics.median(step_seconds))
    total = sum(measure_seconds) / sum(step_seconds)
    return TimeRow(label, memory, interval, statistics.fmean(passes[1:]), share, total)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 1 where a bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="small models: to see that it runs")
    options = parser.parse_args(arguments)
    settings = DemoSettings(steps=60, layers=1, width=32, context=32) if options.quick else DemoSettings(steps=400)
    shapes = gpt2(32, 1, 256, 32) if options.quick else gpt2_small()
    in_memory = memory_rows(shapes)
    print(f"{'extra bytes per parameter':36s}{'kept':>8s}{'direction':>11s}{'peak':>8s}")
    for row in in_memory:
        print(f"{row.optimizer:20s}{row.memory:16s}{row.kept:8.2f}{row.direction:11.2f}{row.peak:8.2f}")
    data = load(None, settings.context)
    in_time = []
    intervals = (20, 5) if options.quick else INTERVALS
    print(f"{'time of training':36s}{'every':>8s}{'forwards':>11s}{'share':>8s}{'of all':>8s}")
    for label, memory, interval in itertools.product(optimizers(1e-3), get_args(Memory), intervals):
        in_time.append(_time_row(settings, data, label, memory, interval))
        last = in_time[-1]
        shares = f"{last.time_share:8.2%}{last.total_share:8.2%}"
        print(f"{label:20s}{memory:16s}{interval:8d}{last.forward_passes:11.2f}{shares}")
    bars = {
        f"nothing beside what a mode keeps, one direction and {ALLOWANCE} B": all(row.is_met for row in in_memory),
        f"at most {MOST_FORWARD_PASSES} forward passes when warm": all(
            row.forward_passes <= MOST_FORWARD_PASSES for row in in_time
        ),
        f"at most {LARGEST_TIME_SHARE:.0%} of the time every {intervals[0]} steps": all(
            row.total_share <= LARGEST_TIME_SHARE for row in in_time if row.interval == intervals[0]
        ),
    }
    for bar, is_met in bars.items():
        print(f"{'met   ' if is_met else 'MISSED'} {bar}")
    figures = {
        "steps": settings.steps,
        "memory": list(map(asdict, in_memory)),
        "time": list(map(asdict, in_time)),
        "bars": bars,
    }
    print(f"written to {machine.write('sharpness_cost', figures, options.out)}")
    return 0 if options.quick or all(bars.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
