"""``plan="auto"``: measures on the optimizer's own second moments while it runs as AdamW, then decides.

Source of the measurement and the rule: arXiv 2503.01843.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

from torch import Tensor

from slimadam.layers.splits import Part, Split, check_declared, key_of, owner_of
from slimadam.measurement.grid import Grid
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.sampling import thinning
from slimadam.measurement.snr import check_count
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.selection import Forms, check_choice, check_keep, idle_patterns, stays_full
from slimadam.state.rule import FACTORED, FLOAT8, Candidate, Rule, Source, factored_rule, normalize_candidate
from slimadam.utils.errors import shown

logger = logging.getLogger("slimadam")

Start = Literal["full", "slim"]
_MOST_THINNED: Final = 2
_FEWEST_LOOKS: Final = 100
_AVERAGED_WHILE_MEASURING: Final = "plan='auto' is still measuring: row and column averages until it has decided"


@dataclass(frozen=True)
class AutoPlan:
    """Settings of ``plan="auto"``.

    Attributes:
        calibration_steps: Optimizer steps that are measured, after which the plan is decided.
        measurements: Number of times the SNR is measured in these steps, at equal distances, the last at their end.
        cutoff: SNR that a candidate must exceed; with ``forms="closest"`` three times it, see there.
        budget: Share of the measured second moments to save by averages instead, at the least loss (elements over SNR).
        forms: As in :meth:`CompressionPlan.from_snr`; ``"mean"`` is the paper exactly.
        keep: Patterns of names or roles that stay in full.
        parts: The logical matrices in parameters, by pattern of their names, where their modules do not say, such as
            ``{"*.qkv.weight": Split({"query": 768, "key": 768, "value": 768})}``.
        start: Form of matrices while they are measured. ``"full"``: as AdamW. ``"slim"``: row and column averages,
            and a grid of a few rows by a few columns in full, by which all forms are judged.
        calibration_memory: Share of AdamW's second moments that grids and averages of a matrix may take together.
        revise: Keep following the run: where averages clearly no longer hold, a parameter is expanded, to one byte for
            each element (with other ``forms``: in full) as long as ``budget`` is kept; where those of one in bytes have
            clearly come to hold, it is compressed. Needs the optimizer's ``monitor``.

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
    start: Start = "full"
    calibration_memory: float = 0.05
    revise: bool = False

    def __post_init__(self) -> None:
        for name in ("calibration_steps", "measurements"):
            check_count(name, getattr(self, name), 1)
        check_choice(self.cutoff, self.forms, self.budget)
        if not isinstance(self.keep, tuple):
            raise ValueError(f"keep={self.keep!r} must be a tuple of patterns, such as ('*norm*',)")
        check_keep(self.keep)
        check_declared(self.parts)
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r} must be 'full' or 'slim'")
        if not isinstance(self.revise, bool):
            raise ValueError(f"revise={self.revise!r} must be True or False")
        share = self.calibration_memory
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"calibration_memory={share!r} must be a share of AdamW's second moments, above 0 up to 1")

    def measures(self, step: int) -> bool:
        """Return whether to measure after optimizer step ``step`` (from 1)."""
        if step > self.calibration_steps:
            return False
        count = min(self.measurements, self.calibration_steps)
        number = round(step * count / self.calibration_steps)  # of the interval that the step may end
        return number >= 1 and round(number * self.calibration_steps / count) == step


@dataclass
class Revising:
    """The phase after the decision with ``revise=True``.

    Attributes:
        settings: How the plan was decided.
        high: For each parameter, or part, in bytes the latest measurements in a row that were clearly high.
        refused: Parameters that the budget has kept from being expanded.
    """

    settings: AutoPlan
    high: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def drop(self, key: str) -> None:
        """Forget a parameter, or part."""
        self.high.pop(key, None)
        self.refused.discard(key)

    def rename(self, keys: Mapping[str, str]) -> None:
        """Give parameters other names at once; what has none is forgotten."""
        self.high = {now: self.high[before] for before, now in keys.items() if before in self.high}
        self.refused = {now for before, now in keys.items() if before in self.refused}

    def load(self, saved: Any) -> None:
        """Go on from :attr:`high` of a checkpoint.

        Args:
            saved: What it holds.

        Raises:
            ValueError: It is damaged.
        """
        if not isinstance(saved, Mapping) or not all(isinstance(key, str) for key in saved):
            raise ValueError(f"the state dict's record of a revised plan is damaged (high={shown(saved)})")
        for key, count in saved.items():
            check_count(f"high[{key!r}]", count, 0)
        self.high = dict(saved)


Measurement = tuple[str, Rule, Callable[[], Mapping[Candidate, float]], Sequence[str]]


class Measuring:
    """The phase before the decision.

    Attributes:
        settings: How to measure and decide.
        history: The measurements so far.
        steps: Optimizer steps done.
        grids: With ``start="slim"`` the grid of each parameter, or part, that is stored as averages.
    """

    def __init__(self, settings: AutoPlan) -> None:
        self.settings = settings
        self.history = SNRHistory()
        self.steps = 0
        self.grids: dict[str, Grid] = {}
        self._had_moments = False
        self._looked_every: tuple[int, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of an earlier release lacks them.
        self.__dict__.update({"grids": {}, "_looked_every": (), **state})

    def starting_rules(self, name: str, param: Tensor, rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
        """Return how a parameter, or each part, is stored with ``start="slim"`` while it is measured.

        What cannot be measured on a grid has its form for good: one byte for each element, or with other ``forms`` and
        with a budget all of it.

        Args:
            name: Its name.
            param: The parameter.
            rules: Its rules in full.
            names: All of its names.
        """
        return [self._starting_rule(key_of(name, rule.part), param, rule, names) for rule in rules]

    def _starting_rule(self, key: str, param: Tensor, rule: Rule, names: Sequence[str]) -> Rule:
        self.drop(key)
        piece = rule.piece
        averaged = replace(factored_rule(piece), reason=_AVERAGED_WHILE_MEASURING, source=Source.MEASURING)
        if averaged.is_full or stays_full(key, rule, self.settings.keep, names):
            return rule
        why = self.track(key, param, averaged)
        if why is None:
            return averaged
        if self.settings.forms != "closest" or self.settings.budget is not None:
            return replace(rule, reason=f"kept in full: {why}", source=Source.MEASURED)
        return replace(rule, form=FLOAT8, reason=f"one byte for each element: {why}", source=Source.MEASURED)

    def track(self, key: str, param: Tensor, rule: Rule) -> str | None:
        """Begin a parameter's grid; return in words why it has none, or None.

        Args:
            key: Name of the parameter, or part.
            param: The parameter.
            rule: Stores its second moment, or the part's, as row and column averages.
        """
        self.grids.pop(key, None)
        grid = Grid.of(param, rule, self.settings.calibration_memory)
        if isinstance(grid, str):
            return grid
        self.grids[key] = grid
        return None

    def forget(self, keys: Iterable[str], found: Tensor | None = None, dim: int = 0) -> None:
        """Begin the grids of some parameters anew, or with zeros at some positions.

        Args:
            keys: Names of the parameters, or parts.
            found: As in :meth:`Grid.forget`.
            dim: As there.
        """
        for key in keys:
            if key in self.grids:
                self.grids[key].forget(found, dim)

    def drop(self, key: str) -> None:
        """Forget the grid of a parameter, or part."""
        self.grids.pop(key, None)

    def grids_by_name(self) -> dict[str, list[Grid]]:
        """Return the grids of each parameter."""
        found: dict[str, list[Grid]] = {}
        for key, grid in self.grids.items():
            found.setdefault(owner_of(key, grid.rule.part), []).append(grid)
        return found

    def looks_every(self, beta2: float) -> int:
        """Return every how many steps grids see gradients: each, or every other where that makes little difference.

        The last step of the measurement is among them. At 200 steps with ``beta2 = 0.999`` a moment that has seen
        every other gradient has an SNR of 2.9 where one that has seen all has 3 (:func:`thinning`).

        Args:
            beta2: Decay rate of second moments.
        """
        return max(1, min(_MOST_THINNED, thinning(beta2), self.settings.calibration_steps // _FEWEST_LOOKS))

    def looks(self, step: int, beta2: float) -> bool:
        """Return whether grids see the gradients of an optimizer step.

        Args:
            step: The step, from 1.
            beta2: Decay rate of second moments.
        """
        every = self.looks_every(beta2)
        if every not in self._looked_every:
            self._looked_every = (*self._looked_every, every)
        return (self.settings.calibration_steps - step) % every == 0

    def _may_look(self, step: int) -> bool:
        if not self.grids:
            return False
        for every in self._looked_every:
            if (self.settings.calibration_steps - step) % every == 0:
                return True
        return not self._looked_every

    def memory_of(self, keys: Iterable[str]) -> int:
        """Return the bytes of the grids of some parameters, known before the first step."""
        return sum(self.grids[key].nbytes for key in keys if key in self.grids)

    def rename(self, keys: Mapping[str, str]) -> None:
        """Give parameters other names at once; what has none is forgotten."""
        self.history.rename(keys)
        self.grids = {now: self.grids[before] for before, now in keys.items() if before in self.grids}

    def counts_only(self, same_state: bool) -> bool:
        """Count a step in which nothing is measured; return False, and count nothing, if something may be.

        Args:
            same_state: Whether the parameters have the very state of the last step.
        """
        step, settings = self.steps + 1, self.settings
        may_measure = self._may_look(step) or step >= settings.calibration_steps or settings.measures(step)
        if may_measure or not (same_state and self._had_moments):
            return False
        self.steps = step
        return True

    def __str__(self) -> str:
        stored = "with row and column averages" if self.settings.start == "slim" else "as AdamW"
        return f"auto, measures for {self.settings.calibration_steps} steps {stored}, {self.steps} of them done"

    def after_step(
        self, measurements: Iterable[Measurement] | None, averaged_only: Container[str] = ()
    ) -> CompressionPlan | None:
        """Count a step that has moments, measure if it is time, and return the plan after the last.

        Where more steps were done before than these settings ask for, the first step here measures and decides.

        Args:
            measurements: For each parameter with a second moment, or each part of it: its key and rule, a function
                that measures the SNR of each candidate, and all names of the parameter. None where no parameter has
                a second moment yet.
            averaged_only: Names of parameters, or parts, whose group has ``amsgrad``: ``"mean"`` are their ``forms``.
        """
        self._had_moments = measurements is not None
        if measurements is None:
            return None
        self.steps += 1
        choice = self.settings
        last = self.steps >= choice.calibration_steps
        if last or choice.measures(self.steps):
            for key, rule, found, names in measurements:
                self.history.add(self.steps, key, rule, found(), names)
        if not last:
            return None
        if not self.history:  # nothing has a grid
            return CompressionPlan({}, cutoff=choice.cutoff)
        idle = idle_patterns(choice.keep, self.history)
        for pattern in idle:
            logger.warning("plan='auto': keep: no parameter has the name or role %r", pattern)
        keep = [pattern for pattern in choice.keep if pattern not in idle]
        plan = self._decided(choice.forms, keep)
        if not any(key in averaged_only for key in plan):
            return plan
        by_averages = self._decided("mean", keep)
        rules = {key: by_averages[key] if key in averaged_only else rule for key, rule in plan.items()}
        return CompressionPlan(rules, cutoff=plan.cutoff)

    def _decided(self, forms: Forms, keep: Sequence[str]) -> CompressionPlan:
        choice = self.settings
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
        data: dict[str, Any] = {"steps": self.steps, "measured": measured}
        if self.settings.start != "full":
            grids = {key: grid.to_dict() for key, grid in self.grids.items()}
            share = self.settings.calibration_memory
            data |= {"start": self.settings.start, "calibration_memory": share, "grids": grids}
        return data

    @classmethod
    def from_dict(cls, settings: AutoPlan, data: Mapping[str, Any], plan: CompressionPlan) -> Measuring:
        """Read the data of :meth:`to_dict`. Measurements of parts that are not parts now are left out, with a warning.

        Args:
            settings: How to measure and decide.
            data: The data; anything else is a :class:`ValueError`.
            plan: Rules of the parameters, or parts of them, as they are now.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"the state dict's record of plan='auto' is damaged (it is {shown(data)})")
        try:
            share = data.get("calibration_memory", settings.calibration_memory)
            if settings.start == "slim" and "start" not in data:
                logger.warning(
                    "plan='auto', start='slim': the state dict was saved while all was measured in full, so AdamW's "
                    "second moments are held until the decision"
                )
            measuring = cls(replace(settings, start=data.get("start", "full"), calibration_memory=share))
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
