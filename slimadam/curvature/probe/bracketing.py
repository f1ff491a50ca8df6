"""Finding where a loss along a line first rises above its start, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

Status = Literal["found", "no increase", "no descent", "noisy", "too noisy", "not finite", "out of evaluations"]
FACTOR = 2.0
_PATIENCE = 12
"""Doublings, or halvings, after which the factor itself is squared from one to the next."""
_LARGEST_FACTOR = 1e30
LARGEST = 1e30
"""No larger rate is tried: parameters in float32 would be infinite."""
SMALLEST = 1e-60


_UNCERTAIN = 8
"""Halvings below a certain rise after which every descent that can be told has been passed."""
_VANISHING = (1 / 16, 1 / 32, 1 / 64)
"""Shares of a rate at which a smooth loss has hardly begun to fall."""
_NEIGHBOURS = (0.9, 1.1)
_CLEARLY = 3.0


class Crossing(NamedTuple):
    """Bracket of a rate at which a rise changes its sign.

    Attributes:
        lower: The largest ``eta`` known not to rise; 0 where there is none.
        upper: The smallest known to rise; infinite where there is none.
        status: What was found, see :class:`Search`.
    """

    lower: float
    upper: float
    status: Status


def _next_factor(factor: float, times: int) -> float:
    """Return the factor from one rate to the next after so many of them."""
    return min(factor**2, _LARGEST_FACTOR) if times > _PATIENCE else factor


class OutOfEvaluations(Exception):  # noqa: N818
    """No further evaluation is allowed."""


class Search:
    """Looks for ``min {eta > 0: rise(eta) > 0}``: doubles or halves to a bracket, then narrows it.

    Within the bracket ``rise(eta) / eta``, a straight line where the loss is quadratic, says where the crossing is
    to be expected; a guess on either side closes the bracket in two evaluations. Where two evaluations have not
    halved the bracket the third bisects it, so that no loss takes more than a multiple of bisection.

    Args:
        rise: Loss at ``eta`` minus loss at 0; NaN and infinity count as an increase.
        tol: The bracket is narrow enough when ``1 - lower / upper <= tol``.
        resolution: Differences of the loss up to this are not told from zero.
        max_evaluations: Calls of ``rise`` that are allowed.
        max_eta: No larger one is tried.
        stops_at_noise: Stop narrowing at a difference within ``resolution``.
    """

    def __init__(
        self,
        rise: Callable[[float], float],
        tol: float,
        resolution: float,
        max_evaluations: int,
        max_eta: float = math.inf,
        *,
        stops_at_noise: bool = False,
    ) -> None:
        self._rise = rise
        self._tol = tol
        self._resolution = resolution
        self._left = max_evaluations
        self._max_eta = max_eta
        self._stops_at_noise = stops_at_noise
        self._lower, self._lower_slope = 0.0, math.nan
        self._upper, self._upper_slope = math.inf, math.nan
        self._has_descended = False

    def run(self, start: float) -> Crossing:
        """Search from a first guess.

        Args:
            start: Positive and finite.
        """
        try:
            status = self._bracket(min(start, self._max_eta))
            if status == "found":
                status = self._narrow()
            if status == "found" and not self._has_descended and not self._descends_below():
                status = "no descent"
        except OutOfEvaluations:
            status = "out of evaluations"
        return Crossing(self._lower, self._upper, status)

    def _bracket(self, eta: float) -> Status:
        self._evaluate(eta)
        if self._upper == eta:
            return self._halve(eta)
        largest = min(self._max_eta, LARGEST)
        factor, doublings = FACTOR, 0
        while math.isinf(self._upper):
            if eta >= largest:
                return "no increase"
            doublings += 1
            factor = _next_factor(factor, doublings)
            eta = min(eta * factor, largest)
            self._evaluate(eta)
        return "found"

    def _halve(self, eta: float) -> Status:
        """Down to a descent; after two differences too small to tell there is none."""
        unresolved = halvings = 0
        factor = FACTOR
        while unresolved < 2 and eta / factor > SMALLEST:
            eta /= factor
            rise = self._evaluate(eta)
            jumped = factor > FACTOR
            halvings += 1
            factor = _next_factor(factor, halvings)
            unresolved = unresolved + 1 if abs(rise) <= self._resolution else 0
            if rise < -self._resolution or (unresolved and jumped):
                return "found"
        return "no descent"

    def _narrow(self) -> Status:
        before, guesses = self._upper - self._lower, 0
        while 1 - self._lower / self._upper > self._tol:
            rise = self._evaluate(self._middle() if guesses == 2 else self._guess())
            if self._stops_at_noise and abs(rise) <= self._resolution:
                return "noisy"
            guesses += 1
            if guesses == 3 or self._upper - self._lower <= before / 2:
                before, guesses = self._upper - self._lower, 0
        return "found"

    def _descends_below(self) -> bool:
        """Return whether the loss falls on the way to a crossing within rounding of no change at all."""
        return self._ask(self._lower / FACTOR) < -self._resolution

    def _middle(self) -> float:
        """Halfway, in the rates' logarithms where they differ by much."""
        if self._lower and self._upper / self._lower > 2 * FACTOR:
            return math.sqrt(self._lower * self._upper)
        return (self._lower + self._upper) / 2

    def _guess(self) -> float:
        """The expected crossing, moved towards the farther end so that it is likely to become the nearer one."""
        steepening = self._upper_slope - self._lower_slope
        if not math.isfinite(steepening) or steepening <= 0:
            return self._middle()
        expected = self._lower - self._lower_slope * (self._upper - self._lower) / steepening
        if not self._lower < expected < self._upper:
            return self._middle()
        margin = 0.45 * self._tol
        goes_up = self._upper / expected > expected / self._lower if self._lower else True
        guess = expected * (1 + margin if goes_up else 1 - margin)
        return guess if self._lower < guess < self._upper else self._middle()

    def _evaluate(self, eta: float) -> float:
        """The rise at ``eta``, which becomes an end of the bracket."""
        rise = self._ask(eta)
        self._has_descended = self._has_descended or rise < -self._resolution
        # While it is only being bracketed, a difference too small to tell is no increase.
        if rise > (0.0 if self._has_descended else self._resolution):
            self._upper, self._upper_slope = eta, rise / eta
        else:
            self._lower, self._lower_slope = eta, rise / eta
        return rise

    def _ask(self, eta: float) -> float:
        if not self._left:
            raise OutOfEvaluations
        self._left -= 1
        rise = self._rise(eta)
        return math.inf if math.isnan(rise) else rise


class RoughSearch(Search):
    """Looks for ``min {eta > 0: rise(eta) > 0}`` where neither a small rise nor a small fall means anything.

    First climbs until the loss has certainly risen, or crossed after it had certainly fallen, then goes back down to
    a fall. One that is not certain by its size is believed where it stands out from the jumps at much smaller rates,
    and where its neighbours have it too. Then narrows the bracket as every search does.

    Args:
        rise: As for :class:`Search`, like the rest.
        tol: How narrow.
        resolution: Differences up to this are not told from zero.
        max_evaluations: Calls of ``rise`` that are allowed.
        max_eta: No larger one is tried.
        stops_at_noise: Stop narrowing at a difference within ``resolution``.
        certain: Differences above this are no rounding.
    """

    def __init__(
        self,
        rise: Callable[[float], float],
        tol: float,
        resolution: float,
        max_evaluations: int,
        max_eta: float = math.inf,
        *,
        stops_at_noise: bool = False,
        certain: float,
    ) -> None:
        super().__init__(rise, tol, resolution, max_evaluations, max_eta, stops_at_noise=stops_at_noise)
        self._certain = max(certain, resolution)
        self._rises: dict[float, float] = {}

    def _bracket(self, eta: float) -> Status:
        below = self._below_certain_rise(eta)
        if below is None:
            return "no descent"
        upper = self._climb(below)
        if upper is None:
            self._lower = min(self._max_eta, LARGEST)
            return "no increase"
        return self._descend(*self._closer(upper))

    def _at(self, eta: float) -> float:
        """The rise at ``eta``, evaluated once."""
        if eta not in self._rises:
            self._rises[eta] = self._ask(eta)
        return self._rises[eta]

    def _below_certain_rise(self, eta: float) -> float | None:
        """``eta``, or what it is first halved to, where the loss has not certainly risen."""
        factor, halvings = FACTOR, 0
        while self._at(eta) > self._certain:
            if eta / factor <= SMALLEST:
                return None
            eta /= factor
            halvings += 1
            factor = _next_factor(factor, halvings)
        return eta

    def _climb(self, eta: float) -> float | None:
        """Up to where the loss has certainly risen, or is above its start after it had certainly fallen."""
        largest = min(self._max_eta, LARGEST)
        factor, doublings, has_fallen = FACTOR, 0, False
        while True:
            rise = self._at(eta)
            has_fallen = has_fallen or rise < -self._certain
            if rise > (0.0 if has_fallen else self._certain) or (eta >= largest and rise > self._resolution):
                self._upper = eta
                return eta
            if eta >= largest:
                return None
            self._lower = eta if has_fallen else 0.0
            doublings += 1
            factor = _next_factor(factor, doublings)
            eta = min(eta * factor, largest)

    def _closer(self, upper: float) -> tuple[float, float]:
        """Return a rate below ``upper`` that has not risen, and ``upper``, closer where they are far apart."""
        lower = max((eta for eta in self._rises if eta < upper), default=0.0)
        while lower and upper / lower > FACTOR**2 and self._at(lower) >= -self._certain:
            middle = math.sqrt(lower * upper)
            lower, upper = (lower, middle) if self._at(middle) > self._certain else (middle, upper)
        return lower, upper

    def _descend(self, lower: float, upper: float) -> Status:
        """Down from a rise to a fall that is none of rounding."""
        if lower and self._at(lower) < -self._certain:
            return self._between(lower)
        eta, uncertain, unresolved = upper, 0, 0
        while uncertain < _UNCERTAIN and unresolved < 2 and eta > SMALLEST:
            eta /= FACTOR
            rise = self._at(eta)
            if rise < -self._certain:
                return self._between(eta)
            uncertain += rise <= self._certain
            unresolved = unresolved + 1 if abs(rise) <= self._resolution else 0
        lowest = min((eta for eta in self._rises if eta < upper), key=self._at)
        if self._at(lowest) >= -self._resolution:
            return "no descent"
        return self._between(lowest) if self._stands_out(lowest) else "too noisy"

    def _stands_out(self, eta: float) -> bool:
        """Return whether the fall at ``eta`` exceeds the jumps where the loss has hardly begun to fall."""
        fall = -self._at(eta)
        jumps = [0.0, *self._of(eta, _VANISHING)]
        if fall <= _CLEARLY * max(self._resolution, max(jumps) - min(jumps)):
            return False
        return all(rise < -fall / 2 for rise in self._of(eta, _NEIGHBOURS))

    def _of(self, eta: float, shares: Iterable[float]) -> list[float]:
        return [self._at(eta * share) for share in shares]

    def _between(self, lower: float) -> Status:
        """The bracket from a fall up to the next rise."""
        upper = min(eta for eta, rise in self._rises.items() if eta > lower and rise > 0)
        lower = max(eta for eta, rise in self._rises.items() if lower <= eta < upper)
        self._lower, self._lower_slope = lower, self._at(lower) / lower
        self._upper, self._upper_slope = upper, self._at(upper) / upper
        self._has_descended = True
        return "found"
