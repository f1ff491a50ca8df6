"""How far a compressed run's held-out loss is from AdamW's, and which statistic says so beforehand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

from benchmarks.calibration.predictors import Fit, Point, fit, predictors, root_mean_square
from benchmarks.calibration.runs import Grid, Outcome, Runs, Setting, UnfinishedError, workload
from slimadam import CompressionPlan, Rule, SNRHistory
from slimadam.plans.selection import Forms
from slimadam.state.rule import FACTORED

AVERAGES, BEST = "averages, cutoff 1", "best form, cutoff 1"
FACTORED_ALL, WORSE = "all matrices factored", "all averaged, worse dimension"
CHOSEN = "plans chosen by SNR, and factored"
SETS: dict[str, Callable[[Point], bool]] = {
    "all plans": lambda point: True,
    CHOSEN: lambda point: point.plan != WORSE,
    "byte GPT": lambda point: point.workload == "byte GPT",
    "byte GPT, lr 0.001": lambda point: (point.workload, point.lr) == ("byte GPT", 1e-3),
    "byte GPT, lr 0.003": lambda point: (point.workload, point.lr) == ("byte GPT", 3e-3),
    "byte LSTM": lambda point: point.workload == "byte LSTM",
    "word GPT": lambda point: point.workload == "word GPT",
}
"""The points that lines are fitted to."""
SMALLEST_SET = 4
NOISE_SHARE, GROWTH = "1/(1 + SNR), at 0.1 lr", "log |u'|/|u|, mean over elements, at 0.1 lr"
PICTURED = (("byte GPT", NOISE_SHARE), (CHOSEN, NOISE_SHARE), (CHOSEN, GROWTH))
"""Sets and predictors that are drawn."""
CHOICES: tuple[tuple[str, Forms, float], ...] = (
    ("averages", "mean", 1.0),
    ("averages", "mean", 2.0),
    ("best form", "best", 1.0),
    ("best form", "best", 2.0),
    ("best form", "best", 4.0),
)
"""Choices in words, and as :meth:`CompressionPlan.from_snr` takes them."""


def study(runs: Runs, grid: Grid) -> dict[str, Any]:
    """Train with each plan, compare with AdamW, and fit the gap to each predictor.

    Args:
        runs: Runs, finished or not.
        grid: Settings that the study covers.
    """
    points: list[Point] = []
    for setting in grid.short_settings():
        with suppress(UnfinishedError):
            points += _points_of(runs, setting)
    long: list[Point] = []
    for setting in grid.long_settings():
        with suppress(UnfinishedError):
            long += _long_points_of(runs, setting, grid)
    return {
        "summary": summary([*points, *long]),
        "noise": _noise(runs, grid),
        "loss_by_learning_rate": {name: _loss_by_learning_rate(runs, grid, name) for name in grid.learning_rates},
        "fits": {
            title: fits(some)
            for title, chosen in SETS.items()
            if len(some := [point for point in points if chosen(point)]) >= SMALLEST_SET
        },
        "points": [{**asdict(point), "predictors": _recorded(point)} for point in (*points, *long)],
    }


def _recorded(point: Point) -> dict[str, float]:
    return {name: point.predictors[name] for name in (NOISE_SHARE, GROWTH) if name in point.predictors}


def _plans_of(runs: Runs, setting: Setting) -> dict[str, CompressionPlan]:
    """Return the plans compared: five chosen by a calibration at a tenth of the rate, and two without calibration."""
    history = runs.calibration(setting).history
    chosen = {
        f"{words}, cutoff {cutoff:g}": CompressionPlan.from_snr(history, cutoff, forms=forms)
        for words, forms, cutoff in CHOICES
    }
    model = workload(setting.workload).new_model(setting.seed)
    return {**chosen, FACTORED_ALL: CompressionPlan.factored(model), WORSE: worse_dimension(history)}


def worse_dimension(history: SNRHistory) -> CompressionPlan:
    """Return a plan that averages every matrix over the single dimension with the lowest SNR."""
    rules = {}
    for name, measured in history.items():
        snr = measured.average()
        rule = Rule(shape=measured.shape, snr=snr, role=measured.role)
        single = [candidate for candidate in snr if candidate != FACTORED and len(candidate) == 1]
        if single:
            rule = replace(rule, form="mean", dims=min(single, key=lambda dims: snr[dims]))
        rules[name] = rule
    return CompressionPlan(rules)


def _points_of(runs: Runs, setting: Setting) -> list[Point]:
    """Return every plan of a setting, with what the calibration and AdamW's own run measured."""
    reference = runs.adamw(setting)
    sources = {"at 0.1 lr": runs.calibration(setting), "at lr": runs.measurements(setting)}
    points = []
    for label, plan in _plans_of(runs, setting).items():
        known = {
            f"{name}, {where}": value
            for where, measured in sources.items()
            for name, value in predictors(plan, measured).items()
        }
        with suppress(UnfinishedError):
            points.append(_point(setting, label, runs.compressed(setting, plan), reference, known))
    return points


def _long_points_of(runs: Runs, setting: Setting, grid: Grid) -> list[Point]:
    """Return the two plans that matter most, chosen by the short calibration, in a longer run."""
    plans = _plans_of(runs, replace(setting, steps=grid.steps))
    reference = runs.adamw(setting)
    return [_point(setting, label, runs.compressed(setting, plans[label]), reference, {}) for label in (AVERAGES, BEST)]


def _point(setting: Setting, plan: str, outcome: Outcome, reference: Outcome, known: Mapping[str, float]) -> Point:
    return Point(
        **asdict(setting),
        plan=plan,
        gap=outcome.held_out_loss / reference.held_out_loss - 1,
        second_moments_saved=outcome.second_moments_saved,
        predictors=known,
    )


def _noise(runs: Runs, grid: Grid) -> dict[str, Any]:
    """Return how far AdamW is from itself, as a share of its held-out loss, for the first seed of each setting.

    ``perturbed``: with an initialisation that differs in the sixth digit. ``other batches``: with other batches.
    """
    found: dict[str, dict[str, float]] = {"perturbed": {}, "other batches": {}}
    for setting in grid.short_settings():
        for kind, run in (("perturbed", runs.perturbed), ("other batches", runs.other_batches)):
            if setting.seed == grid.seeds[0]:
                with suppress(UnfinishedError):
                    reference = runs.adamw(setting).held_out_loss
                    found[kind][str(setting)] = run(setting).held_out_loss / reference - 1
    return {kind: {"root_mean_square": root_mean_square(gaps.values()), **gaps} for kind, gaps in found.items() if gaps}


def _loss_by_learning_rate(runs: Runs, grid: Grid, name: str) -> dict[str, float]:
    """Return AdamW's held-out loss by rate, averaged over the seeds, to show whether a rate is below the best one."""
    losses: dict[str, list[float]] = defaultdict(list)
    for setting in grid.short_settings():
        if setting.workload == name:
            with suppress(UnfinishedError):
                losses[f"{setting.lr:g}"].append(runs.adamw(setting).held_out_loss)
    return {lr: fmean(some) for lr, some in losses.items()}


def fits(points: list[Point]) -> dict[str, Any]:
    """Fit lines over each predictor, and compare them with the guess "no gap"."""
    gaps = [point.gap for point in points]
    workloads = sorted({point.workload for point in points})
    by_workload = {name: root_mean_square(point.gap for point in points if point.workload == name)
                   for name in workloads}  # fmt: skip
    return {
        "points": len(points),
        "mean": fmean(gaps),
        "standard_deviation": stdev(gaps),
        "error_of_no_gap": {**by_workload, "root_mean_square": root_mean_square(by_workload.values())},
        "predictors": [_fit_as_data(fit(points, name)) for name in points[0].predictors],
    }


def _fit_as_data(line: Fit) -> dict[str, Any]:
    return {**asdict(line), "error": root_mean_square(line.left_out.values()) if line.left_out else None}


def summary(points: list[Point]) -> list[dict[str, Any]]:
    """Return the mean gap over the seeds of each plan, and its standard error."""

    def key(point: Point) -> tuple[str, float, int, str]:
        return point.workload, point.lr, point.steps, point.plan

    rows = []
    for (name, lr, steps, plan), group in groupby(sorted(points, key=key), key):
        some = list(group)
        gaps = [point.gap for point in some]
        rows.append(
            {"workload": name, "lr": lr, "steps": steps, "plan": plan, "seeds": len(gaps), "gap": fmean(gaps),
             "standard_error": stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None,
             "second_moments_saved": fmean(point.second_moments_saved for point in some)}
        )  # fmt: skip
    return rows
