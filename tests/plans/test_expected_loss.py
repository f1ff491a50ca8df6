"""What a plan is expected to cost is what the committed experiments found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimadam import CompressionPlan, Rule
from slimadam.plans.expectation import DEVIATION, SLOPE, Expectation, expectation

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "expectation.json"


def test_the_line_is_that_of_the_committed_runs() -> None:
    found = json.loads(RESULT.read_text())
    assert pytest.approx((found["slope"], found["deviation"]), abs=5e-5) == (SLOPE, DEVIATION)
    assert found["error_left_out"] < found["error_of_expecting_nothing"]


def test_the_share_is_weighted_by_elements() -> None:
    rules = {
        "a": Rule((1,), "mean", (10, 20), {(0,): 9.0, (1,): 3.0}),
        "b": Rule((), "factored", (10, 10), {(0,): 1.0, "factored": 19.0}),
        "c": Rule((), "full", (100,), {(0,): 0.1}),
    }
    found = CompressionPlan(rules).expectation
    assert found is not None
    assert found.averaged_away == pytest.approx((200 / 4 + 100 / 20) / 400)
    middle, reach = SLOPE * found.averaged_away, 1.2816 * DEVIATION  # 80% of a normal distribution
    assert (found.lower, found.upper) == pytest.approx((middle - reach, middle + reach))


@pytest.mark.parametrize(
    "rule",
    [Rule((1,), "mean", (4, 4)), Rule((1,), "mean"), Rule((), "factored", (4, 4), {(0,): 1.0})],
)
def test_nothing_is_expected_of_what_was_not_measured(rule: Rule) -> None:
    assert expectation([rule]) is None
    assert expectation([]) is None


def test_codes_lose_a_sixth() -> None:
    found = expectation([Rule((), "float8", (4, 4)), Rule((), "full", (16,))])
    assert found is not None
    assert found.averaged_away == pytest.approx(1 / 12)


def test_perfect_and_hopeless_averages() -> None:
    perfect = expectation([Rule((1,), "mean", (4, 4), {(1,): float("inf")})])
    assert perfect is not None
    assert perfect.averaged_away == 0
    hopeless = expectation([Rule((1,), "mean", (4, 4), {(1,): 0.0})])
    assert hopeless is not None
    assert hopeless.averaged_away == 1


def test_in_words() -> None:
    assert str(Expectation(0.137, -0.01, 0.014)) == (
        "14% of the second moments' mean square is lost, which costs about +0.2% of AdamW's held-out loss at its best "
        "learning rate, in 8 of 10 cases -1.0% to +1.4%"
    )
