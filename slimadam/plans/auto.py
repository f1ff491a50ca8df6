"""``plan="auto"``: measures on the optimizer's own second moments while it runs as AdamW, then decides.

Source of the measurement and the rule: arXiv 2503.01843.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimadam.layers.splits import Part, Split, check_declared
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.snr import check_count
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms, check_choice, check_keep, idle_patterns
from slimadam.state.rule import FACTORED, Rule, normalize_candidate
from slimadam.utils.errors import shown

logger = logging.getLogger("slimadam")


@dataclass(frozen=True)
class AutoPlan:
    """Settings of ``plan="auto"``.

    Attributes:
        calibration_steps: Optimizer steps as AdamW, after which the second moments shrink.
        measurements: Number of times the SNR is measured in these steps, at equal distances, the last at their end.
        cutoff: SNR that a candidate must exceed; with ``forms="closest"`` three times it, see there.
        budget: Share of the measured second moments to save by averages instead, at the least loss (elements over SNR).
        forms: As in :meth:`CompressionPlan.from_snr`; ``"mean"`` is the paper exactly.
        keep: Patterns of names or roles that stay in full.
        parts: The logical matrices in parameters, by pattern of their names, where their modules do not say, such as
            ``{"*.qkv.weight": Split({"query": 768, "key": 768, "value": 768})}``.

    Raises:
        ValueError: A setting is out of range.
    """

    calibration_steps: int = 200
    measurements: int = 2
    cutoff: float = 1.0
    budget: float | None = None
    forms: Forms = "closest"
    keep: tuple[str, ...] = ()
    parts: Mapping[str, Split] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("calibration_steps", "measurements"):
            check_count(name, getattr(self, name), 1)
        check_choice(self.cutoff, self.forms, self.budget)
        if not isinstance(self.keep, tuple):
            raise ValueError(f"keep={self.keep!r} must be a tuple of patterns, such as ('*norm*',)")
        check_keep(self.keep)
        check_declared(self.parts)

    def measures(self, step: int) -> bool:
        """Return whether to measure after optimizer step ``step`` (from 1)."""
        if step > self.calibration_steps:
            return False
        count = min(self.measurements, self.calibration_steps)
        number = round(step * count / self.calibration_steps)  # of the interval that the step may end
        return number >= 1 and round(number * self.calibration_steps / count) == step


Moment = tuple[str, Rule, Tensor, Sequence[str]]


class Measuring:
    """The phase before the decision.

    Attributes:
        settings: How to measure and decide.
        history: The measurements so far.
        steps: Optimizer steps done.
    """

    def __init__(self, settings: AutoPlan) -> None:
        self.settings = settings
        self.history = SNRHistory()
        self.steps = 0
        self._had_moments = False

    def counts_only(self, same_state: bool) -> bool:
        """Count a step in which nothing is measured; return False, and count nothing, if something may be.

        Args:
            same_state: Whether the parameters have the very state of the last step.
        """
        step, settings = self.steps + 1, self.settings
        may_measure = step >= settings.calibration_steps or settings.measures(step)
        if may_measure or not (same_state and self._had_moments):
            return False
        self.steps = step
        return True

    def __str__(self) -> str:
        return f"auto, measures for {self.settings.calibration_steps} steps as AdamW, {self.steps} of them done"

    def after_step(self, moments: Iterable[Moment], forms: Forms) -> CompressionPlan | None:
        """Count a step that has moments, measure if it is time, and return the plan after the last.

        Where more steps were done before than these settings ask for, the first step here measures and decides.

        Args:
            moments: For each parameter with a second moment, or each part of it: its key and rule, the parameter's
                full second moment, and all names of the parameter.
            forms: The forms to choose among, as in :class:`AutoPlan`.
        """
        moments = iter(moments)
        first = next(moments, None)
        self._had_moments = first is not None
        if first is None:
            return None
        self.steps += 1
        choice = self.settings
        last = self.steps >= choice.calibration_steps
        if last or choice.measures(self.steps):
            for key, rule, second_moment, names in itertools.chain([first], moments):
                self.history.measure(self.steps, key, rule, second_moment, names)
        if not last:
            return None
        idle = idle_patterns(choice.keep, self.history)
        for pattern in idle:
            logger.warning("plan='auto': keep: no parameter has the name or role %r", pattern)
        keep = [pattern for pattern in choice.keep if pattern not in idle]
        try:
            return CompressionPlan.from_snr(self.history, choice.cutoff, budget=choice.budget, forms=forms, keep=keep)
        except ValueError as error:
            logger.warning("plan='auto': %s; deciding by the cutoff %g instead", error, choice.cutoff)
            return CompressionPlan.from_snr(self.history, choice.cutoff, forms=forms, keep=keep)

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as plain numbers and text, for a checkpoint."""
        measured: list[dict[str, Any]] = []
        for name, parameter in self.history.items():
            place, values = _place(parameter.part), []
            for step, found in parameter.values.items():
                pairs = [[key if key == FACTORED else list(key), value] for key, value in found.items()]
                values.append([step, pairs])
            own = {
                "name": name,
                "role": parameter.role,
                "part": place,
                "shape": list(parameter.shape),
                "values": values,
            }
            measured.append(own)
        return {"steps": self.steps, "measured": measured}

    @classmethod
    def from_dict(cls, settings: AutoPlan, data: Mapping[str, Any], plan: CompressionPlan) -> Measuring:
        """Read the data of :meth:`to_dict`. Measurements of parts that are not parts now are left out, with a warning.

        Args:
            settings: How to measure and decide.
            data: The data; anything else is a :class:`ValueError`.
            plan: Rules of the parameters, or parts of them, as they are now.
        """
        measuring = cls(settings)
        if not isinstance(data, Mapping):
            raise ValueError(f"the state dict's record of plan='auto' is damaged (it is {shown(data)})")
        try:
            measuring.steps = data["steps"]
            check_count("steps", measuring.steps, 0)
            others = []
            for parameter in data["measured"]:
                name, shape = parameter["name"], tuple(parameter["shape"])
                rule = plan.get(name, Rule())
                if parameter["part"] != _place(rule.part):
                    others.append(name)
                    continue
                measuring.history.record(0, name, shape, {}, parameter["role"], rule.part, rule.batch_dims, rule.fan_in)
                for step, values in parameter["values"]:
                    found = {normalize_candidate(candidate, len(shape)): float(value) for candidate, value in values}
                    measuring.history.record(step, name, shape, found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state dict's record of plan='auto' is damaged ({error!r})") from error
        if others:
            logger.warning(
                "plan='auto': the state dict's measurements of %s are left out: the parameter has other parts here",
                ", ".join(map(repr, others)),
            )
        return measuring


def _place(part: Part | None) -> list[object] | None:
    return None if part is None else [list(part.of), list(part.view), part.dim, part.start, part.size]
