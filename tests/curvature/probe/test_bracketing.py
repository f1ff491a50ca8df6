from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from slimadam.curvature.probe.bracketing import Crossing, Search

TOL = 1 / 16
SHAPES: dict[str, Callable[[float], float]] = {  # each crosses zero at 1, from below
    "parabola": lambda x: x * x - x,
    "late and steep": lambda x: x**9 - x,
    "early": lambda x: x**1.1 - x,
    "with a cliff": lambda x: -0.1 if x < 1 else math.inf,
    "NaN beyond": lambda x: -0.1 if x <= 1 else math.nan,
    "step": lambda x: -1.0 if x < 1 else 1e-3,
    "wave": lambda x: math.sin(math.pi * (x - 1)) if x < 2 else 1.0,
}


def search(
    rise: Callable[[float], float],
    start: float,
    *,
    tol: float = TOL,
    resolution: float = 0.0,
    max_evaluations: int = 1000,
    max_eta: float = math.inf,
    stops_at_noise: bool = False,
) -> tuple[Crossing, list[float]]:
    asked: list[float] = []

    def counted(eta: float) -> float:
        asked.append(eta)
        return rise(eta)

    found = Search(counted, tol, resolution, max_evaluations, max_eta, stops_at_noise=stops_at_noise).run(start)
    return found, asked


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("scale", [1e-9, 0.37, 1.0, 1e5])
@pytest.mark.parametrize("start", [1e-3, 0.4, 0.999, 1.0, 1.7, 900.0])
@pytest.mark.parametrize("tol", [1 / 4, 1 / 16, 1 / 1000])
def test_bracket_holds_the_crossing_and_is_narrow(shape: str, scale: float, start: float, tol: float) -> None:
    found, asked = search(lambda eta: SHAPES[shape](eta / scale), start * scale, tol=tol)
    assert found.status == "found"
    if shape != "wave" or start <= 2:  # a start beyond the second crossing may find a later one
        assert found.lower <= scale * (1 + 1e-12)
        assert found.upper >= scale * (1 - 1e-12)
    assert 1 - found.lower / found.upper <= tol
    doublings = abs(math.log2(start)) + 2
    assert len(asked) <= doublings + 3 * math.log2(2 / tol)


@pytest.mark.parametrize("start", [0.55, 0.8, 1.2, 1.9])
def test_a_parabola_takes_four_evaluations_from_nearby(start: float) -> None:
    _, asked = search(lambda x: 3 * (x * x - x), start)
    assert len(asked) <= 4


def test_random_smooth_rises() -> None:
    draw = random.Random(1)
    for _ in range(300):
        slope, square, cube = draw.uniform(0.1, 10), draw.uniform(0.1, 10), draw.uniform(0, 10)
        crossing = (-square + math.sqrt(square**2 + 4 * cube * slope)) / (2 * cube)
        found, _ = search(
            lambda x, a=slope, b=square, c=cube: -a * x + b * x**2 + c * x**3,  # type: ignore[misc]
            crossing * 2 ** draw.uniform(-3, 3),
        )
        assert found.lower <= crossing <= found.upper
        assert abs((found.lower + found.upper) / 2 / crossing - 1) < TOL


def test_a_rise_from_the_start_is_no_descent() -> None:
    found, asked = search(lambda x: 1e-3 * x, 1.0, resolution=1e-7)
    assert found.status == "no descent"
    assert len(asked) <= 24


def test_a_flat_loss_never_rises() -> None:
    found, asked = search(lambda x: 0.0, 1.0, max_eta=1e4)
    assert found == Crossing(1e4, math.inf, "no increase")
    assert max(asked) == 1e4


def test_a_rise_that_starts_within_rounding_is_told_from_descent() -> None:
    # Rounding noise of 1e-7 about a real descent that only shows from 1e-6 on.
    draw = random.Random(0)
    found, _ = search(lambda x: draw.uniform(-1e-7, 1e-7) - x + x * x, 1e-9, resolution=1.5e-7)
    assert found.status == "found"
    assert found.lower <= 1 + 1e-6
    assert found.upper >= 1 - 1e-6


def test_the_largest_rate_is_not_passed() -> None:
    found, asked = search(lambda x: x * x - x, 1e-3, max_eta=0.5)
    assert found == Crossing(0.5, math.inf, "no increase")
    assert max(asked) == 0.5
    beyond, asked = search(lambda x: x * x - x, 7.0, max_eta=0.5)
    assert beyond.status == "no increase"
    assert asked == [0.5]


def test_evaluations_run_out_with_what_is_known() -> None:
    found, asked = search(lambda x: x * x - x, 1e-9, max_evaluations=8)
    assert found.status == "out of evaluations"
    assert len(asked) == 8
    assert found.lower == pytest.approx(128e-9)
    assert found.upper == math.inf


def test_noise_ends_the_narrowing() -> None:
    draw = random.Random(0)
    found, _ = search(lambda x: x * x - x + draw.gauss(0, 0.05), 0.5, tol=1e-6, resolution=0.15, stops_at_noise=True)
    assert found.status == "noisy"
    assert found.lower <= 1.2
    assert found.upper >= 0.8


def test_a_loss_that_is_infinite_beyond_halves() -> None:
    found, _ = search(lambda x: math.inf if x > 1e-12 else -x, 1.0)
    assert found.status == "found"
    assert found.lower <= 1e-12 <= found.upper
