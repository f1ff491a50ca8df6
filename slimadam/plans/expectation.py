"""The outcome to expect of a plan, as the committed experiments found it.

A second moment that is replaced by something of signal-to-noise ratio ``SNR`` loses the share ``1 / (1 + SNR)`` of its
mean square, ``var / (mean**2 + var)``. Averaged over a model's elements that share says roughly what training with a
plan costs (``python -m benchmarks.expectation``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from slimadam.state.rule import Rule

SLOPE: Final = 0.0106
"""Difference to AdamW's held-out loss, as a share of it, where all of the mean square is lost."""
DEVIATION: Final = 0.0040
"""Standard deviation of the differences from that line."""
_OF_8_IN_10: Final = 1.2816
"""Standard deviations within which 80% of a normal distribution lie."""


class Expectation(NamedTuple):
    """The outcome to expect of a plan.

    Attributes:
        averaged_away: Share of the second moments' mean square that the plan loses, in 0..1.
        lower: Of ten plans that lose as much, one cost less than this.
        upper: And one more than this; both as differences to AdamW's held-out loss, as shares of it.
    """

    averaged_away: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return (
            f"{self.averaged_away:.0%} of the second moments' mean square is lost, which costs about "
            f"{(self.lower + self.upper) / 2:+.1%} of AdamW's held-out loss at its best learning rate, in 8 of 10 "
            f"cases {self.lower:+.1%} to {self.upper:+.1%}"
        )


def expectation(rules: Iterable[Rule]) -> Expectation | None:
    """Return what to expect of the rules of all parameters; None where a compressed one has no SNR or no shape."""
    lost, elements = 0.0, 0
    for rule in rules:
        form = rule.stored_as
        snr = rule.snr.get(form.candidate) if form.known_snr is None else form.known_snr
        if rule.shape is None or snr is None:
            return None
        elements += math.prod(rule.shape)
        lost += math.prod(rule.shape) / (1 + snr)
    if not elements:
        return None
    share = lost / elements
    reach = _OF_8_IN_10 * DEVIATION
    return Expectation(share, SLOPE * share - reach, SLOPE * share + reach)
