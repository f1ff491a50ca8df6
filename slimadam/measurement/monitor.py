"""Does averaging still hold? Full second moments of a few slices, tracked after compression."""

from __future__ import annotations

import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.interface import second_moment_dtype
from slimadam.kernels.reference import scale_grad
from slimadam.layers.splits import key_of
from slimadam.measurement.sampling import (
    Index,
    SampleShard,
    counts_of,
    filling,
    next_look,
    place,
    sampled_snr,
    take,
    thinning,
    within,
)
from slimadam.state import second_moment
from slimadam.state.rule import FACTORED, Dims, FormName, Rule
from slimadam.utils.dtensor import full_tensor, is_dtensor, local_gradient
from slimadam.utils.errors import shown

logger = logging.getLogger("slimadam")

SHORTEST_INTERVAL: Final = 200
MEASUREMENTS: Final = 3
"""Measurements in a row that a decline is judged by, and at least as many before them."""

_USUAL_MEASUREMENTS = 8
_PHASES = 16
_LARGEST_COUNT = 2**53 - 1  # up to which floating-point numbers count each integer
_DEVIATIONS = 4
_STILL_FILLING = 0.06
_NAMES_IN_WARNING = 5


@dataclass(frozen=True)
class Check:
    """State of the sample of one compressed parameter.

    Attributes:
        snr: SNR of the sample when it was last measured; NaN before.
        cutoff: SNR that it is compared with.
        form: How the parameter's second moment is stored, as in :class:`~slimadam.Rule`.
        dims: Dimensions that share one value.
        sampled: Elements whose full second moment is tracked.
        ready: True once it has been measured.
        reason: The conclusion, in words.
    """

    snr: float
    cutoff: float
    form: FormName
    dims: Dims
    sampled: int
    ready: bool
    reason: str


class Monitor:
    """Tracks full second moments of a sample of each compressed parameter, and warns where averaging stops holding.

    A sample is measured every ``interval`` steps: every 200, or ``1 / (1 - beta2)`` where that is longer. It
    sees gradients only in the ``3 / (1 - beta2)`` steps before, and not in each of them where ``beta2`` is close
    to 1 (:func:`~slimadam.measurement.sampling.next_look`). Any other step costs one comparison.

    The one warning comes where a decline is certain: three measurements in a row are below the cutoff, below half of
    the usual level (geometric mean of at most eight measurements), further below it than four of their standard
    deviations, and below whatever the parameter came back from before. So a parameter that was below the cutoff from
    the start, as plans calibrated at a smaller learning rate have some, is reported by :meth:`check` but is no reason
    to warn, nor are gradients whose rare large values make the SNR drop from time to time.

    Args:
        cutoff: SNR below which averaging is in doubt: that of the plan.
        shortest_interval: Steps between measurements, at least.

    Attributes:
        steps: Optimizer steps seen.
    """

    def __init__(self, cutoff: float = 1.0, shortest_interval: int = SHORTEST_INTERVAL) -> None:
        if not isinstance(shortest_interval, int) or shortest_interval < 1:
            raise ValueError(f"shortest_interval={shortest_interval!r} must be an integer >= 1")
        self.cutoff = cutoff
        self.steps = 0
        self._next = 0
        self._shortest_interval = shortest_interval
        self._longest_memory = 0.0
        self._warned = False
        self._samples: dict[str, _Sample] = {}
        self._left_out: dict[str, Check] = {}

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return max(self._shortest_interval, round(self._longest_memory))

    def memory_of(self, keys: Iterable[str]) -> int:
        """Return the bytes of the second moments tracked under some names, known before the first step."""
        samples = [self._samples[key] for key in keys if key in self._samples]
        return sum(math.prod(counts_of(sample.there)) * sample.dtype.itemsize for sample in samples)

    def add(self, name: str, param: Tensor, rules: Sequence[Rule], second_moment: Tensor | None = None) -> None:
        """Track a parameter from now on, from its full second moment where that is known, else from zero.

        Args:
            name: Its name.
            param: The parameter, for its shape and precision.
            rules: How its second moment, or that of each part, is stored; full ones are not tracked.
            second_moment: Left aside unless it is of the parameter's shape. Collective for a DTensor.
        """
        self._next = 0
        samples = []
        for rule in rules:
            self.drop(key := key_of(name, rule.part))
            if rule.form != "full":
                samples += self._add_piece(key, param, rule)
        if samples and isinstance(second_moment, Tensor) and second_moment.shape == param.shape:
            full = full_tensor(second_moment)
            for sample in samples:
                sample.start(sample.rule.take(full))

    def _add_piece(self, key: str, param: Tensor, rule: Rule) -> list[_Sample]:
        shape = tuple(param.shape) if rule.part is None else rule.part.shape
        index, shard = place(rule, shape), None
        if is_dtensor(param) and index is not None and rule.part is None:
            shard = SampleShard.of(param, is_flat=len(index) != param.dim())
        if param.is_complex():
            reason = "complex parameters are not monitored"
        elif index is None:
            reason = "too small to monitor"
        elif is_dtensor(param) and shard is None:
            reason = "cannot be monitored through these shards"
        else:
            self._samples[key] = _Sample(rule, index, second_moment_dtype(param.dtype), self.cutoff, shard)
            return [self._samples[key]]
        self._left_out[key] = Check(math.nan, self.cutoff, rule.form, rule.dims, 0, False, reason)
        return []

    def drop(self, key: str) -> None:
        """Forget a parameter or part, as when it goes back to a full second moment."""
        self._samples.pop(key, None)
        self._left_out.pop(key, None)

    def rename(self, keys: Mapping[str, str]) -> None:
        """Give parameters other names, all at once.

        Args:
            keys: New names by old ones, in the order to show them in; what has none is forgotten.
        """
        self._samples = {now: self._samples[before] for before, now in keys.items() if before in self._samples}
        self._left_out = {now: self._left_out[before] for before, now in keys.items() if before in self._left_out}

    def after_step(
        self,
        groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
        all_rules: Mapping[str, Sequence[Rule]],
        states: Mapping[Tensor, Mapping[str, Any]],
        clip_factor: Tensor | None = None,
    ) -> None:
        """Count an optimizer step; where it is time, look at its gradients, measure, and warn of declines once.

        Args:
            groups: The parameter groups, each with its parameters' names; capturable ones are passed over.
            all_rules: Rules by name.
            states: State by parameter.
            clip_factor: Factor that the step multiplied gradients by.
        """
        self.steps += 1
        if self.steps >= self._next:
            self._look_and_measure(groups, all_rules, states, clip_factor)

    @torch.no_grad()
    def _look_and_measure(
        self,
        groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
        all_rules: Mapping[str, Sequence[Rule]],
        states: Mapping[Tensor, Mapping[str, Any]],
        clip_factor: Tensor | None,
    ) -> None:
        step = self.steps - 1
        tracked = [(names, group, float(group["betas"][1])) for names, group in groups if not group["capturable"]]
        self._longest_memory = max([self._longest_memory, *(1 / (1 - beta2) for _, _, beta2 in tracked)])
        self._next = self.steps - self.steps % self.interval + self.interval
        for names, group, beta2 in tracked:
            self._next = min(self._next, next_look(self.steps, beta2, self.interval) + 1)
            if next_look(step, beta2, self.interval) == step:
                self._look(self._sampled(names, group, all_rules), beta2, clip_factor)
        if self.steps % self.interval == 0:
            for names, group in groups:
                for _, param, sample in self._sampled(names, group, all_rules):
                    sample.measure(states.get(param, {}))
            self._warn_once()

    def _sampled(
        self, names: Sequence[str], group: Mapping[str, Any], all_rules: Mapping[str, Sequence[Rule]]
    ) -> Iterator[tuple[str, Tensor, _Sample]]:
        for name, param in zip(names, group["params"], strict=True):
            for rule in all_rules.get(name, ()):  # a lazy parameter without a shape has none yet
                sample = self._samples.get(key_of(name, rule.part))
                if sample is not None:
                    yield name, param, sample

    def _look(self, sampled: Iterable[tuple[str, Tensor, _Sample]], beta2: float, clip_factor: Tensor | None) -> None:
        """Update a group's samples: ``v <- beta2 v + (1 - beta2) g**2``, decayed also for the steps not looked at."""
        every, rest = thinning(beta2), max(0, self.interval - filling(beta2))
        window, share = (self.steps - 1) // self.interval, every / (self.interval - rest)
        moments, seen, kept = [], [], []
        for name, param, sample in sampled:
            known = type(param.grad) is Tensor if sample.shard is None else param.grad is not None
            if known and is_dtensor(param) == (sample.shard is not None):
                seen.append(scale_grad(sample.seen(local_gradient(name, param)), clip_factor))
                moments.append(sample.moment_on(seen[-1].device))
                kept.append(beta2 ** (every + rest * sample.look(window, share)))
                sample.unfilled *= beta2**every
        if moments:
            torch._foreach_mul_(moments, kept)
            torch._foreach_addcmul_(moments, seen, seen, 1 - beta2**every)

    def _warn_once(self) -> None:
        declined = [(key, sample) for key, sample in self._samples.items() if sample.declined]
        if self._warned or not declined:
            return
        self._warned = True
        named = [f"{key!r} (SNR {sample.level:.2g} -> {sample.latest:.2g})" for key, sample in declined]
        more = len(named) - _NAMES_IN_WARNING
        logger.warning(
            "averaging second moments no longer holds, by a sample of each, for %s%s; of %d monitored parameters %d "
            "are below the cutoff %g now; opt.expand(name) returns one to a full second moment, opt.snr_check() shows "
            "all",
            ", ".join(named[:_NAMES_IN_WARNING]),
            f" and {more} more" if more > 0 else "",
            len(self._samples),
            sum(sample.latest < self.cutoff for sample in self._samples.values()),
            self.cutoff,
        )

    def check(self) -> dict[str, Check]:
        """Return what is known of each compressed parameter, as of the last measurement. Nothing is computed."""
        checks = {
            key: Check(
                snr=sample.latest,
                cutoff=self.cutoff,
                form=sample.rule.form,
                dims=sample.rule.dims,
                sampled=math.prod(counts_of(sample.index)),
                ready=sample.measured > 0,
                reason=self._in_words(sample),
            )
            for key, sample in self._samples.items()
        }
        return checks | self._left_out

    def _in_words(self, sample: _Sample) -> str:
        if not sample.measured:
            return (
                f"not ready at step {self.steps}: measured every {self.interval}, from 3 / (1 - beta2) steps after "
                "compression on (compiled and capturable steps are not watched)"
            )
        if math.isnan(sample.latest):
            return "gradients in the sample were not finite"
        if sample.latest == math.inf:
            return "no gradient has reached the sample, or all of it alike"
        if sample.latest >= self.cutoff:
            return "averaging holds"
        if sample.declined:
            return f"fell from {sample.level:.2g}: averaging no longer holds"
        return "below the cutoff, but not for long, or not clearly below where it began"

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers from which :meth:`load_state_dict` goes on to the last bit.

        Without samples of DTensors, of which each rank has its own: they start anew.
        """
        return {
            "steps": self.steps,
            "longest_memory": self._longest_memory,
            "warned": self._warned,
            "samples": {key: sample.state_dict() for key, sample in self._samples.items() if sample.shard is None},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Names that it lacks start anew, names that are not monitored are passed over.

        Args:
            state_dict: The result of :meth:`state_dict`; tensors are copied.

        Raises:
            ValueError: It is damaged, or a sample has another shape; nothing has changed then.
        """
        saved = _checked(state_dict, _FIELDS)
        self._samples |= {
            key: sample.loaded(key, saved["samples"][key])
            for key, sample in self._samples.items()
            if key in saved["samples"]
        }
        self.steps, self._longest_memory, self._warned = saved["steps"], saved["longest_memory"], saved["warned"]
        self._next = 0


@dataclass
class _Sample:
    """The tracked second moments of one parameter, and what was measured of them.

    Of a DTensor each rank tracks the elements in its ``shard``, and a measurement gathers them. ``unfilled`` is the
    weight that the start at zero still has. ``window`` is the interval in which it last saw a gradient, ``arrived``
    the share of that interval's looks that met one. ``usual`` are the first finite SNRs, but for those clearly below
    them; ``recent`` are the last of these, until one comes back up; ``lowest`` is the lowest SNR that one came back
    from.
    """

    rule: Rule
    index: Index
    dtype: torch.dtype
    cutoff: float
    shard: SampleShard | None = None
    phase: int = _PHASES // 2
    moment: Tensor | None = None
    unfilled: float = 1.0
    window: int = -1
    arrived: float = 1.0
    latest: float = math.nan
    measured: int = 0
    usual: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    lowest: float = math.inf

    def __post_init__(self) -> None:
        spans = [(0, one.stop) for one in self.index] if self.shard is None else self.shard.spans
        pairs = [within(one, *span) for one, span in zip(self.index, spans, strict=True)]
        self.here, self.there = tuple(here for here, _ in pairs), tuple(there for _, there in pairs)

    def seen(self, grad: Tensor) -> Tensor:
        """Return the sampled elements of this rank's gradient."""
        return take(self.rule.take(grad), self.here)

    def moment_on(self, device: torch.device) -> Tensor:
        if self.moment is None:
            self.moment = torch.zeros(counts_of(self.there), dtype=self.dtype, device=device)
        self.moment = self.moment.to(device)
        return self.moment

    def look(self, window: int, share: float) -> float:
        """Count a gradient, met in a ``share`` of an interval's looks; return the share of the rest to decay for.

        That is the share of looks that met one in the interval before; 0 after the first look, which has decayed.
        """
        if window == self.window:
            self.arrived = min(1.0, self.arrived + share)
            return 0.0
        arrived, self.window, self.arrived = self.arrived, window, share
        return arrived

    def start(self, second_moment: Tensor) -> None:
        """Begin with the true second moment, and measure it."""
        averages = [second_moment.mean(dims, keepdim=True) for dims in self.rule.averaged_dims(second_moment.dim())]
        sampled = take(second_moment, self.index)
        self.moment, self.unfilled = sampled[self.there].to(self.dtype, copy=True), 0.0
        self.record(sampled_snr(self.rule, self.index, sampled, averages))

    @torch.no_grad()
    def measure(self, state: Mapping[str, Any]) -> None:
        """Measure, unless the sample is still filling or its factored parameter has no state (collective)."""
        averages = second_moment.moments_of(state, [self.rule])
        is_factored = self.rule.form == FACTORED
        if self.moment is not None and self.unfilled <= _STILL_FILLING and (averages or not is_factored):
            averages = [full_tensor(one) for one in averages] if is_factored else averages
            self.record(sampled_snr(self.rule, self.index, self.full_moment(), averages))

    def full_moment(self) -> Tensor:
        """Return the second moments of the full sample (collective)."""
        assert self.moment is not None
        if self.shard is None:
            return self.moment
        full = self.moment.new_zeros(counts_of(self.index))
        full[self.there] = self.moment
        for mesh_dim in self.shard.mesh_dims:
            torch.distributed.all_reduce(full, group=self.shard.mesh.get_group(mesh_dim))
        return full

    def record(self, value: float) -> None:
        """Add a measurement; one that is not finite tells nothing about a level."""
        self.latest = value
        self.measured += 1
        if not math.isfinite(value):
            return
        self.recent.append(value)
        if len(self.usual) < MEASUREMENTS or value >= self._clearly_low:
            self.lowest = min(self.lowest, *self.recent)
            self.usual = [*self.usual, *self.recent][:_USUAL_MEASUREMENTS]
            self.recent = []
        self.recent = self.recent[-MEASUREMENTS:]

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

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in _SAMPLE_FIELDS}
        return {**state, "usual": [*self.usual], "recent": [*self.recent]}

    def loaded(self, key: str, saved: object) -> _Sample:
        """Return a sample that goes on from a saved one, also where earlier releases had placed it."""
        values = _checked(saved, _SAMPLE_FIELDS, f"samples[{key!r}]")
        moment = values.pop("moment")
        if moment is not None and tuple(moment.shape) != counts_of(self.index):
            raise ValueError(
                f"{key!r}: the saved sample is of shape {tuple(moment.shape)}, this plan's has shape "
                f"{counts_of(self.index)}; load it under the plan that it was saved under"
            )
        values |= {name: list(values[name]) for name in ("usual", "recent")}
        starts = [(one.step * values["phase"] // _PHASES, one) for one in self.index]
        index = tuple(slice(start, start + one.stop - one.start, one.step) for start, one in starts)
        after = replace(self, index=index, **values)
        if moment is not None:
            after.moment = moment.detach()[after.there].to(self.dtype, copy=True)
        return after


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def _checked(saved: Any, fields: Mapping[str, Callable[[Any], bool]], where: str = "") -> dict[str, Any]:
    """Return the fields of a saved state; raise where one is missing or does not fit."""
    if isinstance(saved, Mapping):
        wrong = next((name for name, fits in fields.items() if name not in saved or not fits(saved[name])), None)
        if wrong is None:
            return {name: saved[name] for name in fields}
        where, saved = f"{where}[{wrong!r}]" if where else wrong, saved.get(wrong)
    where = where or "all of it"
    raise ValueError(f"the saved monitor is damaged ({where}={shown(saved)}); pass what state_dict() returned")


def _number(smallest: float, largest: float, kind: type[float] = float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool) and smallest <= value <= largest


def _is_snr(value: object) -> bool:
    return isinstance(value, float) and not value < 0


def _are_snrs(values: Any) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) <= _USUAL_MEASUREMENTS
        and all(_is_snr(value) and math.isfinite(value) for value in values)
    )


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "steps": _number(0, _LARGEST_COUNT, int),
    "longest_memory": _number(0, sys.float_info.max),
    "warned": lambda value: isinstance(value, bool),
    "samples": lambda value: isinstance(value, Mapping),
}
_SAMPLE_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "phase": _number(0, _PHASES - 1, int),
    "moment": lambda value: value is None or (isinstance(value, Tensor) and value.is_floating_point()),
    "unfilled": _number(0, 1),
    "window": _number(-1, _LARGEST_COUNT, int),
    "arrived": _number(0, 1),
    "latest": _is_snr,
    "measured": _number(0, _LARGEST_COUNT, int),
    "usual": _are_snrs,
    "recent": _are_snrs,
    "lowest": _is_snr,
}
