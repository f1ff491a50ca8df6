"""Choose the best learning rate, and compare paired losses: interval and two one-sided tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

MARGIN = 0.005
"""Largest relative difference of the loss that counts as the same; fixed before the runs."""
LEVEL = 0.95
"""Confidence of intervals and tests."""


class EdgeError(ValueError):
    """The best learning rate is the smallest or the largest one tried, so that a better one may lie outside.

    Args:
        rate: The best rate tried.
        direction: -1 where it is the smallest, 1 where it is the largest.
    """

    def __init__(self, rate: float, direction: int) -> None:
        edge = "smallest" if direction < 0 else "largest"
        super().__init__(f"the best learning rate, {rate:g}, is the {edge} one tried; try further ones")
        self.rate, self.direction = rate, direction


def best_rate(losses: Mapping[float, Sequence[float]]) -> float:
    """Return the learning rate of the lowest mean loss.

    Args:
        losses: Losses of the same seeds by rate; infinite where a run diverged.

    Raises:
        EdgeError: It has no neighbour on one side.
        ValueError: Rates have different numbers of losses.
    """
    if len({len(found) for found in losses.values()}) != 1:
        raise ValueError("every learning rate needs the losses of the same seeds")
    rates = sorted(losses)
    best = min(rates, key=lambda rate: statistics.fmean(losses[rate]))
    if best == rates[0]:
        raise EdgeError(best, -1)
    if best == rates[-1]:
        raise EdgeError(best, 1)
    return best


@dataclass(frozen=True)
class Comparison:
    """Paired relative differences of losses: above zero where the loss is higher than the reference's.

    Attributes:
        pairs: Number of pairs.
        mean: Mean relative difference.
        low: Lower end of its confidence interval.
        high: Upper end of it.
        p_equivalent: Larger p-value of the two one-sided t-tests against a difference of the margin or more.
        p_no_worse: p-value of the one against a loss higher by the margin or more.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p_equivalent: float
    p_no_worse: float

    @property
    def equivalent(self) -> bool:
        """Return whether the loss is the same within the margin, at the level of the tests."""
        return self.p_equivalent < 1 - LEVEL

    @property
    def no_worse(self) -> bool:
        """Return whether the loss is not higher by the margin, at the level of the tests."""
        return self.p_no_worse < 1 - LEVEL


def compare(losses: Sequence[float], reference: Sequence[float], margin: float = MARGIN) -> Comparison:
    """Compare losses with those of a reference on the same seeds.

    Args:
        losses: Losses by seed; infinite where a run diverged.
        reference: Losses of the reference in the same order.
        margin: Relative difference that counts as the same.

    Raises:
        ValueError: There are fewer than two pairs, or a loss has no partner.
    """
    differences = [loss / other - 1 for loss, other in zip(losses, reference, strict=True)]
    count = len(differences)
    if count < 2:
        raise ValueError("a comparison needs two pairs or more")
    if not all(map(math.isfinite, differences)):
        return Comparison(count, math.inf, -math.inf, math.inf, 1.0, 1.0)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    below = _p_below(mean - margin, error, count)
    above = _p_below(-mean - margin, error, count)
    return Comparison(count, mean, mean - reach, mean + reach, max(below, above), below)


def _p_below(distance: float, error: float, count: int) -> float:
    """Return the p-value of the t-test whose alternative is a mean below zero."""
    if error == 0:
        return 0.0 if distance < 0 else 1.0
    return float(stats.t.cdf(distance / error, count - 1))
