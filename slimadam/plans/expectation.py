"""The outcome to expect of a plan, as the committed experiments found it.

A second moment that is replaced by something of signal-to-noise ratio ``SNR`` loses the share ``1 / (1 + SNR)`` of its
mean square, ``var / (mean**2 + var)``. Averaged over a model's elements that share orders plans by how far training
with them strays from AdamW; in which direction depends on the task (``python -m benchmarks.calibration gap``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from slimadam.state.rule import Rule

OBSERVED: Final = (
    (0.1, -0.0052, 0.0076),
    (0.2, -0.0043, 0.0129),
    (0.3, -0.0130, 0.0323),
    (1.0, -0.0745, 0.0247),
)
"""Up to a share averaged away: the differences to AdamW's held-out loss between which 80% of the runs ended."""


class Expectation(NamedTuple):
    """The outcome to expect of a plan.

    Attributes:
        averaged_away: Share of the second moments' mean square that the plan's averages leave out, in 0..1.
        lower: Of ten runs with as much averaged away, one ended lower than this against AdamW's held-out loss.
        upper: And one higher than this; both as shares of AdamW's loss.
    """

    averaged_away: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return (
            f"{self.averaged_away:.0%} of the second moments' mean square is averaged away; 8 of 10 runs with as much "
            f"ended within {self.lower:+.1%} to {self.upper:+.1%} of AdamW's held-out loss"
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
    _, lower, upper = next(row for row in OBSERVED if share <= row[0])
    return Expectation(share, lower, upper)
