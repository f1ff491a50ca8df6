"""Fit what to expect of a plan: ``python -m benchmarks.expectation``.

``python -m benchmarks.ablation`` has trained with several plans on each workload, and measured what share of the second
moments' mean square each of them loses. The mean differences to AdamW's held-out loss are fitted by a line through
zero; its error is that on workloads left out of the fit.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import machine
from benchmarks.readme.markdown import table


class Point(NamedTuple):
    """A plan's share of the second moments' mean square that it loses, and what it cost.

    Attributes:
        workload: Name of the workload.
        plan: Label of the plan.
        share: The share, in 0..1.
        difference: Mean difference to AdamW's held-out loss, as a share of it.
    """

    workload: str
    plan: str
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


def points_of(ablation: dict[str, Any]) -> list[Point]:
    """Return a point for each workload and plan.

    Args:
        ablation: What ``ablation.json`` holds.
    """
    return [
        Point(row["workload"], label, found["share"], found["mean"])
        for row in ablation["workloads"]
        for label, found in row["variants"].items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the line, its errors, and a table of its points.

    Args:
        result: What ``expectation.json`` holds.
    """
    rows = [
        [
            point["workload"],
            point["plan"],
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
    """Fit, print and write ``expectation.json``; 1 where fewer than two workloads were trained on."""
    options = machine.parser(__doc__).parse_args(arguments)
    file = options.out / "ablation.json"
    points = points_of(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []
    if len({point.workload for point in points}) < 2:
        print(f"{file} holds fewer than two workloads: run python -m benchmarks.ablation first")
        return 1
    result = fit(points)
    print(markdown(result))
    print("written:", machine.write("expectation", result, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
