"""Samples of second moments that are tracked in full: when they need gradients, and what is measured of them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.interface import second_moment_dtype
from slimadam.measurement.slices import Index, TrackedSlices, counts_of, shard_of, take
from slimadam.measurement.snr import snr
from slimadam.state import second_moment
from slimadam.state.rule import FACTORED, Rule
from slimadam.utils.dtensor import full_tensor, is_dtensor

MEASUREMENTS: Final = 3
"""Measurements in a row that a decline is judged by, and at least as many before them."""
USUAL_MEASUREMENTS: Final = 8
"""Of how many the level is the mean that a decline is judged by."""
PHASES: Final = 16
"""How many places earlier releases chose one of for each sample."""
_DEVIATIONS = 4
_STILL_FILLING = 0.06
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def thinning(beta2: float) -> int:
    """Return every how many steps a sample needs to see the gradient.

    Independent Gaussian gradients whose variances differ within a slice by ``h = std / mean`` give a second moment
    with ``1 / SNR = h**2 + 2 (1 + h**2) / N``, where ``N = (1 + beta2) / (1 - beta2)`` is how many of them the
    exponential average holds. Seeing every ``n``-th with ``beta2**n`` divides the SNR by about
    ``1 + 2 (n - 1) (SNR + 1) / N``: at most 1.06 at ``SNR = 1`` and 1.33 at 10, where nothing is decided.
    """
    return max(1, round(0.03 / (1 - beta2)))


def filling(beta2: float) -> int:
    """Return the steps after which a second moment has forgotten all but 5% of where it started."""
    return math.ceil(3 / (1 - beta2))


def next_look(step: int, beta2: float, interval: int) -> int:
    """Return the next step in which a sample sees the gradient.

    It rests until :func:`filling` steps before each measurement, then sees one in :func:`thinning` steps at distances
    without a period, or it would see always or never what has a gradient in each second or tenth step.

    Args:
        step: The first step in question, from 0.
        beta2: Decay rate of second moments.
        interval: Steps between measurements.
    """
    every, rest = thinning(beta2), interval - filling(beta2)
    while True:
        first = max(step, step - step % interval + rest)
        in_turn = (
            number * every + int(every * (number * _GOLDEN_RATIO % 1)) for number in itertools.count(first // every)
        )
        look = next(at for at in in_turn if at >= first)
        if look % interval >= rest:
            return look
        step = look  # in the rest of a later interval


@dataclass
class Sample(TrackedSlices):
    """The tracked second moments of one parameter, and what was measured of them.

    A measurement of a DTensor gathers what each rank tracks. ``unfilled`` is the weight that the start at zero still
    has. ``window`` is the interval in which it last saw a gradient, ``arrived`` the share of that interval's looks that
    met one. ``usual`` are the first finite SNRs, but for those clearly below them; ``recent`` are the last of these,
    until one comes back up; ``lowest`` is the lowest SNR that one came back from.
    """

    cutoff: float = 1.0
    phase: int = PHASES // 2
    unfilled: float = 1.0
    window: int = -1
    arrived: float = 1.0
    latest: float = math.nan
    measured: int = 0
    usual: Sequence[float] = field(default_factory=list)
    recent: Sequence[float] = field(default_factory=list)
    lowest: float = math.inf

    @classmethod
    def of(cls, param: Tensor, rule: Rule, index: Index, cutoff: float) -> Sample | None:
        """Return the sample of a parameter, or of a part; None where shards are not blocks of it.

        Args:
            param: The parameter.
            rule: How its second moment, or the part's, is stored.
            index: Position of the sample.
            cutoff: SNR to compare with.
        """
        shard = None
        if is_dtensor(param):
            shard = None if rule.part else shard_of(param, is_flat=len(index) != param.dim())
            if shard is None:
                return None
        return cls(rule, index, second_moment_dtype(param.dtype), shard, cutoff=cutoff)

    def look(self, grad: Tensor, step: int, beta2: float, interval: int) -> tuple[Tensor, Tensor, float]:
        """Return the second moments, what they see of a gradient, and by how much they decay.

        The first look of an interval also decays for the rest before it, for as much of that as looks of the interval
        before met a gradient.

        Args:
            grad: This rank's gradient.
            step: The optimizer step, from 0.
            beta2: Decay rate of second moments.
            interval: Steps between measurements.
        """
        moment, seen = self.seen(grad)
        every, rest, window = thinning(beta2), max(0, interval - filling(beta2)), step // interval
        share, steps = every / (interval - rest), float(every)
        self.unfilled *= beta2**every
        if window == self.window:
            self.arrived = min(1.0, self.arrived + share)
        else:
            steps += rest * self.arrived
            self.window, self.arrived = window, share
        return moment, seen, beta2**steps

    def start(self, second_moment: Tensor) -> None:
        """Begin with the true second moment, and measure it."""
        averages = [second_moment.mean(dims, keepdim=True) for dims in self.rule.averaged_dims(second_moment.dim())]
        sampled = take(second_moment, self.index)
        self.moment, self.unfilled = sampled[self.there].to(self.dtype, copy=True), 0.0
        self._record(self._snr(sampled, averages))

    @torch.no_grad()
    def measure(self, state: Mapping[str, Any]) -> None:
        """Measure, unless the sample is still filling or its factored parameter has no state (collective)."""
        averages = second_moment.moments_of(state, [self.rule])
        is_factored = self.rule.form == FACTORED
        if self.moment is not None and self.unfilled <= _STILL_FILLING and (averages or not is_factored):
            averages = [full_tensor(one) for one in averages] if is_factored else averages
            self._record(self._snr(self.full_moment(), averages))

    def _snr(self, moment: Tensor, averages: Sequence[Tensor]) -> float:
        """Compute the SNR of the sample, defined as :func:`slimadam.snr` of all of it (arXiv 2503.01843).

        The factored form's row and column averages say what is expected of the sample. Infinity where the sample is
        constant or no gradient has reached it.
        """
        if self.rule.form == FACTORED:
            return self.factored_snr(moment, averages)
        return snr(moment.cpu(), self.rule.dims if len(self.index) > 1 else 0)

    def _record(self, value: float) -> None:
        """Add a measurement; one that is not finite tells nothing about a level."""
        self.latest = value
        self.measured += 1
        if not math.isfinite(value):
            return
        recent = [*self.recent, value]
        if len(self.usual) < MEASUREMENTS or value >= self._clearly_low:
            self.lowest = min(self.lowest, *recent)
            self.usual, recent = [*self.usual, *recent][:USUAL_MEASUREMENTS], []
        self.recent = recent[-MEASUREMENTS:]

    @property
    def level(self) -> float:
        """Geometric mean of the usual measurements."""
        return math.exp(statistics.fmean(map(_log, self.usual)))

    @property
    def _clearly_low(self) -> float:
        spread = statistics.stdev(map(_log, self.usual))
        return min(self.cutoff, self.level / 2, self.level * math.exp(-_DEVIATIONS * spread))

    @property
    def declined(self) -> bool:
        """True where the last measurements are clearly low, and lower than any that it came back from."""
        return len(self.recent) == MEASUREMENTS and self.level >= self.cutoff and max(self.recent) < self.lowest

    def loaded(self, key: str, saved: Mapping[str, Any]) -> Sample:
        """Return a sample that goes on from a saved one, also where earlier releases had placed it.

        Args:
            key: Name of the parameter, for errors.
            saved: Its fields from ``phase`` on; the tensor is copied.

        Raises:
            ValueError: It has another shape.
        """
        values = dict(saved)
        moment = values.pop("moment")
        if moment is not None and tuple(moment.shape) != counts_of(self.index):
            raise ValueError(
                f"{key!r}: the saved sample is of shape {tuple(moment.shape)}, this plan's has shape "
                f"{counts_of(self.index)}; load it under the plan that it was saved under"
            )
        starts = [(one.step * values["phase"] // PHASES, one) for one in self.index]
        index = tuple(slice(start, start + one.stop - one.start, one.step) for start, one in starts)
        after = replace(self, index=index, **values)
        if moment is not None:
            after.moment = moment.detach()[after.there].to(self.dtype, copy=True)
        return after


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))
