"""Fit what to expect of a plan to the protocol's runs: ``python -m benchmarks.expectation``.

For each workload that ``python -m benchmarks.equivalence`` has judged, a short run at AdamW's best rate decides plans
as ``plan="auto"`` does, which say what share of the second moments' mean square they lose. The mean differences to
AdamW's held-out loss at that rate are fitted by a line through zero; its error is that on workloads left out of the
fit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.equivalence.contenders import REFERENCE
from benchmarks.equivalence.report import figures
from benchmarks.equivalence.runs import SELECTION_SEEDS, Record
from benchmarks.equivalence.workloads import Task, present
from benchmarks.harness import machine
from benchmarks.readme.markdown import table
from benchmarks.workloads.training import train, training_rate
from slimadam import AutoPlan, SlimAdam

SETTINGS = {"auto": AutoPlan(), "averages": AutoPlan(forms="mean")}
"""What the contenders measure and decide by."""


class Point(NamedTuple):
    """A plan's share of the second moments' mean square that it loses, and what it cost.

    Attributes:
        workload: Name of the workload.
        contender: Key of :data:`SETTINGS`.
        share: The share, in 0..1.
        difference: Mean difference to the reference's held-out loss, as a share of it.
    """

    workload: str
    contender: str
    share: float
    difference: float


def slope(points: Iterable[Point]) -> float:
    """Return the slope of the line through zero that is closest to the differences.

    Args:
        points: At least one with a share above zero.
    """
    points = list(points)
    return sum(point.share * point.difference for point in points) / sum(point.share**2 for point in points)


def fit(points: Sequence[Point]) -> dict[str, Any]:
    """Return the line, how far differences lie from it, and how far those of workloads left out of the fit.

    Args:
        points: Of two workloads or more.
    """
    line = slope(points)
    left_out = [
        point.difference - point.share * slope(one for one in points if one.workload != point.workload)
        for point in points
    ]
    return {
        "slope": line,
        "deviation": math.sqrt(statistics.fmean((one.difference - line * one.share) ** 2 for one in points)),
        "error_left_out": statistics.fmean(map(abs, left_out)),
        "error_of_expecting_nothing": statistics.fmean(abs(point.difference) for point in points),
        "points": [point._asdict() for point in points],
    }


def share_lost(task: Task, lr: float, settings: AutoPlan) -> float:
    """Return the share of the second moments' mean square that the plan decided in a run loses.

    Args:
        task: Workload, size and length.
        lr: Peak learning rate.
        settings: How to measure and decide.
    """

    def make(model: nn.Module) -> SlimAdam:
        return SlimAdam(model, betas=task.workload.betas, weight_decay=task.weight_decay, plan=settings)

    rate, steps = training_rate(lr, task.steps), settings.calibration_steps
    _, optimizer = train(task.workload, make, rate, steps, SELECTION_SEEDS, max_norm=task.kind.max_norm)
    assert isinstance(optimizer, SlimAdam)
    expected = optimizer.plan.expectation
    assert expected is not None
    return expected.averaged_away


def _points(out: Path) -> list[Point]:
    found = []
    for row in figures(Record(out / "equivalence.jsonl").runs)["tasks"]:
        task = Task(row["workload"], row["size"], row["length"])
        if not present([task.name]):
            continue
        for contender, settings in SETTINGS.items():
            judged = row["contenders"].get(contender, {}).get("at_reference_best")
            if judged is not None:
                lr = row["contenders"][REFERENCE]["best_rate"]
                point = Point(task.name, contender, share_lost(task, lr, settings), judged["mean"])
                print(
                    f"{point.workload}: {contender} loses {point.share:.1%}, costs {point.difference:+.2%}", flush=True
                )
                found.append(point)
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the line, its errors, and a table of its points.

    Args:
        result: What ``expectation.json`` holds.
    """
    rows = [
        [
            point["workload"],
            point["contender"],
            f"{point['share']:.1%}",
            f"{result['slope'] * point['share']:+.2%}",
            f"{point['difference']:+.2%}",
        ]
        for point in result["points"]
    ]
    return (
        f"The line rises by {result['slope']:.2%} of the loss from nothing lost to all lost. On workloads left out of "
        f"the fit it is wrong by {result['error_left_out']:.2%} of the loss on average; expecting no difference is "
        f"wrong by {result['error_of_expecting_nothing']:.2%}.\n\n"
        f"{table(['workload', 'plan', 'mean square lost', 'expected', 'seen'], rows)}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, fit, print and write ``expectation.json``; 1 where fewer than two workloads are judged."""
    options = machine.parser(__doc__).parse_args(arguments)
    torch.set_num_threads(1)
    points = _points(options.out)
    if len({point.workload for point in points}) < 2:
        print("fewer than two workloads are judged: run python -m benchmarks.equivalence first")
        return 1
    result = fit(points)
    print(
        f"{result['slope']:+.2%} of the loss where all is lost, deviation {result['deviation']:.2%}; left out: "
        f"{result['error_left_out']:.2%}, expecting nothing: {result['error_of_expecting_nothing']:.2%}"
    )
    print("written:", machine.write("expectation", result, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
