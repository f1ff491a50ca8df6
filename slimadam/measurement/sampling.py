"""Samples of second moments that are tracked in full: where they lie, what they follow, what was measured of them.

The statistic is that of :mod:`slimadam.snr` (arXiv 2503.01843).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.measurement.sampling_shards import Index, SampleShard
from slimadam.measurement.snr import snr
from slimadam.state.rule import FACTORED, Rule
from slimadam.utils.errors import shown

LARGEST_SHARE: Final = 0.01
SMALLEST_SAMPLE: Final = 32
MEASUREMENTS: Final = 3
"""Measurements in a row that a decline is judged by, and at least as many before them."""
USUAL_MEASUREMENTS: Final = 8
"""Measurements that say what is usual."""

_PHASES = 16
_MIDDLE = _PHASES // 2
_DEVIATIONS = 4
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def thinning(beta2: float) -> int:
    """Every how many steps a sample needs to see the gradient.

    Independent Gaussian gradients whose variances differ within a slice by ``h = std / mean`` give a second moment
    with ``1 / SNR = h**2 + 2 (1 + h**2) / N``, where ``N = (1 + beta2) / (1 - beta2)`` is how many of them the
    exponential average holds. Seeing every ``n``-th with ``beta2**n`` leaves the time it looks back on as it is and
    ``N / n`` gradients, which divides the SNR by about ``1 + 2 (n - 1) (SNR + 1) / N``. With ``n = 0.03 / (1 - beta2)``
    that is at most 1.06 at ``SNR = 1`` and 1.33 at 10, where nothing is decided; up to ``beta2 = 0.97`` no step is
    left out.
    """
    return max(1, round(0.03 / (1 - beta2)))


def looks_at(step: int, every: int) -> bool:
    """Whether a sample sees the gradient of a step: one in ``every`` steps, at irregular distances.

    At regular ones it would see always or never what has a gradient in each second or tenth step. The fractional parts
    of multiples of the golden ratio are evenly distributed and have no period.
    """
    return step % every == int(every * (step // every * _GOLDEN_RATIO % 1))


def filling(beta2: float) -> int:
    """Steps after which a second moment has forgotten all but 5% of where it started."""
    return math.ceil(3 / (1 - beta2))


@dataclass(frozen=True)
class Placement:
    """Which elements of a parameter are sampled: evenly spaced indices along each kept dimension.

    Attributes:
        shape: Shape of the parameter; of one dimension if all of them are averaged.
        counts: Indices along each dimension; all there are in averaged dimensions.
        strides: Their distance.
        phase: Where the first index lies, in sixteenths of the distance.
    """

    shape: tuple[int, ...]
    counts: tuple[int, ...]
    strides: tuple[int, ...]
    phase: int = _MIDDLE

    @cached_property
    def index(self) -> tuple[slice, ...]:
        """The sample of a tensor of the given shape is ``tensor[index]``, a view."""
        starts = [stride * self.phase // _PHASES for stride in self.strides]
        return tuple(
            slice(start, start + count * stride, stride)
            for start, count, stride in zip(starts, self.counts, self.strides, strict=True)
        )

    def take(self, tensor: Tensor) -> Tensor:
        """The sampled elements; a view unless all dimensions are averaged and the tensor is not contiguous."""
        return self.at(tensor, self.index)

    def at(self, tensor: Tensor, index: Index) -> Tensor:
        """What lies at an index of a tensor, or of a shard, which is flattened where all dimensions are averaged."""
        return (tensor if tensor.dim() == len(self.shape) else tensor.reshape(-1))[index]


def place(rule: Rule, shape: tuple[int, ...]) -> Placement | None:
    """The sample for a parameter: at most 1% of the second-moment elements that the rule saves.

    Slices that share one value (for the factored form: rows) are sampled whole and spread over as many different
    experts or heads as there are, so small dimensions are used up first. Where all dimensions are averaged, single
    elements are sampled at a distance that meets each row and column in turn.

    Returns:
        None if so little is saved that the sample would hold no slice, or fewer than 32 elements.
    """
    elements = math.prod(shape)
    budget = int(LARGEST_SHARE * (elements - rule.stored_elements(shape)))
    kept = [dim for dim in _kept_dims(rule, len(shape)) if shape[dim] > 1]
    if budget < SMALLEST_SAMPLE:
        return None
    if not kept:
        stride = next(n for n in range(elements // budget + 1, elements) if math.gcd(n, elements) == 1)
        count = elements // stride
        return Placement((elements,), (count,), (stride,)) if count >= SMALLEST_SAMPLE else None
    slices = budget // (elements // math.prod(shape[dim] for dim in kept))
    counts = list(shape)
    for dim in sorted(kept, key=shape.__getitem__):
        counts[dim] = min(shape[dim], slices)
        slices //= max(1, counts[dim])
    if math.prod(counts) < SMALLEST_SAMPLE:
        return None
    return Placement(shape, tuple(counts), tuple(size // count for size, count in zip(shape, counts, strict=True)))


def _kept_dims(rule: Rule, ndim: int) -> Iterable[int]:
    """Dimensions along which single indices may be sampled."""
    if rule.form == FACTORED:
        return range(_row_dim(rule, ndim) + 1)
    return [dim for dim in range(ndim) if dim not in rule.dims]


def _row_dim(rule: Rule, ndim: int) -> int:
    """The dimension of a factored parameter along which its rows lie; those before it count matrices."""
    return rule.averaged_dims(ndim)[1][0]


@dataclass
class Sample:
    """The tracked second moments of one parameter, and what was measured of them.

    Of a DTensor each rank tracks what lies in its ``shard``, and only a measurement brings the sample together.
    ``unfilled`` is the weight that the start at zero still has. ``window`` is the interval in which it last saw a
    gradient, ``arrived`` the share of that interval's looks which met one. ``usual`` are the first finite SNRs, but for
    those clearly below them: ``recent`` are the last of these, until one comes back up; ``lowest`` is the lowest SNR
    that one came back from.
    """

    rule: Rule
    placement: Placement
    dtype: torch.dtype
    moment: Tensor | None = None
    unfilled: float = 1.0
    window: int = -1
    arrived: float = 1.0
    latest: float = math.nan
    measured: int = 0
    usual: list[float] = field(default_factory=list)
    lowest: float = math.inf
    recent: list[float] = field(default_factory=list)
    shard: SampleShard | None = None

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.placement.counts)

    @property
    def held(self) -> Index:
        """Which of them this rank tracks."""
        if self.shard is None:
            return tuple(slice(0, count) for count in self.placement.counts)
        return self.shard.indices(self.placement.index)[1]

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Their number along each dimension."""
        return tuple(one.stop - one.start for one in self.held)

    def seen(self, grad: Tensor) -> Tensor:
        """Of this rank's gradient of the parameter what the tracked second moments follow."""
        grad = self.rule.take(grad)
        if self.shard is None:
            return self.placement.take(grad)
        return self.placement.at(grad, self.shard.indices(self.placement.index)[0])

    def whole_moment(self, held: Tensor) -> Tensor:
        """All of the sample, from what each rank tracks, which all must ask."""
        if self.shard is None:
            return held
        all_of_it = held.new_zeros(self.placement.counts)
        all_of_it[self.held] = held
        return self.shard.add_up(all_of_it)

    def moment_beside(self, grad: Tensor) -> Tensor:
        """The tracked second moments, on the gradient's device."""
        if self.moment is None:
            self.moment = torch.zeros(self.held_shape, dtype=self.dtype, device=grad.device)
        elif self.moment.device != grad.device:
            self.moment = self.moment.to(grad.device)
        return self.moment

    def look(self, window: int, share: float) -> float:
        """Count a gradient that is ``share`` of an interval's looks.

        Returns:
            The share of the steps since the last interval that had a gradient, going by that interval; 0 after the
            first look, since what is to be forgotten then has been.
        """
        if window == self.window:
            self.arrived = min(1.0, self.arrived + share)
            return 0.0
        arrived, self.window, self.arrived = self.arrived, window, share
        return arrived

    def start(self, second_moment: Tensor, cutoff: float) -> None:
        """Begin with the true second moment, where the sample says about what the whole does."""
        ndim = second_moment.dim()
        parts = [second_moment.mean(dims, keepdim=True) for dims in self.rule.averaged_dims(ndim)]
        candidates = {phase: replace(self.placement, phase=phase) for phase in range(_PHASES)}
        found = {
            phase: sampled_snr(self.rule, candidate, candidate.take(second_moment), parts)
            for phase, candidate in candidates.items()
        }
        telling = {phase: value for phase, value in found.items() if math.isfinite(value)}
        average = math.fsum(telling.values()) / max(1, len(telling))
        phase = min(telling, key=lambda phase: abs(telling[phase] - average), default=_MIDDLE)
        self.placement = candidates[phase]
        self.moment = self.placement.take(second_moment)[self.held].to(self.dtype, copy=True)
        self.unfilled = 0.0
        self.record(found[phase], cutoff)

    def record(self, value: float, cutoff: float) -> None:
        """Add a measurement; one that is not finite tells nothing about a level."""
        self.latest = value
        self.measured += 1
        if not math.isfinite(value):
            return
        self.recent.append(value)
        if len(self.usual) < MEASUREMENTS or value >= self._clearly_low(cutoff):
            self.lowest = min(self.lowest, *self.recent)
            self.usual = [*self.usual, *self.recent][:USUAL_MEASUREMENTS]
            self.recent = []
        self.recent = self.recent[-MEASUREMENTS:]

    @property
    def level(self) -> float:
        """Geometric mean of the usual measurements."""
        return math.exp(statistics.fmean(map(_log, self.usual)))

    def _clearly_low(self, cutoff: float) -> float:
        """What is below this is below the cutoff, half of the level, and what varies about it."""
        spread = statistics.stdev(map(_log, self.usual))
        return min(cutoff, self.level / 2, self.level * math.exp(-_DEVIATIONS * spread))

    def declined(self, cutoff: float) -> bool:
        """Whether the last measurements are clearly low, and lower than any it came back from."""
        return len(self.recent) == MEASUREMENTS and self.level >= cutoff and max(self.recent) < self.lowest


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def sampled_snr(rule: Rule, placement: Placement, moment: Tensor, parts: Sequence[Tensor]) -> float:
    """SNR of a sample, defined as :func:`slimadam.snr` of the whole.

    Args:
        rule: How the parameter is stored.
        placement: Where the sample lies in it.
        moment: The sample's full second moments, of shape ``placement.counts``.
        parts: The stored second moments; used by the factored form, whose row and column averages say what the
            sample is expected to be. Where leading dimensions count matrices it is the mean over these.

    Returns:
        The ratio; infinity where the sample is constant or no gradient has reached it, NaN where it is not finite.
    """
    moment = moment.cpu()  # small, and the host would wait for each of the numbers that follow
    if rule.form != FACTORED:
        return snr(moment, rule.dims if len(placement.shape) > 1 else 0)
    row_dim = _row_dim(rule, len(placement.shape))
    rows, columns = (part.cpu().to(torch.float64) for part in parts)
    relative = rows / rows.mean(row_dim, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    expected = relative[placement.index[: row_dim + 1]] * columns[placement.index[:row_dim]]
    matrices = [math.prod(placement.counts[:row_dim]), -1]
    found = [
        snr(ratio[product != 0], 0)
        for ratio, product in zip((moment / expected).reshape(matrices), expected.reshape(matrices), strict=True)
    ]
    telling = [value for value in found if value != math.inf]
    return math.fsum(telling) / len(telling) if telling else math.inf


_COUNTS = ("window", "measured")
_RATIOS = ("unfilled", "arrived")
_SNRS = ("latest", "lowest")
_SNR_LISTS = ("usual", "recent")


def saved(sample: Sample) -> dict[str, Any]:
    """What :func:`loaded` goes on from."""
    values = {name: getattr(sample, name) for name in (*_COUNTS, *_RATIOS, *_SNRS)}
    lists = {name: list(getattr(sample, name)) for name in _SNR_LISTS}
    return {**values, **lists, "moment": sample.moment, "phase": sample.placement.phase}


def loaded(key: str, sample: Sample, saved: object) -> Sample:
    """A sample that goes on from what was saved of it; the tensor is copied.

    Raises:
        ValueError: It is damaged, or of another shape.
    """
    if not isinstance(saved, Mapping):
        raise damaged(f"samples[{key!r}]", saved)

    def checked(name: str, fits: Callable[[Any], bool]) -> Any:
        return checked_field(saved, name, fits, f"samples[{key!r}]")

    values = {name: checked(name, _is_snr) for name in _SNRS}
    values |= {name: checked(name, lambda value: is_count(value, -1)) for name in _COUNTS}
    values |= {name: checked(name, lambda value: is_number(value) and 0 <= value <= 1) for name in _RATIOS}
    for name in _SNR_LISTS:
        values[name] = list(checked(name, _are_finite_snrs))
    phase = checked("phase", lambda value: is_count(value) and value < _PHASES)
    moment = checked("moment", lambda value: value is None or (isinstance(value, Tensor) and value.is_floating_point()))
    if moment is not None:
        if tuple(moment.shape) != sample.placement.counts:
            raise ValueError(
                f"{key!r}: the saved sample is of shape {tuple(moment.shape)}, this plan's has shape "
                f"{sample.placement.counts}; load it under the plan that it was saved under"
            )
        moment = moment.detach().to(sample.dtype, copy=True)
    goes_on = replace(sample, placement=replace(sample.placement, phase=phase), moment=moment, **values)
    if moment is not None:
        goes_on.moment = moment[goes_on.held]
    return goes_on


def checked_field(saved: Mapping[str, Any], name: str, fits: Callable[[Any], bool], where: str = "") -> Any:
    """A saved value that fits.

    Raises:
        ValueError: It is missing, or does not fit.
    """
    value = saved.get(name)
    if name not in saved or not fits(value):
        raise damaged(f"{where}[{name!r}]" if where else name, value)
    return value


def damaged(field: str, value: object) -> ValueError:
    """The error for a field that is missing or does not fit."""
    return ValueError(f"the saved monitor is damaged ({field}={shown(value)}); pass what state_dict() returned")


def is_number(value: object) -> bool:
    """Whether it is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object, smallest: int = 0) -> bool:
    """Whether it is an integer that floating-point numbers can count to, and not below the smallest."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value < 2**53


def _is_snr(value: object) -> bool:
    return isinstance(value, float) and not value < 0


def _are_finite_snrs(values: object) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) <= USUAL_MEASUREMENTS
        and all(_is_snr(value) and math.isfinite(value) for value in values)
    )
