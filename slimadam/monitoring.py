"""Does averaging still hold? Full second moments of a few slices, watched after compression.

The statistic is that of :mod:`slimadam.snr` (arXiv 2503.01843), taken over a sample of the parameter. Nothing here
knows an optimizer: it is told names, rules and gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.errors import shown
from slimadam.functional import second_moment_dtype
from slimadam.rules import Dims, Form, Rule
from slimadam.snr import FACTORED, snr

logger = logging.getLogger("slimadam")

LARGEST_SHARE: Final = 0.01
SMALLEST_SAMPLE: Final = 32
SHORTEST_INTERVAL: Final = 200
MEASUREMENTS: Final = 3
"""Measurements in a row that a level, and a decline from it, is judged by."""

_PHASES = 16
_MIDDLE = _PHASES // 2
_STILL_FILLING = 0.06
_NAMES_IN_WARNING = 5

StoredMoments = Callable[[], Mapping[str, Sequence[Tensor]]]
"""Returns the second-moment tensors that the optimizer stores, by name."""


@dataclass(frozen=True)
class Check:
    """What the sample says about one compressed parameter.

    Attributes:
        snr: SNR of the sample when it was last measured; NaN before.
        cutoff: What it is compared with.
        form: How the parameter's second moment is stored, as in :class:`~slimadam.Rule`.
        dims: Dimensions that share one value.
        sampled: Elements whose full second moment is tracked.
        ready: Whether it has been measured.
        reason: What to make of it, in words.
    """

    snr: float
    cutoff: float
    form: Form
    dims: Dims
    sampled: int
    ready: bool
    reason: str


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
        return (tensor if tensor.dim() == len(self.shape) else tensor.reshape(-1))[self.index]


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
class _Sample:
    """The tracked second moments of one parameter, and what was measured of them.

    ``unfilled`` is the weight that the start at zero still has. ``first`` and ``recent`` are finite SNRs of the first
    and of the last measurements after them.
    """

    rule: Rule
    placement: Placement
    dtype: torch.dtype
    moment: Tensor | None = None
    unfilled: float = 1.0
    latest: float = math.nan
    measured: int = 0
    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)

    @property
    def elements(self) -> int:
        return math.prod(self.placement.counts)

    def moment_beside(self, grad: Tensor) -> Tensor:
        """The tracked second moments, on the gradient's device."""
        if self.moment is None:
            self.moment = torch.zeros(self.placement.counts, dtype=self.dtype, device=grad.device)
        elif self.moment.device != grad.device:
            self.moment = self.moment.to(grad.device)
        return self.moment

    def start(self, second_moment: Tensor) -> None:
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
        self.moment = self.placement.take(second_moment).to(self.dtype, copy=True)
        self.unfilled = 0.0
        self.record(found[phase])

    def record(self, value: float) -> None:
        """Add a measurement; one that is not finite tells nothing about a level."""
        self.latest = value
        self.measured += 1
        if not math.isfinite(value):
            return
        if len(self.first) < MEASUREMENTS:
            self.first.append(value)
        else:
            self.recent = [*self.recent, value][-MEASUREMENTS:]

    @property
    def first_level(self) -> float:
        """Geometric mean of the first measurements."""
        return math.exp(math.fsum(math.log(max(value, 1e-300)) for value in self.first) / len(self.first))

    def declined(self, cutoff: float) -> bool:
        """Whether the last measurements are all below the cutoff and half of the first level, which was above it."""
        return (
            len(self.recent) == MEASUREMENTS
            and self.first_level >= cutoff
            and max(self.recent) < min(cutoff, self.first_level / 2)
        )


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


class Monitor:
    """Tracks full second moments of a sample of each compressed parameter, and warns where averaging stops holding.

    After each optimizer step call :meth:`update` for each parameter group, then :meth:`watch` once.

    A sample is measured every ``interval`` steps: every 200, or ``1 / (1 - beta2)`` where that is longer. It
    follows gradients only in the ``3 / (1 - beta2)`` steps before, and not in each of them where ``beta2`` is close
    to 1 (:func:`thinning`).

    The one warning comes where a decline is certain: three measurements in a row are below the cutoff and below
    half of the level (geometric mean) of the first three. So a parameter that was below the cutoff from the start,
    as plans calibrated at a smaller learning rate have some, is reported by :meth:`check` but is no reason to warn.

    Args:
        cutoff: SNR below which averaging is in doubt: that of the plan.
        shortest_interval: Steps between measurements, at least.

    Attributes:
        steps: Optimizer steps watched.
    """

    def __init__(self, cutoff: float = 1.0, shortest_interval: int = SHORTEST_INTERVAL) -> None:
        if not isinstance(shortest_interval, int) or shortest_interval < 1:
            raise ValueError(f"shortest_interval={shortest_interval!r} must be an integer >= 1")
        self.cutoff = cutoff
        self.steps = 0
        self._shortest_interval = shortest_interval
        self._longest_memory = 0.0
        self._warned = False
        self._samples: dict[str, _Sample] = {}
        self._left_out: dict[str, Check] = {}

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return max(self._shortest_interval, round(self._longest_memory))

    @property
    def memory(self) -> int:
        """Bytes of the tracked second moments, known before the first step."""
        return sum(sample.elements * sample.dtype.itemsize for sample in self._samples.values())

    def add(self, key: str, rule: Rule, param: Tensor) -> None:
        """Watch a parameter, or a part of one, from now on; the sample starts at zero.

        Args:
            key: Its name.
            rule: How its second moment is stored; full ones are not watched.
            param: The parameter, for its shape and precision.
        """
        self.drop(key)
        if rule.form == "full":
            return
        placement = place(rule, tuple(rule.take(param).shape))
        if placement is not None and not param.is_complex():
            self._samples[key] = _Sample(rule, placement, second_moment_dtype(param.dtype))
            return
        reason = "complex parameters are not monitored" if param.is_complex() else "too small to monitor"
        self._left_out[key] = Check(math.nan, self.cutoff, rule.form, rule.dims, 0, False, reason)

    def start(self, key: str, second_moment: Tensor) -> None:
        """Let a sample begin at the true second moment, at the moment of compression, and measure it.

        Of sixteen places for the sample the one is chosen whose SNR is closest to their mean.

        Args:
            key: A name that was added; one that is not sampled is ignored.
            second_moment: In full, of the parameter's (or part's) shape.
        """
        if key in self._samples:
            self._samples[key].start(second_moment)

    def drop(self, key: str) -> None:
        """Forget a parameter, as when it goes back to a full second moment."""
        self._samples.pop(key, None)
        self._left_out.pop(key, None)

    @torch.no_grad()
    def update(self, grads: Iterable[tuple[str, Tensor | None]], beta2: float) -> None:
        """Let the samples see this step's gradients: ``v <- beta2 v + (1 - beta2) g**2``, where it is time.

        Steps in which a sample rests still count for what it forgets, as they do for the true second moment.

        Args:
            grads: Name and gradient of each parameter of a group (of the whole parameter for each of its parts).
                Those without a gradient, and those that are not watched, are passed over.
            beta2: The group's decay rate of second moments.
        """
        self._longest_memory = max(self._longest_memory, 1 / (1 - beta2))
        every, resting = thinning(beta2), max(0, self.interval - filling(beta2))
        awake = self.steps % self.interval - resting
        if awake < 0 or self.steps % every:
            return
        moments, seen = [], []
        for key, grad in grads:
            if grad is not None and key in self._samples:
                sample = self._samples[key]
                moments.append(sample.moment_beside(grad))
                seen.append(sample.placement.take(sample.rule.take(grad)))
                sample.unfilled *= beta2**every
        if moments:
            forgotten = every + resting if awake < every else every
            torch._foreach_mul_(moments, beta2**forgotten)
            torch._foreach_addcmul_(moments, seen, seen, 1 - beta2**every)

    @torch.no_grad()
    def watch(self, stored: StoredMoments) -> None:
        """Count an optimizer step; every ``interval`` steps measure, and warn once where averaging stopped holding.

        Args:
            stored: Returns by name at least the row and column averages of factored parameters; called only to
                measure.
        """
        self.steps += 1
        if self.steps % self.interval:
            return
        averages = stored()
        for key, sample in self._samples.items():
            if sample.moment is not None and sample.unfilled <= _STILL_FILLING:
                sample.record(sampled_snr(sample.rule, sample.placement, sample.moment, averages.get(key, ())))
        self._warn_once()

    def check(self) -> dict[str, Check]:
        """What is known of each compressed parameter, as of the last measurement. Nothing is computed."""
        return {key: self._check_sample(sample) for key, sample in self._samples.items()} | self._left_out

    def _check_sample(self, sample: _Sample) -> Check:
        return Check(
            snr=sample.latest,
            cutoff=self.cutoff,
            form=sample.rule.form,
            dims=sample.rule.dims,
            sampled=sample.elements,
            ready=sample.measured > 0,
            reason=self._in_words(sample),
        )

    def _in_words(self, sample: _Sample) -> str:
        if not sample.measured:
            return (
                "not ready: too few gradients since it was compressed (compiled and capturable steps are not watched)"
            )
        if math.isnan(sample.latest):
            return "gradients in the sample were not finite"
        if sample.latest == math.inf:
            return "no gradient has reached the sample, or all of it alike"
        if sample.latest >= self.cutoff:
            return "averaging holds"
        if sample.declined(self.cutoff):
            return f"fell from {sample.first_level:.2g}: averaging no longer holds"
        return "below the cutoff, but not for long, or not clearly below where it began"

    def _warn_once(self) -> None:
        declined = {key: sample for key, sample in self._samples.items() if sample.declined(self.cutoff)}
        if self._warned or not declined:
            return
        self._warned = True
        named = [
            f"{key!r} (SNR {sample.first_level:.2g} -> {sample.latest:.2g})"
            for key, sample in list(declined.items())[:_NAMES_IN_WARNING]
        ]
        more = len(declined) - len(named)
        below = sum(sample.latest < self.cutoff for sample in self._samples.values())
        logger.warning(
            "averaging second moments no longer holds, by a sample of each, for %s%s; of %d monitored parameters %d "
            "are below the cutoff %g now; opt.expand(name) returns one to a full second moment, opt.snr_check() shows "
            "all",
            ", ".join(named),
            f" and {more} more" if more else "",
            len(self._samples),
            below,
            self.cutoff,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers from which :meth:`load_state_dict` goes on to the last bit."""
        return {
            "steps": self.steps,
            "longest_memory": self._longest_memory,
            "warned": self._warned,
            "samples": {key: _saved(sample) for key, sample in self._samples.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Names that it lacks start anew, names that are not watched are passed over.

        Args:
            state_dict: What :meth:`state_dict` returned; tensors are copied.

        Raises:
            ValueError: It is damaged, or a sample has another shape; nothing has changed then.
        """
        try:
            saved = state_dict["samples"]
            samples = {
                key: _loaded(key, sample, saved[key]) if key in saved else sample
                for key, sample in self._samples.items()
            }
            steps, memory = int(state_dict["steps"]), float(state_dict["longest_memory"])
            warned = bool(state_dict["warned"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"the saved monitor is damaged ({error!r}); pass what state_dict() returned") from error
        self.steps, self._longest_memory, self._warned, self._samples = steps, memory, warned, samples


_SAVED = ("moment", "unfilled", "latest", "measured", "first", "recent")


def _saved(sample: _Sample) -> dict[str, Any]:
    values = {name: getattr(sample, name) for name in _SAVED}
    return {**values, "first": list(sample.first), "recent": list(sample.recent), "phase": sample.placement.phase}


def _loaded(key: str, sample: _Sample, saved: Mapping[str, Any]) -> _Sample:
    values = {name: saved[name] for name in _SAVED}
    moment = values["moment"]
    if moment is not None:
        if not isinstance(moment, Tensor) or tuple(moment.shape) != sample.placement.counts:
            raise ValueError(
                f"{key!r}: the saved sample is {shown(getattr(moment, 'shape', moment))}, this plan's has shape "
                f"{sample.placement.counts}; load it under the plan that it was saved under"
            )
        values["moment"] = moment.detach().to(sample.dtype, copy=True)
    values |= {"first": list(saved["first"]), "recent": list(saved["recent"])}
    return replace(sample, placement=replace(sample.placement, phase=int(saved["phase"])), **values)
