"""Does averaging still hold? Full second moments of a few slices, watched after compression.

Nothing here knows an optimizer: it is told names, rules and gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.interface import second_moment_dtype
from slimadam.kernels.reference import scale_grad
from slimadam.layers.splits import key_of
from slimadam.measurement.sampling import (
    Sample,
    checked_field,
    damaged,
    filling,
    is_count,
    is_number,
    loaded,
    looks_at,
    place,
    sampled_snr,
    saved,
    thinning,
)
from slimadam.measurement.sampling_shards import SampleShard
from slimadam.state import second_moment
from slimadam.state.rule import FACTORED, Dims, Form, Rule
from slimadam.utils.dtensor import full_tensor, is_dtensor, local_gradient

logger = logging.getLogger("slimadam")

SHORTEST_INTERVAL: Final = 200

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


class Monitor:
    """Tracks full second moments of a sample of each compressed parameter, and warns where averaging stops holding.

    After each optimizer step call :meth:`update` for each parameter group, then :meth:`watch` once.

    A sample is measured every ``interval`` steps: every 200, or ``1 / (1 - beta2)`` where that is longer. It
    follows gradients only in the ``3 / (1 - beta2)`` steps before, and not in each of them where ``beta2`` is close
    to 1 (:func:`thinning`).

    The one warning comes where a decline is certain: three measurements in a row are below the cutoff, below half of
    the usual level (geometric mean of at most eight measurements), further below it than four of their standard
    deviations, and below whatever the parameter came back from before. So a parameter that was below the cutoff from
    the start, as plans calibrated at a smaller learning rate have some, is reported by :meth:`check` but is no reason
    to warn, nor are gradients whose rare large values make the SNR drop from time to time.

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
        self._samples: dict[str, Sample] = {}
        self._left_out: dict[str, Check] = {}

    @property
    def interval(self) -> int:
        """Steps between measurements."""
        return max(self._shortest_interval, round(self._longest_memory))

    @property
    def memory(self) -> int:
        """Bytes of the tracked second moments, known before the first step."""
        return self.memory_of(self._samples)

    def memory_of(self, keys: Iterable[str]) -> int:
        """Bytes for some names, of which those without a sample cost none."""
        samples = [self._samples[key] for key in keys if key in self._samples]
        return sum(math.prod(sample.held_shape) * sample.dtype.itemsize for sample in samples)

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
        shape = tuple(param.shape) if rule.part is None else rule.part.shape
        placement, shard = place(rule, shape), None
        if is_dtensor(param) and placement is not None and rule.part is None:
            shard = SampleShard.of(param, is_flat=len(placement.shape) != param.dim())
        if param.is_complex():
            reason = "complex parameters are not monitored"
        elif placement is None:
            reason = "too small to monitor"
        elif is_dtensor(param) and shard is None:
            reason = "cannot be monitored through these shards"
        else:
            self._samples[key] = Sample(rule, placement, second_moment_dtype(param.dtype), shard=shard)
            return
        self._left_out[key] = Check(math.nan, self.cutoff, rule.form, rule.dims, 0, False, reason)

    def start(self, key: str, second_moment: Tensor) -> None:
        """Let a sample begin at the true second moment, at the moment of compression, and measure it.

        Of sixteen places for the sample the one is chosen whose SNR is closest to their mean.

        Args:
            key: A name that was added; one that is not sampled is ignored.
            second_moment: In full, of the parameter's (or part's) shape.
        """
        if key in self._samples:
            self._samples[key].start(second_moment, self.cutoff)

    def samples_shards_of(self, key: str) -> bool:
        """Whether a DTensor is watched under a name."""
        return key in self._samples and self._samples[key].shard is not None

    def drop(self, key: str) -> None:
        """Forget a parameter, as when it goes back to a full second moment."""
        self._samples.pop(key, None)
        self._left_out.pop(key, None)

    def rename(self, keys: Mapping[str, str]) -> None:
        """Give parameters other names, all at once.

        Args:
            keys: The names of now by those of before, in the order to show them in; what has none is forgotten.
        """
        self._samples = {now: self._samples[before] for before, now in keys.items() if before in self._samples}
        self._left_out = {now: self._left_out[before] for before, now in keys.items() if before in self._left_out}

    @torch.no_grad()
    def update(
        self, grads: Iterable[tuple[str, Tensor | None]], beta2: float, clip_factor: Tensor | None = None
    ) -> None:
        """Let the samples see this step's gradients: ``v <- beta2 v + (1 - beta2) g**2``, where it is time.

        Steps in which a sample rests still count for what it forgets, as they do for the true second moment.

        Args:
            grads: Name and gradient of each parameter of a group (of the whole parameter for each of its parts; of a
                DTensor this rank's shard).
                Those without a gradient, and those that are not watched, are passed over.
            beta2: The group's decay rate of second moments.
            clip_factor: What the gradients are multiplied by.
        """
        self._longest_memory = max(self._longest_memory, 1 / (1 - beta2))
        every, resting = thinning(beta2), max(0, self.interval - filling(beta2))
        window, at = divmod(self.steps, self.interval)
        if at < resting or not looks_at(self.steps, every):
            return
        moments, seen, kept = [], [], []
        for key, grad in grads:
            if grad is not None and key in self._samples:
                sample = self._samples[key]
                moments.append(sample.moment_beside(grad))
                seen.append(scale_grad(sample.seen(grad), clip_factor))
                rested = sample.look(window, every / (self.interval - resting)) * resting
                kept.append(beta2 ** (every + rested))
                sample.unfilled *= beta2**every
        if moments:
            torch._foreach_mul_(moments, kept)
            torch._foreach_addcmul_(moments, seen, seen, 1 - beta2**every)

    @torch.no_grad()
    def watch(self, stored: StoredMoments) -> None:
        """Count an optimizer step; every ``interval`` steps measure, and warn once where averaging stopped holding.

        Args:
            stored: Returns by name at least the row and column averages of factored parameters; called only to
                measure. A factored one that has none now is passed over.
        """
        self.steps += 1
        if self.steps % self.interval:
            return
        averages = stored()
        for key, sample in self._samples.items():
            known = key in averages or sample.rule.form != FACTORED
            if known and sample.moment is not None and sample.unfilled <= _STILL_FILLING:
                moment = sample.whole_moment(sample.moment)
                value = sampled_snr(sample.rule, sample.placement, moment, averages.get(key, ()))
                sample.record(value, self.cutoff)
        self._warn_once()

    def check(self) -> dict[str, Check]:
        """What is known of each compressed parameter, as of the last measurement. Nothing is computed."""
        return {key: self._check_sample(sample) for key, sample in self._samples.items()} | self._left_out

    def _check_sample(self, sample: Sample) -> Check:
        return Check(
            snr=sample.latest,
            cutoff=self.cutoff,
            form=sample.rule.form,
            dims=sample.rule.dims,
            sampled=sample.elements,
            ready=sample.measured > 0,
            reason=self._in_words(sample),
        )

    def _in_words(self, sample: Sample) -> str:
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
        if sample.declined(self.cutoff):
            return f"fell from {sample.level:.2g}: averaging no longer holds"
        return "below the cutoff, but not for long, or not clearly below where it began"

    def _warn_once(self) -> None:
        declined = {key: sample for key, sample in self._samples.items() if sample.declined(self.cutoff)}
        if self._warned or not declined:
            return
        self._warned = True
        named = [
            f"{key!r} (SNR {sample.level:.2g} -> {sample.latest:.2g})"
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
        """Tensors and plain numbers from which :meth:`load_state_dict` goes on to the last bit.

        Without samples of DTensors, of which each rank has its own: they start anew.
        """
        return {
            "steps": self.steps,
            "longest_memory": self._longest_memory,
            "warned": self._warned,
            "samples": {key: saved(sample) for key, sample in self._samples.items() if sample.shard is None},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. Names that it lacks start anew, names that are not watched are passed over.

        Args:
            state_dict: What :meth:`state_dict` returned; tensors are copied.

        Raises:
            ValueError: It is damaged, or a sample has another shape; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise damaged("all of it", state_dict)
        steps = checked_field(state_dict, "steps", is_count)
        memory = checked_field(state_dict, "longest_memory", lambda value: is_number(value) and 0 <= value < math.inf)
        warned = checked_field(state_dict, "warned", lambda value: isinstance(value, bool))
        given = checked_field(state_dict, "samples", lambda value: isinstance(value, Mapping))
        samples = {
            key: loaded(key, sample, given[key]) if key in given else sample for key, sample in self._samples.items()
        }
        self.steps, self._longest_memory, self._warned, self._samples = steps, memory, warned, samples


def watch_parameter(
    monitor: Monitor, name: str, param: Tensor, rules: Sequence[Rule], state: Mapping[str, Any]
) -> None:
    """Sample what is compressed of a parameter, from its full second moment where it still has one."""
    keys = [key_of(name, rule.part) for rule in rules]
    for key, rule in zip(keys, rules, strict=True):
        monitor.add(key, rule, param)
    full = state.get("exp_avg_sq")
    if isinstance(full, Tensor) and full.shape == param.shape:
        if is_dtensor(param) and not any(map(monitor.samples_shards_of, keys)):
            return
        full = full_tensor(full)
        for key, rule in zip(keys, rules, strict=True):
            monitor.start(key, rule.take(full))


@torch.no_grad()
def watch_step(
    monitor: Monitor,
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
    clip_factor: Tensor | None,
) -> None:
    """Show the samples a step's gradients, of groups that are not capturable.

    Args:
        monitor: Keeps the samples.
        groups: The parameter groups, each with its parameters' names.
        all_rules: By name.
        states: By parameter.
        clip_factor: What the step multiplied gradients by.
    """
    for names, group in groups:
        if not group["capturable"]:
            grads = (
                (key, local_gradient(name, param))
                for name, param in zip(names, group["params"], strict=True)
                if param.grad is not None
                for key in (key_of(name, rule.part) for rule in all_rules[name])
                if (monitor.samples_shards_of(key) if is_dtensor(param) else type(param.grad) is Tensor)
            )
            monitor.update(grads, float(group["betas"][1]), clip_factor)
    monitor.watch(lambda: _stored_by_key(groups, all_rules, states))


def _stored_by_key(
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    all_rules: Mapping[str, Sequence[Rule]],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> dict[str, Sequence[Tensor]]:
    return {
        key_of(name, rule.part): [full_tensor(one) for one in moments] if rule.form == "factored" else moments
        for names, group in groups
        for name, param in zip(names, group["params"], strict=True)
        if states.get(param)
        for rule, moments in second_moment.by_rule(
            all_rules[name], second_moment.moments_of(states[param], all_rules[name]), param.dim()
        )
    }
