"""Search for where a loss along a line first rises above its start, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, NamedTuple

Status = Literal["found", "no increase", "no descent", "noisy", "too noisy", "not finite", "out of evaluations"]
_FACTOR = 2.0
_PATIENCE = 12
"""Doublings, or halvings, after which the factor itself is squared from one to the next."""
_LARGEST = 1e30
"""No larger rate is tried, and no larger factor: parameters in float32 would be infinite."""
_SMALLEST = 1e-60
_UNCERTAIN = 8
"""Halvings below a certain rise after which every descent that can be told has been passed."""
_VANISHING = (1 / 16, 1 / 32, 1 / 64)
"""Shares of a rate at which a smooth loss has hardly begun to fall."""
_NEIGHBOURS = (0.9, 1.1)
_CLEARLY = 3.0


class Crossing(NamedTuple):
    """The bracket in which a rise changes its sign.

    Attributes:
        lower: The largest ``eta`` known not to rise; 0 where there is none.
        upper: The smallest known to rise; infinite where there is none.
        status: How the search ended, see :class:`~slimadam.SharpnessMeasurement`.
    """

    lower: float
    upper: float
    status: Status


class _OutOfEvaluationsError(Exception):
    pass


@dataclass
class Search:
    """Look for ``min {eta > 0: rise(eta) > 0}``: double or halve to a bracket, then narrow it.

    Climb until the loss has certainly risen, or crossed after it had certainly fallen, then go back down to a fall.
    One that is not certain by its size is believed where it stands out from the jumps at much smaller rates, and where
    its neighbours have it too.

    Within the bracket ``rise(eta) / eta``, a straight line where the loss is quadratic, predicts the crossing; a guess
    on either side closes the bracket in two evaluations. Where two evaluations have not halved the bracket the third
    bisects it, so that no loss takes more than a multiple of bisection.

    Attributes:
        rise: Loss at ``eta`` minus loss at 0; NaN and infinity count as an increase.
        tol: The bracket is narrow enough when ``1 - lower / upper <= tol``.
        resolution: Differences of the loss up to this are not told from zero.
        max_evaluations: Calls of ``rise`` that are allowed.
        max_eta: No larger one is tried.
        certain: Differences above this are not rounding; at least ``resolution``.
        stops_at_noise: Stop narrowing at a difference within ``resolution``.
    """

    rise: Callable[[float], float]
    tol: float
    resolution: float
    max_evaluations: int
    max_eta: float = math.inf
    certain: float = field(default=0.0, kw_only=True)
    stops_at_noise: bool = field(default=False, kw_only=True)
    _lower: float = field(default=0.0, init=False)
    _upper: float = field(default=math.inf, init=False)
    _rises: dict[float, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.max_eta = min(self.max_eta, _LARGEST)
        self.certain = max(self.certain, self.resolution)

    def run(self, start: float) -> Crossing:
        """Search from a first guess, positive and finite."""
        try:
            status = self._bracket(min(start, self.max_eta))
            if status == "found":
                status = self._narrow()
        except _OutOfEvaluationsError:
            status = "out of evaluations"
        return Crossing(self._lower, self._upper, status)

    def _bracket(self, start: float) -> Status:
        below = next((eta for eta in _halved(start) if self._at(eta) <= self.certain), None)
        if below is None:
            return "no descent"
        upper = self._climb(below)
        if upper is None:
            self._lower = self.max_eta
            return "no increase"
        lower, upper = self._closer(upper)
        if self.stops_at_noise and below == start and lower and abs(self._at(lower)) <= self.resolution:
            self._lower, self._upper = lower, upper  # a fall may be hidden by noise: the rise is what can be found
            return "found"
        return self._descend(lower, upper)

    def _climb(self, start: float) -> float | None:
        """Go up to where the loss has certainly risen, or is above its start after it had certainly fallen."""
        has_fallen = False
        for eta in _doubled(start, self.max_eta):
            rise = self._at(eta)
            has_fallen = has_fallen or rise < -self.certain
            if rise > (0.0 if has_fallen else self.certain) or (eta >= self.max_eta and rise > self.resolution):
                self._upper = eta
                return eta
            self._lower = eta if has_fallen or rise <= self.resolution else 0.0
        return None

    def _closer(self, upper: float) -> tuple[float, float]:
        """Return the largest rate known not to have risen and ``upper``, both closer where they are far apart."""
        lower = max((eta for eta in self._rises if eta < upper), default=0.0)
        while lower and upper / lower > _FACTOR**2 and self._at(lower) >= -self.certain:
            middle = math.sqrt(lower * upper)
            lower, upper = (lower, middle) if self._at(middle) > self.certain else (middle, upper)
        return lower, upper

    def _descend(self, lower: float, upper: float) -> Status:
        """Go down from a rise to a fall that is not rounding."""
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
        return all(self._at(eta * share) < -fall / 2 for share in _NEIGHBOURS)

    def _between(self, lower: float) -> Status:
        """Set the bracket from a fall up to the next rise."""
        self._upper = min(eta for eta, rise in self._rises.items() if eta > lower and rise > 0)
        self._lower = max(eta for eta in self._rises if lower <= eta < self._upper)
        return "found"

    def _narrow(self) -> Status:
        before, guesses = self._upper - self._lower, 0
        while 1 - self._lower / self._upper > self.tol:
            eta = self._middle() if guesses == 2 else self._guess()
            rise = self._at(eta)
            self._lower, self._upper = (self._lower, eta) if rise > 0 else (eta, self._upper)
            if self.stops_at_noise and abs(rise) <= self.resolution:
                return "noisy"
            guesses += 1
            if guesses == 3 or self._upper - self._lower <= before / 2:
                before, guesses = self._upper - self._lower, 0
        has_fallen = min(self._rises.values()) < -self.resolution
        return "found" if has_fallen or not self.stops_at_noise else "noisy"

    def _middle(self) -> float:
        """Return the rate halfway, in the rates' logarithms where they differ by much."""
        if self._upper / self._lower > 2 * _FACTOR:
            return math.sqrt(self._lower * self._upper)
        return (self._lower + self._upper) / 2

    def _guess(self) -> float:
        """Return the expected crossing, moved towards the farther end so that it likely becomes the nearer one."""
        lower_slope, upper_slope = (self._rises[eta] / eta for eta in (self._lower, self._upper))
        steepening = upper_slope - lower_slope
        if not math.isfinite(steepening) or steepening <= 0:
            return self._middle()
        expected = self._lower - lower_slope * (self._upper - self._lower) / steepening
        if not self._lower < expected < self._upper:
            return self._middle()
        margin = 0.45 * self.tol
        goes_up = self._upper / expected > expected / self._lower
        guess = expected * (1 + margin if goes_up else 1 - margin)
        return guess if self._lower < guess < self._upper else self._middle()

    def _at(self, eta: float) -> float:
        """Return the rise at ``eta``, evaluated once."""
        if eta not in self._rises:
            if len(self._rises) >= self.max_evaluations:
                raise _OutOfEvaluationsError
            rise = self.rise(eta)
            self._rises[eta] = math.inf if math.isnan(rise) else rise
        return self._rises[eta]


def _factors() -> Iterator[float]:
    """Yield the factors from one rate to the next: a dozen times two, then ever larger ones."""
    factor = _FACTOR
    for times in count(1):
        if times > _PATIENCE:
            factor = min(factor**2, _LARGEST)
        yield factor


def _doubled(eta: float, largest: float) -> Iterator[float]:
    """Yield a rate and larger and larger ones, up to and with the largest."""
    yield eta
    for factor in _factors():
        if eta >= largest:
            return
        eta = min(eta * factor, largest)
        yield eta


def _halved(eta: float) -> Iterator[float]:
    """Yield a rate and smaller and smaller ones."""
    yield eta
    for factor in _factors():
        if eta / factor <= _SMALLEST:
            return
        eta /= factor
        yield eta
