"""Regimes of synthetic traces whose regimes are known."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from slimadam import regimes

TRANSIENT, SATURATION, SHARPENING, EDGE = (
    "early transient", "intermediate saturation", "progressive sharpening", "edge of stability",
)  # fmt: skip
THRESHOLD = 200.0
Row = tuple[int, float, float]


def four_regimes(count: int, noise: float = 0.0, seed: int = 0) -> list[Row]:
    """Falls five times in a tenth, stays for two, rises ten times in four, oscillates for three."""
    marks = [round(share * count) for share in (0.1, 0.3, 0.7, 1.0)]
    log = np.concatenate([
        np.linspace(math.log(100), math.log(20), marks[0]),
        np.full(marks[1] - marks[0], math.log(20)),
        np.linspace(math.log(20), math.log(THRESHOLD), marks[2] - marks[1]),
        math.log(THRESHOLD) + 0.3 * (-1.0) ** np.arange(marks[3] - marks[2]),
    ])  # fmt: skip
    log += noise * np.random.default_rng(seed).standard_normal(count)
    return [(10 * index, float(np.exp(value)), THRESHOLD) for index, value in enumerate(log)]


def labels(trace: Any, **options: Any) -> list[str]:
    return [regime.label for regime in regimes(trace, **options)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "noise"), [(60, 0.0), (60, 0.1), (300, 0.0), (300, 0.3), (1000, 0.1), (1000, 0.3)])
def test_four_regimes_within_a_tenth_of_the_run(count: int, noise: float, seed: int) -> None:
    found = regimes(four_regimes(count, noise, seed))
    assert [regime.label for regime in found] == [TRANSIENT, SATURATION, SHARPENING, EDGE]
    boundaries = [regime.first_step / (10 * count) for regime in found]
    assert boundaries == pytest.approx([0, 0.1, 0.3, 0.7], abs=0.1)
    assert found[-1].last_step == 10 * (count - 1)
    assert all(one.last_step + 10 == other.first_step for one, other in itertools.pairwise(found))


def test_reasons_say_what_was_seen() -> None:
    falls, stays, rises, edge = [regime.reason for regime in regimes(four_regimes(2000))]
    assert falls.startswith("falls to 1/3.8")
    assert stays.startswith("stays within a factor of 1.")
    assert rises.startswith("rises ")
    assert edge == "stays about the threshold, at the median 1.00 of it"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (slice(0, 30), [TRANSIENT]),
        (slice(30, 90), [SATURATION]),
        (slice(90, 200), [SHARPENING]),
        (slice(215, 300), [EDGE]),
        (slice(30, 200), [SATURATION, SHARPENING]),
        (slice(90, 300), [SHARPENING, EDGE]),
    ],
    ids=str,
)
def test_regimes_may_be_missing(part: slice, expected: list[str]) -> None:
    found = [regime for regime in regimes(four_regimes(300)[part]) if regime.last_step - regime.first_step > 60]
    assert [regime.label for regime in found] == expected


def test_without_thresholds_nothing_is_at_the_edge() -> None:
    trace = [row[:2] for row in four_regimes(300)]
    assert labels(trace) == [TRANSIENT, SATURATION, SHARPENING]


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_is_saturation(seed: int) -> None:
    values = np.exp(0.5 * np.random.default_rng(seed).standard_normal(400))
    assert labels(list(enumerate(values.tolist()))) == [SATURATION]


def test_a_catapult_is_a_transient_not_the_edge() -> None:
    log = np.concatenate([np.linspace(0, 2, 20), np.linspace(2, -3, 30), np.full(50, -3.0), np.linspace(-3, 0, 100),
                          np.zeros(100)])  # fmt: skip
    found = regimes([(step, math.exp(value), 1.0) for step, value in enumerate(log)])
    assert [regime.label for regime in found] == [TRANSIENT, SATURATION, SHARPENING, EDGE]
    assert found[0].last_step == pytest.approx(50, abs=6)


def test_what_leaves_the_edge_declines() -> None:
    fall = [(3000 + 10 * i, THRESHOLD * 0.97**i, THRESHOLD) for i in range(100)]
    assert labels(four_regimes(300) + fall) == [TRANSIENT, SATURATION, SHARPENING, EDGE, "late decline"]
    no_edge = [(step, sharpness) for step, sharpness, _ in four_regimes(300)[:210] + fall]
    assert labels(no_edge) == [TRANSIENT, SATURATION, SHARPENING, "late decline"]


def test_far_above_the_threshold_is_not_about_it() -> None:
    assert labels([(step, 5.0, 1.0) for step in range(50)]) == [SATURATION]


def test_the_edge_follows_a_threshold_that_moves() -> None:
    threshold = np.geomspace(1000, 100, 200)
    trace = [(step, 1.02 * value, value) for step, value in enumerate(threshold.tolist())]
    assert labels(trace) == [EDGE]


def test_measurements_that_failed_are_left_out() -> None:
    trace = four_regimes(300)
    broken = [(step, (math.nan, math.inf, -1.0, 0.0)[step % 4] if step % 70 == 0 else value, threshold)
              for step, value, threshold in trace]  # fmt: skip
    assert labels(broken) == labels(trace)


def test_rows_may_be_tuples_mappings_or_objects() -> None:
    trace = four_regimes(100)
    names = ("step", "sharpness", "threshold")
    mappings = [dict(zip(names, row, strict=True)) for row in trace]
    assert regimes(mappings) == regimes(trace) == regimes(SimpleNamespace(**row) for row in mappings)
    without = [{"step": step, "sharpness": value, "threshold": None} for step, value, _ in trace]
    assert regimes(without) == regimes([row[:2] for row in trace])


@pytest.mark.parametrize(
    ("trace", "options", "error", "message"),
    [
        ([(1, 2.0)] * 3, {}, ValueError, r"trace has 3 finite positive measurements; regimes need at least 8"),
        ([(1, 2.0)] * 9, {}, ValueError, r"the steps of trace do not increase"),
        ([{"step": 1}] * 9, {}, TypeError, r"trace\[0\]=.*must be \(step, sharpness\)"),
        ([3.0] * 9, {}, TypeError, r"trace\[0\]=3.0 must be"),
        ([(i, 1.0, -1.0) for i in range(9)], {}, ValueError, r"threshold -1.0; thresholds must be positive"),
        ([(i, 1.0) for i in range(9)], {"window": 3}, ValueError, r"window=3 must be an even number"),
        ([(i, 1.0) for i in range(9)], {"change": 1.0}, ValueError, r"change=1.0 must be above 1"),
        ([(i, 1.0) for i in range(9)], {"margin": 1.5}, ValueError, r"margin=1.5 must lie between 0 and 1"),
    ],
    ids=lambda value: "" if isinstance(value, (list, dict)) else None,
)
def test_wrong_uses(trace: list[Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regimes(trace, **options)
