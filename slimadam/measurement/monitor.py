"""Tells if averaging still holds, from full second moments of a few slices, tracked after compression."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.interface import number
from slimadam.kernels.reference import scale_grad
from slimadam.layers.name_patterns import key_of
from slimadam.measurement.sampling import PHASES, USUAL_MEASUREMENTS, Sample, next_look, thinning
from slimadam.measurement.slices import Index, counts_of, track
from slimadam.state.rule import FACTORED, Dims, FormName, Rule
from slimadam.utils.dtensor import full_tensor, is_dtensor, local_gradient
from slimadam.utils.errors import shown

logger = logging.getLogger("slimadam")

SHORTEST_INTERVAL: Final = 200
LARGEST_SHARE: Final = 0.01
SMALLEST_SAMPLE: Final = 32
_LARGEST_COUNT = 2**53 - 1  # up to which floating-point numbers count each integer
_NAMES_IN_WARNING = 5
_Sample = Sample  # as pickles of earlier releases call it


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
    deviations, and below whatever the parameter came back from before. What was below the cutoff from the start is
    reported by :meth:`check` but is no reason to warn, nor are rare large gradients that make the SNR drop at times.

    Args:
        cutoff: SNR below which averaging is in doubt: that of the plan.
        shortest_interval: Steps between measurements, at least.
        warns: Whether a decline is warned of.

    Attributes:
        steps: Optimizer steps seen.
        warns: Whether a decline is warned of.
    """

    warns = True  # also in pickles of earlier releases

    def __init__(self, cutoff: float = 1.0, shortest_interval: int = SHORTEST_INTERVAL, warns: bool = True) -> None:
        if not isinstance(shortest_interval, int) or shortest_interval < 1:
            raise ValueError(f"shortest_interval={shortest_interval!r} must be an integer >= 1")
        self.cutoff = cutoff
        self.warns = warns
        self.steps = 0
        self._next = 0
        self._shortest_interval = shortest_interval
        self._longest_memory = 0.0
        self._warned = False
        self._samples: dict[str, Sample] = {}
        self._left_out: dict[str, Check] = {}

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return max(self._shortest_interval, round(self._longest_memory))

    def memory_of(self, keys: Iterable[str]) -> int:
        """Return the bytes of the second moments tracked under some names, known before the first step."""
        return sum(self._samples[key].nbytes for key in keys if key in self._samples)

    def add(self, name: str, param: Tensor, rules: Sequence[Rule], second_moment: Tensor | None = None) -> None:
        """Track a parameter from now on, from its full second moment where that is known, else from zero.

        Args:
            name: Its name.
            param: The parameter, for its shape and precision.
            rules: How its second moment, or that of each part, is stored; values for each element are not tracked.
            second_moment: Left aside unless it is of the parameter's shape. Collective for a DTensor.
        """
        self._next = 0
        samples = []
        for rule in rules:
            self.drop(key := key_of(name, rule.part))
            if rule.is_full or rule.stored_as.is_coded:
                continue
            index = place(rule, tuple(param.shape) if rule.part is None else rule.part.shape)
            found: Sample | str
            if param.is_complex():
                found = "complex parameters are not monitored"
            elif index is None:
                found = "too small to monitor"
            else:
                found = Sample.of(param, rule, index, self.cutoff) or "cannot be monitored through these shards"
            if isinstance(found, str):
                self._left_out[key] = Check(math.nan, self.cutoff, rule.form, rule.dims, 0, False, found)
            else:
                self._samples[key] = found
                samples.append(found)
        if samples and isinstance(second_moment, Tensor) and second_moment.shape == param.shape:
            full = full_tensor(second_moment)
            for sample in samples:
                sample.start(sample.rule.take(full))

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
    ) -> bool:
        """Count an optimizer step; where it is time, look at its gradients, measure, and warn of declines once.

        Return whether it has measured.

        Args:
            groups: The parameter groups, each with its parameters' names; capturable ones are passed over.
            all_rules: Rules by name.
            states: State by parameter.
            clip_factor: Factor that the step multiplied gradients by.
        """
        self.steps += 1
        if self.steps < self._next:
            return False
        step = self.steps - 1
        tracked = [(names, group, number(group["betas"][1])) for names, group in groups if not group["capturable"]]
        self._longest_memory = max([self._longest_memory, *(1 / (1 - beta2) for _, _, beta2 in tracked)])
        self._next = self.steps - self.steps % self.interval + self.interval
        for names, group, beta2 in tracked:
            self._next = min(self._next, next_look(self.steps, beta2, self.interval) + 1)
            if next_look(step, beta2, self.interval) == step:
                self._look(self._sampled(names, group, all_rules), beta2, clip_factor)
        if self.steps % self.interval:
            return False
        for names, group in groups:
            for _, param, sample in self._sampled(names, group, all_rules):
                sample.measure(states.get(param, {}))
        if self.warns:
            self._warn_once()
        return True

    def declined(self) -> dict[str, tuple[float, float]]:
        """Return the usual and the latest SNR of each parameter, or part, whose averages clearly no longer hold."""
        return {key: (sample.level, sample.latest) for key, sample in self._samples.items() if sample.declined}

    def _sampled(
        self, names: Sequence[str], group: Mapping[str, Any], all_rules: Mapping[str, Sequence[Rule]]
    ) -> Iterator[tuple[str, Tensor, Sample]]:
        for name, param in zip(names, group["params"], strict=True):
            for rule in all_rules.get(name, ()):  # a lazy parameter without a shape has none yet
                sample = self._samples.get(key_of(name, rule.part))
                if sample is not None:
                    yield name, param, sample

    @torch.no_grad()
    def _look(self, sampled: Iterable[tuple[str, Tensor, Sample]], beta2: float, clip_factor: Tensor | None) -> None:
        """Update a group's samples: ``v <- beta2 v + (1 - beta2) g**2``, decayed also for the steps not looked at."""
        looks = []
        for name, param, sample in sampled:
            known = type(param.grad) is Tensor if sample.shard is None else param.grad is not None
            if known and is_dtensor(param) == (sample.shard is not None):
                looks.append(sample.look(local_gradient(name, param), self.steps - 1, beta2, self.interval))
        if looks:
            moments, seen, kept = map(list, zip(*looks, strict=True))
            scaled = [scale_grad(grad, clip_factor) for grad in seen]
            track(moments, scaled, kept, 1 - beta2 ** thinning(beta2))

    def _warn_once(self) -> None:
        declined = [(key, sample) for key, sample in self._samples.items() if sample.declined]
        if self._warned or not declined:
            return
        self._warned = True
        named = [f"{key!r} (SNR {sample.level:.2g} -> {sample.latest:.2g})" for key, sample in declined]
        more = len(named) - _NAMES_IN_WARNING
        low = sum(sample.latest < self.cutoff for sample in self._samples.values())
        logger.warning(
            "averaging second moments no longer holds, by a sample of each, for %s%s; of %d monitored parameters %d "
            "are below the cutoff %g now; opt.expand(name) returns one to a full second moment, opt.snr_check() shows "
            "all",
            ", ".join(named[:_NAMES_IN_WARNING]), f" and {more} more" if more > 0 else "", len(self._samples), low,
            self.cutoff,
        )  # fmt: skip

    def check(self) -> dict[str, Check]:
        """Return what is known of each compressed parameter, as of the last measurement. Nothing is computed."""
        checks = {}
        for key, sample in self._samples.items():
            rule, count, reason = sample.rule, math.prod(counts_of(sample.index)), self._in_words(sample)
            checks[key] = Check(sample.latest, self.cutoff, rule.form, rule.dims, count, sample.measured > 0, reason)
        return checks | self._left_out

    def _in_words(self, sample: Sample) -> str:
        if not sample.measured:
            return (
                f"not ready at step {self.steps}: measured every {self.interval}, from 3 / (1 - beta2) steps after "
                "compression on (steps under torch.compile and of capturable groups are not watched)"
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
        local = {key: sample for key, sample in self._samples.items() if sample.shard is None}
        samples = {key: {field: getattr(sample, field) for field in _SAMPLE_FIELDS} for key, sample in local.items()}
        own = {"steps": self.steps, "longest_memory": self._longest_memory, "warned": self._warned}
        return {**own, "samples": samples}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Names that it lacks start anew, names that are not monitored are passed over.

        Args:
            state_dict: The result of :meth:`state_dict`; tensors are copied.

        Raises:
            ValueError: It is damaged, or a sample has another shape; nothing has changed then.
        """
        saved = _checked(state_dict, _FIELDS)
        self._samples |= {
            key: sample.loaded(key, _checked(saved["samples"][key], _SAMPLE_FIELDS, f"samples[{key!r}]"))
            for key, sample in self._samples.items()
            if key in saved["samples"]
        }
        self.steps, self._longest_memory, self._warned = saved["steps"], saved["longest_memory"], saved["warned"]
        self._next = 0


def place(rule: Rule, shape: tuple[int, ...]) -> Index | None:
    """Return the index of a parameter's sample: at most 1% of the second-moment elements that the rule saves.

    Slices that share one value (for the factored form: rows) are sampled and spread over as many different experts or
    heads as there are, so small dimensions are used up first. Where all dimensions are averaged, single elements are
    sampled at a distance that meets each row and column in turn. None where that is no slice or fewer than 32 elements.

    Args:
        rule: How the second moment is stored.
        shape: Shape of the parameter.
    """
    elements = math.prod(shape)
    budget = int(LARGEST_SHARE * (elements - rule.stored_elements(shape)))
    if budget < SMALLEST_SAMPLE:
        return None
    single = range(rule.batch_dims + 1) if rule.form == FACTORED else set(range(len(shape))) - set(rule.dims)
    kept = [dim for dim in single if shape[dim] > 1]
    if kept:
        counts, slices = list(shape), budget // (elements // math.prod(shape[dim] for dim in kept))
        for dim in sorted(kept, key=shape.__getitem__):
            counts[dim] = min(shape[dim], slices)
            slices //= max(1, counts[dim])
        strides = [size // max(1, count) for size, count in zip(shape, counts, strict=True)]
    else:
        strides = [next(n for n in range(elements // budget + 1, elements) if math.gcd(n, elements) == 1)]
        counts = [elements // strides[0]]
    if math.prod(counts) < SMALLEST_SAMPLE:
        return None
    pairs = zip(counts, strides, strict=True)
    return tuple(slice(stride // 2, stride // 2 + count * stride, stride) for count, stride in pairs)


def _checked(saved: Any, fields: Mapping[str, Callable[[Any], bool]], where: str = "") -> dict[str, Any]:
    """Return the fields of a saved state; raise where one is missing or does not fit."""
    if isinstance(saved, Mapping):
        wrong = next((name for name, fits in fields.items() if name not in saved or not fits(saved[name])), None)
        if wrong is None:
            return {name: saved[name] for name in fields}
        where, saved = f"{where}[{wrong!r}]" if where else wrong, saved.get(wrong)
    where = where or "all of it"
    raise ValueError(f"the saved monitor is damaged ({where}={shown(saved)}); pass what state_dict() returned")


def _in_range(smallest: float, largest: float, kind: type[float] = float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool) and smallest <= value <= largest


def _is_snr(value: object) -> bool:
    return isinstance(value, float) and not value < 0


def _are_snrs(values: Any) -> bool:
    is_short = isinstance(values, (list, tuple)) and len(values) <= USUAL_MEASUREMENTS
    return is_short and all(_is_snr(value) and math.isfinite(value) for value in values)


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "steps": _in_range(0, _LARGEST_COUNT, int),
    "longest_memory": _in_range(0, sys.float_info.max),
    "warned": lambda value: isinstance(value, bool),
    "samples": lambda value: isinstance(value, Mapping),
}
_SAMPLE_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "phase": _in_range(0, PHASES - 1, int),
    "moment": lambda value: value is None or (isinstance(value, Tensor) and value.is_floating_point()),
    "unfilled": _in_range(0, 1),
    "window": _in_range(-1, _LARGEST_COUNT, int),
    "arrived": _in_range(0, 1),
    "latest": _is_snr,
    "measured": _in_range(0, _LARGEST_COUNT, int),
    "usual": _are_snrs,
    "recent": _are_snrs,
    "lowest": _is_snr,
}
