"""Finding where a loss that was computed in 16 bits rises: rounding makes it jump by more than a small step does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from slimadam.curvature.probe.bracketing import FACTOR, LARGEST, SMALLEST, Search, Status, next_factor

_UNCERTAIN = 8
"""Halvings below a certain rise after which every descent that can be told has been passed."""
_VANISHING = (1 / 16, 1 / 32, 1 / 64)
"""Shares of a rate at which a smooth loss has hardly begun to fall."""
_NEIGHBOURS = (0.9, 1.1)
_CLEARLY = 3.0


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
            factor = next_factor(factor, halvings)
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
            factor = next_factor(factor, doublings)
            eta = min(eta * factor, largest)

    def _closer(self, upper: float) -> tuple[float, float]:
        """What is known not to have risen below ``upper``, and both closer where they are far apart."""
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
        """Whether the fall at ``eta`` is more than the jumps where the loss has hardly begun to fall."""
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
