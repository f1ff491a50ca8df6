"""Finding where a loss along a line first rises above its start, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Literal, NamedTuple

Status = Literal["found", "no increase", "no descent", "noisy", "too noisy", "not finite", "out of evaluations"]
_FACTOR = 2.0
_PATIENCE = 12  # doublings, or halvings, after which the factor itself is squared from one to the next
_LARGEST_FACTOR = 1e30
_LARGEST = 1e30  # beyond it parameters in float32 would be infinite
_SMALLEST = 1e-60
_UNCERTAIN = 8  # halvings below a certain rise after which every descent that can be told has been passed
_VANISHING = (1 / 16, 1 / 32, 1 / 64)  # shares of a rate at which a smooth loss has hardly begun to fall
_NEIGHBOURS = (0.9, 1.1)
_CLEARLY = 3.0


class Crossing(NamedTuple):
    """Bracket of a rate at which a rise changes its sign; 0 and infinity where an end is not known."""

    lower: float
    upper: float
    status: Status


class _OutOfEvaluations(Exception):  # noqa: N818
    pass


def _larger_rates(eta: float, largest: float) -> Iterator[float]:
    """Yield ``eta``, doubled again and again, and faster after a while, up to the largest."""
    factor = _FACTOR
    for doublings in count(1):
        yield eta
        if eta >= largest:
            return
        factor = _next_factor(factor, doublings)
        eta = min(eta * factor, largest)


def _smaller_rates(eta: float) -> Iterator[tuple[float, float]]:
    """Yield half of ``eta``, a quarter, and so on, faster after a while, each with the factor from the one before."""
    factor = _FACTOR
    for halvings in count(1):
        if eta / factor <= _SMALLEST:
            return
        eta /= factor
        yield eta, factor
        factor = _next_factor(factor, halvings)


def _next_factor(factor: float, times: int) -> float:
    return min(factor**2, _LARGEST_FACTOR) if times > _PATIENCE else factor


@dataclass(eq=False)
class Search:
    """Looks for ``min {eta > 0: rise(eta) > 0}``: doubles or halves to a bracket, then narrows it.

    Within the bracket ``rise(eta) / eta``, a straight line where the loss is quadratic, says where the crossing is
    to be expected; a guess on either side closes the bracket in two evaluations. Where two evaluations have not
    halved the bracket the third bisects it, so that no loss takes more than a multiple of bisection.

    Attributes:
        rise: Loss at ``eta`` minus loss at 0; NaN and infinity count as an increase.
        tol: The bracket is narrow enough when ``1 - lower / upper <= tol``.
        resolution: Differences of the loss up to this are not told from zero.
        max_evaluations: Calls of ``rise`` that are allowed.
        max_eta: No larger one is tried.
        stops_at_noise: Stop narrowing at a difference within ``resolution``.
    """

    rise: Callable[[float], float]
    tol: float
    resolution: float
    max_evaluations: int
    max_eta: float = math.inf
    stops_at_noise: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        self._largest = min(self.max_eta, _LARGEST)
        self._evaluations = 0
        self._has_descended = False
        self._lower, self._upper = 0.0, math.inf
        self._rises: dict[float, float] = {}

    def run(self, start: float) -> Crossing:
        """Search from a first guess, positive and finite."""
        try:
            status = self._bracket(min(start, self.max_eta))
            if status == "found":
                status = self._narrow()
            # A crossing within rounding of no change at all counts where the loss falls on the way to it.
            if status == "found" and not self._has_descended and self._ask(self._lower / _FACTOR) >= -self.resolution:
                status = "no descent"
        except _OutOfEvaluations:
            status = "out of evaluations"
        return Crossing(self._lower, self._upper, status)

    def _bracket(self, start: float) -> Status:
        for eta in _larger_rates(start, self._largest):
            self._evaluate(eta)
            if self._upper == eta:
                return self._halve(eta) if eta == start else "found"
        return "no increase"

    def _halve(self, eta: float) -> Status:
        """Halve down to a descent; after two differences too small to tell there is none."""
        unresolved = 0
        for smaller, factor in _smaller_rates(eta):
            rise = self._evaluate(smaller)
            unresolved = unresolved + 1 if abs(rise) <= self.resolution else 0
            if rise < -self.resolution or (unresolved and factor > _FACTOR):
                return "found"
            if unresolved == 2:
                break
        return "no descent"

    def _narrow(self) -> Status:
        before, guesses = self._upper - self._lower, 0
        while 1 - self._lower / self._upper > self.tol:
            rise = self._evaluate(self._middle() if guesses == 2 else self._guess())
            if self.stops_at_noise and abs(rise) <= self.resolution:
                return "noisy"
            guesses += 1
            if guesses == 3 or self._upper - self._lower <= before / 2:
                before, guesses = self._upper - self._lower, 0
        return "found"

    def _middle(self) -> float:
        """Return what is halfway, in the rates' logarithms where they differ by much."""
        if self._lower and self._upper / self._lower > 2 * _FACTOR:
            return math.sqrt(self._lower * self._upper)
        return (self._lower + self._upper) / 2

    def _guess(self) -> float:
        """Return the expected crossing, moved towards the farther end so that it is likely to become the nearer one."""
        lower, upper = self._lower, self._upper
        if not lower:
            return self._middle()
        slope = self._rises[lower] / lower
        steepening = self._rises[upper] / upper - slope
        if not math.isfinite(steepening) or steepening <= 0:
            return self._middle()
        expected = lower - slope * (upper - lower) / steepening
        if not lower < expected < upper:
            return self._middle()
        margin = 0.45 * self.tol
        guess = expected * (1 + margin if upper / expected > expected / lower else 1 - margin)
        return guess if lower < guess < upper else self._middle()

    def _evaluate(self, eta: float) -> float:
        """Return the rise at ``eta``, which becomes an end of the bracket."""
        rise = self._ask(eta)
        self._has_descended = self._has_descended or rise < -self.resolution
        # While it is only being bracketed, a difference too small to tell is no increase.
        if rise > (0.0 if self._has_descended else self.resolution):
            self._upper = eta
        else:
            self._lower = eta
        return rise

    def _ask(self, eta: float) -> float:
        if self._evaluations == self.max_evaluations:
            raise _OutOfEvaluations
        self._evaluations += 1
        rise = self.rise(eta)
        self._rises[eta] = math.inf if math.isnan(rise) else rise
        return self._rises[eta]


@dataclass(eq=False)
class RoughSearch(Search):
    """Looks for ``min {eta > 0: rise(eta) > 0}`` where neither a small rise nor a small fall means anything.

    First climbs until the loss has certainly risen, or crossed after it had certainly fallen, then goes back down to
    a fall. One that is not certain by its size is believed where it stands out from the jumps at much smaller rates,
    and where its neighbours have it too. Then narrows the bracket as every search does.

    Attributes:
        certain: Differences above this are no rounding; at least ``resolution``.
    """

    certain: float = field(kw_only=True)

    def _bracket(self, start: float) -> Status:
        rates = chain([start], (eta for eta, _ in _smaller_rates(start)))
        start = next((eta for eta in rates if self._at(eta) <= self.certain), 0.0)
        if not start:
            return "no descent"
        upper = self._climb(start)
        if upper is None:
            self._lower = self._largest
            return "no increase"
        return self._descend(*self._closer(upper))

    def _at(self, eta: float) -> float:
        """Return the rise at ``eta``, evaluated once."""
        return self._rises[eta] if eta in self._rises else self._ask(eta)

    def _climb(self, start: float) -> float | None:
        """Return a rate where the loss has certainly risen, or is above its start after it had certainly fallen."""
        has_fallen = False
        for eta in _larger_rates(start, self._largest):
            rise = self._at(eta)
            has_fallen = has_fallen or rise < -self.certain
            if rise > (0.0 if has_fallen else self.certain) or (eta >= self._largest and rise > self.resolution):
                self._upper = eta
                return eta
            self._lower = eta if has_fallen else 0.0
        return None

    def _closer(self, upper: float) -> tuple[float, float]:
        """Return a rate below ``upper`` that has not risen, and ``upper``, closer where they are far apart."""
        lower = max((eta for eta in self._rises if eta < upper), default=0.0)
        while lower and upper / lower > _FACTOR**2 and self._at(lower) >= -self.certain:
            middle = math.sqrt(lower * upper)
            lower, upper = (lower, middle) if self._at(middle) > self.certain else (middle, upper)
        return lower, upper

    def _descend(self, lower: float, upper: float) -> Status:
        """Go down from a rise to a fall that is none of rounding."""
        if lower and self._at(lower) < -self.certain:
            return self._between(lower)
        eta, uncertain, unresolved = upper, 0, 0
        while uncertain < _UNCERTAIN and unresolved < 2 and eta > _SMALLEST:
            eta /= _FACTOR
            rise = self._at(eta)
            if rise < -self.certain:
                return self._between(eta)
            uncertain += rise <= self.certain
            unresolved = unresolved + 1 if abs(rise) <= self.resolution else 0
        lowest = min((eta for eta in self._rises if eta < upper), key=self._at)
        if self._at(lowest) >= -self.resolution:
            return "no descent"
        return self._between(lowest) if self._stands_out(lowest) else "too noisy"

    def _stands_out(self, eta: float) -> bool:
        """Return whether the fall at ``eta`` exceeds the jumps where the loss has hardly begun to fall."""
        fall = -self._at(eta)
        jumps = [0.0, *(self._at(eta * share) for share in _VANISHING)]
        if fall <= _CLEARLY * max(self.resolution, max(jumps) - min(jumps)):
            return False
        return max([self._at(eta * share) for share in _NEIGHBOURS]) < -fall / 2

    def _between(self, lower: float) -> Status:
        """Set the bracket from a fall up to the next rise."""
        self._upper = min(eta for eta, rise in self._rises.items() if eta > lower and rise > 0)
        self._lower = max(eta for eta in self._rises if eta < self._upper)
        self._has_descended = True
        return "found"
