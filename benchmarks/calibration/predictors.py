"""Predict how much a plan costs: one figure for a whole model, from the measurements of an AdamW run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from scipy import stats

from benchmarks.calibration.statistics import Change, Measurements
from slimadam import CompressionPlan, Rule
from slimadam.state.rule import FACTORED, Candidate

NOISE = "1/SNR"


@dataclass(frozen=True)
class Point:
    """One compressed run against AdamW's.

    Attributes:
        workload: Name of the workload.
        lr: Peak learning rate.
        steps: Optimizer steps.
        seed: Seed of the initialisation and the batches.
        plan: The plan in words.
        gap: How much higher its held-out loss is, as a share of AdamW's.
        second_moments_saved: Share of AdamW's second-moment elements that it did without.
        predictors: Figures known beforehand.
    """

    workload: str
    lr: float
    steps: int
    seed: int
    plan: str
    gap: float
    second_moments_saved: float
    predictors: Mapping[str, float]


@dataclass(frozen=True)
class Fit:
    """The gap as a linear function of one predictor, over all points.

    Attributes:
        predictor: Its name.
        points: How many.
        spearman: Rank correlation of predictor and gap.
        pearson: Their linear correlation.
        spearman_of_size: Rank correlation of the predictor with the gap's absolute value.
        intercept: The gap where the predictor is 0.
        slope: Gap for each unit of the predictor.
        residual: Standard deviation of what the line leaves unexplained.
        left_out: By workload, the RMS error on it of the line fitted without it; empty for a single workload.
    """

    predictor: str
    points: int
    spearman: float
    pearson: float
    spearman_of_size: float
    intercept: float
    slope: float
    residual: float
    left_out: Mapping[str, float]


def root_mean_square(values: Iterable[float]) -> float:
    """Return the root of the mean square."""
    return math.sqrt(fmean(value**2 for value in values))


def chosen_candidate(rule: Rule) -> Candidate | None:
    """Return how a rule compresses; None if it does not."""
    if rule.form == "full":
        return None
    return FACTORED if rule.form == FACTORED else rule.dims


def predictors(plan: CompressionPlan, measured: Measurements) -> dict[str, float]:
    """Return each candidate predictor for a plan, from what one AdamW run measured.

    Means over elements count every element of a matrix alike and those in full as unchanged; what is measured
    at several steps is averaged over them. ``u`` is AdamW's update without learning rate and weight decay.

    Args:
        plan: Plan whose cost is to be predicted.
        measured: Measurements of an AdamW run.
    """
    candidates = {name: chosen_candidate(rule) for name, rule in plan.items()}
    return {
        "share saved": plan.second_moments_saved,
        **_of_snr(candidates, measured),
        **_of_changes(candidates, measured),
    }


def _of_snr(candidates: Mapping[str, Candidate | None], measured: Measurements) -> dict[str, float]:
    noise, elements = [], []
    for name, parameter in measured.history.items():
        if len(parameter.shape) > 1:
            chosen = candidates[name]
            noise.append(0.0 if chosen is None else 1 / parameter.average()[chosen])
            elements.append(math.prod(parameter.shape))

    def mean(function: Callable[[float], float]) -> float:
        return float(np.average([function(x) for x in noise], weights=elements))

    return {
        NOISE: mean(lambda x: x),
        "sqrt(1/SNR)": mean(math.sqrt),
        "log(1 + 1/SNR)": mean(math.log1p),
        "1/(1 + SNR)": mean(lambda x: x / (1 + x)),
        "1/SNR, mean over matrices": fmean(noise),
    }


def _of_changes(candidates: Mapping[str, Candidate | None], measured: Measurements) -> dict[str, float]:
    by_step: dict[int, list[tuple[int, Change]]] = defaultdict(list)
    for (step, name, candidate), change in measured.changes.items():
        size = math.prod(measured.history[name].shape)
        if candidates[name] == candidate:
            by_step[step].append((size, change))
        elif candidates[name] is None and candidate == (0,):
            by_step[step].append((size, replace(change, log_mean=0.0, log_square=0.0,
                                                compressed_square=change.update_square,
                                                product=change.update_square)))  # fmt: skip
    steps = [_of_one_step(entries) for entries in by_step.values()]
    return {name: fmean(step[name] for step in steps) for name in steps[0]}


def _of_one_step(entries: list[tuple[int, Change]]) -> dict[str, float]:
    changes = [change for _, change in entries]
    sizes = [size for size, _ in entries]

    def mean(function: Callable[[Change], float]) -> float:
        return float(np.average([function(change) for change in changes], weights=sizes))

    update = sum(change.update_square for change in changes)
    compressed = sum(change.compressed_square for change in changes)
    product = sum(change.product for change in changes)
    return {
        "mean -log(v/compressed v)": mean(lambda change: -change.log_mean),
        "mean log(v/compressed v)^2": mean(lambda change: change.log_square),
        "|u' - u|/|u|": math.sqrt(max(0.0, compressed + update - 2 * product) / update),
        "1 - cos(u', u)": 1 - product / math.sqrt(compressed * update),
        "log |u'|/|u|": 0.5 * math.log(compressed / update),
        "log |u'|/|u|, mean over elements": mean(lambda change: 0.5 * math.log(_ratio(change))),
        "1 - cos(u', u), mean over elements": mean(
            lambda change: 1 - change.product / math.sqrt(change.compressed_square * change.update_square)
        ),
    }


def _ratio(change: Change) -> float:
    return change.compressed_square / change.update_square


def fit(points: list[Point], predictor: str) -> Fit:
    """Fit a least-squares line of the gap over one predictor.

    Args:
        points: Plans with their gaps and predictors.
        predictor: Name of the predictor.
    """
    x, y = _columns(points, predictor)
    slope, intercept = _line(x, y)
    residuals = y - intercept - slope * x
    return Fit(
        predictor=predictor,
        points=len(points),
        spearman=float(stats.spearmanr(x, y).statistic),
        pearson=float(stats.pearsonr(x, y).statistic),
        spearman_of_size=float(stats.spearmanr(x, np.abs(y)).statistic),
        intercept=intercept,
        slope=slope,
        residual=float(np.sqrt(np.sum(residuals**2) / max(1, len(points) - 2))),
        left_out=_left_out(points, predictor),
    )


def _left_out(points: list[Point], predictor: str) -> dict[str, float]:
    workloads = sorted({point.workload for point in points})
    errors = {}
    for workload in workloads if len(workloads) > 1 else []:
        slope, intercept = _line(*_columns([point for point in points if point.workload != workload], predictor))
        x, y = _columns([point for point in points if point.workload == workload], predictor)
        errors[workload] = root_mean_square(y - intercept - slope * x)
    return errors


def _columns(points: list[Point], predictor: str) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([point.predictors[predictor] for point in points]),
        np.array([point.gap for point in points]),
    )


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)
