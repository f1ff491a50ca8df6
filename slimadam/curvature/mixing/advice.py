"""The result of a sweep of mixing ratios: curves, the advised mix, and their intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Values = NDArray[np.float64]

_RESAMPLES = 2000


@dataclass(frozen=True)
class MixCurve:
    """The sharpness of one task over the mixes.

    Attributes:
        task: The task's name.
        sharpness: The median over batches at each mix; infinite where no step is safe.
        interval: ``(lower, upper)`` of that median at each mix, by resampling the batches.
        batches: The sharpness on each batch, ``[mix][batch]``.
    """

    task: str
    sharpness: list[float]
    interval: list[tuple[float, float]]
    batches: list[list[float]]


@dataclass(frozen=True)
class MixAdvice:
    """The mix at which the largest of the tasks' sharpnesses is smallest (arXiv 2601.16979).

    Attributes:
        weights: The advised share of each domain, by name; NaN where at every mix some task has no safe step.
        intervals: Where that share lies in ``level`` of the resamples of the batches, by name; NaN without advice.
        undecided: Share of the resamples in which at every mix some task has no safe step.
        critical_lr: The largest learning rate of the advised update that raises no task's loss.
        mixes: The weights that were tried, each in the order of ``weights``.
        curves: The sharpness of each task over ``mixes``.
        level: The share of the resamples that the intervals hold.
    """

    weights: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    undecided: float
    critical_lr: float
    mixes: list[tuple[float, ...]]
    curves: list[MixCurve]
    level: float

    @classmethod
    def from_sharpness(
        cls,
        domains: Sequence[str],
        tasks: Sequence[str],
        mixes: Sequence[tuple[float, ...]],
        sharpness: _Values,
        level: float = 0.9,
        seed: int = 0,
    ) -> MixAdvice:
        """Return the advice that follows from measured sharpnesses.

        Args:
            domains: The names of the domains that are mixed.
            tasks: The names of the tasks whose losses were measured.
            mixes: Weights of the domains.
            sharpness: Of shape ``[tasks, mixes, batches]``, not NaN; infinite where no step is safe.
            level: The share of the resamples that the intervals hold.
            seed: The seed of the resampling.
        """
        curves = _median(sharpness)
        generator = np.random.default_rng(seed)
        count = sharpness.shape[2]
        resampled = [_median(sharpness[:, :, generator.integers(count, size=count)]) for _ in range(_RESAMPLES)]
        chosen = [_advised(curve) for curve in resampled]
        decided = np.array([mixes[index] for index in chosen if index is not None]).reshape(-1, len(domains))
        tails = ((1 - level) / 2, (1 + level) / 2)
        best = _advised(curves)
        weights, critical_lr, intervals = (math.nan,) * len(domains), math.nan, [(math.nan, math.nan)] * len(domains)
        if best is not None:
            largest = curves[:, best].max()
            weights, critical_lr = mixes[best], 2 / largest if largest else math.inf
            intervals = list(map(tuple, np.quantile(decided, tails, axis=0, method="inverted_cdf").T.tolist()))
        bands = np.quantile(np.stack(resampled), tails, axis=0, method="inverted_cdf")
        return cls(
            weights=dict(zip(domains, weights, strict=True)),
            intervals=dict(zip(domains, intervals, strict=True)),
            undecided=1 - len(decided) / _RESAMPLES,
            critical_lr=critical_lr,
            mixes=list(mixes),
            curves=[
                MixCurve(task, curve.tolist(), list(map(tuple, band.T.tolist())), measured.tolist())
                for task, curve, band, measured in zip(tasks, curves, bands.swapaxes(0, 1), sharpness, strict=True)
            ],
            level=level,
        )

    @property
    def ratio(self) -> float:
        """The advised share of the first domain; NaN where at every mix some task has no safe step."""
        return next(iter(self.weights.values()))

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that holds :attr:`ratio` in ``level`` of the resamples."""
        return next(iter(self.intervals.values()))

    def rows(self) -> list[dict[str, float | str]]:
        """Return a row for each mix and task: the weights, the task, its sharpness, and the interval of that."""
        rows: list[dict[str, float | str]] = []
        for index, mix in enumerate(self.mixes):
            for curve in self.curves:
                row: dict[str, float | str] = dict(zip(self.weights, mix, strict=True))
                lower, upper = curve.interval[index]
                row.update(task=curve.task, sharpness=curve.sharpness[index], lower=lower, upper=upper)
                rows.append(row)
        return rows

    def table(self) -> str:
        """Return the curves as lines of text, the advised mix marked."""
        advised = tuple(self.weights.values())
        lines = [[*self.weights, *(f"sharpness of {curve.task}" for curve in self.curves), "largest", ""]]
        for index, mix in enumerate(self.mixes):
            values = [curve.sharpness[index] for curve in self.curves]
            numbers = [*(f"{weight:.3g}" for weight in mix), *(f"{value:.4g}" for value in (*values, max(values)))]
            lines.append([*numbers, "advised" if mix == advised else ""])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def __str__(self) -> str:
        if math.isnan(self.ratio):
            return "no mix is advised: at each, some task has no safe step"
        shares = ", ".join(
            f"{weight:.3g} {name} ({self.intervals[name][0]:.3g} to {self.intervals[name][1]:.3g})"
            for name, weight in self.weights.items()
        )
        doubt = f"; in {self.undecided:.0%} of the resamples no mix was safe" if self.undecided else ""
        return f"advised mix: {shares}; no task is hurt up to learning rate {self.critical_lr:.3g}{doubt}"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON, with None for infinity (no step is safe) and NaN (no advice)."""
        written: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)
        return written

    def plot(self, path: str | Path) -> None:
        """Draw the curves over the share of the first domain, or, of more than two, over the mixes in order.

        Needs the extra ``slimadam[cli]``.

        Raises:
            ImportError: matplotlib is missing; the extra ``slimadam[cli]`` brings it.
        """
        from slimadam.curvature.plots import draw_mix

        draw_mix(self, path)


def _median(sharpness: _Values) -> _Values:
    """Return the median over the batches; of an even number the upper one, as a mean with infinity would mislead."""
    return np.asarray(np.quantile(sharpness, 0.5, axis=2, method="higher"))


def _advised(curves: _Values) -> int | None:
    """Return the mix whose largest sharpness is smallest, the middle one of equal ones; None if all are infinite."""
    largest = curves.max(axis=0)
    if np.isinf(largest.min()):
        return None
    equal = np.flatnonzero(largest == largest.min())
    return int(equal[len(equal) // 2])
