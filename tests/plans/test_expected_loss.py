"""What a plan is expected to cost is what the committed experiments found."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from slimadam import CompressionPlan, Rule
from slimadam.plans.expectation import OBSERVED, Expectation, expectation

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "calibration_gap.json"
PREDICTOR = "1/(1 + SNR), at 0.1 lr"


def test_the_ranges_are_those_of_the_committed_runs() -> None:
    points = [point for point in json.loads(RESULT.read_text())["points"] if PREDICTOR in point["predictors"]]
    lower_edge = 0.0
    for edge, lower, upper in OBSERVED:
        gaps = [point["gap"] for point in points if lower_edge < point["predictors"][PREDICTOR] <= edge]
        tenths = statistics.quantiles(gaps, n=10, method="inclusive")
        assert (lower, upper) == (round(tenths[0], 4), round(tenths[-1], 4)), f"{edge}: {len(gaps)} runs"
        lower_edge = edge


def test_the_share_is_weighted_by_elements() -> None:
    rules = {
        "a": Rule((1,), "mean", (10, 20), {(0,): 9.0, (1,): 3.0}),
        "b": Rule((), "factored", (10, 10), {(0,): 1.0, "factored": 19.0}),
        "c": Rule((), "full", (100,), {(0,): 0.1}),
    }
    found = CompressionPlan(rules).expectation
    assert found is not None
    assert found.averaged_away == pytest.approx((200 / 4 + 100 / 20) / 400)
    assert (found.lower, found.upper) == OBSERVED[1][1:]


@pytest.mark.parametrize(
    "rule",
    [Rule((1,), "mean", (4, 4)), Rule((1,), "mean"), Rule((), "factored", (4, 4), {(0,): 1.0})],
)
def test_nothing_is_expected_of_what_was_not_measured(rule: Rule) -> None:
    assert expectation([rule]) is None
    assert expectation([]) is None


def test_perfect_and_hopeless_averages() -> None:
    perfect = expectation([Rule((1,), "mean", (4, 4), {(1,): float("inf")})])
    assert perfect is not None
    assert perfect.averaged_away == 0
    hopeless = expectation([Rule((1,), "mean", (4, 4), {(1,): 0.0})])
    assert hopeless is not None
    assert hopeless.averaged_away == 1


def test_in_words() -> None:
    assert str(Expectation(0.137, -0.01, 0.012)) == (
        "14% of the second moments' mean square is averaged away; 8 of 10 runs with as much ended within -1.0% to "
        "+1.2% of AdamW's held-out loss"
    )
