"""How many steps ``plan="auto"`` needs before it decides."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import groupby
from statistics import fmean
from typing import Any, get_args

from benchmarks.calibration.predictors import NOISE, predictors
from benchmarks.calibration.runs import Grid, Runs, Setting, UnfinishedError
from benchmarks.calibration.statistics import Measurements
from slimadam import AutoPlan, CompressionPlan, SNRHistory
from slimadam.plans.selection import Forms

SMALLEST_SAVING = 0.95
LARGEST_GAPS = {1e-3: 0.005, 3e-3: 0.01}
"""How much higher the held-out loss may be by learning rate (mean of the seeds), as a share of AdamW's."""


def study(runs: Runs, grid: Grid) -> dict[str, Any]:
    """Compare early choices with those of whole runs, and train with them.

    Args:
        runs: Runs, finished or not.
        grid: Settings that the study covers.
    """
    compared, automatic = [], []
    for setting in grid.short_settings():
        with suppress(UnfinishedError):
            compared += _compare(setting, runs.measurements(setting), grid)
    for setting in grid.automatic_settings():
        for steps in grid.automatic_steps:
            with suppress(UnfinishedError):
                automatic.append(_automatic_run(runs, setting, steps))
    means = mean_over_seeds(automatic)
    return {"agreement": mean_over_seeds(compared), "runs": automatic, "summary": means, "bars": bars(means)}


def _compare(setting: Setting, measured: Measurements, grid: Grid) -> list[dict[str, Any]]:
    """Compare AutoPlan's choice after each number of steps with that of the whole run."""
    rows = []
    for forms in get_args(Forms):
        whole = CompressionPlan.from_snr(measured.history, forms=forms)
        least = predictors(whole, measured)[NOISE]
        for steps in grid.compared_steps:
            early = CompressionPlan.from_snr(_until(measured.history, AutoPlan(calibration_steps=steps)), forms=forms)
            rows.append(
                {"workload": setting.workload, "lr": setting.lr, "forms": forms, "calibration_steps": steps,
                 "agreement": _agreement(early, whole), "second_moments_saved": early.second_moments_saved,
                 "saved_by_whole_run": whole.second_moments_saved,
                 "noise": predictors(early, measured)[NOISE], "noise_of_whole_run": least}
            )  # fmt: skip
    return rows


def _until(history: SNRHistory, settings: AutoPlan) -> SNRHistory:
    """Return the measurements among which AutoPlan would have decided.

    Raises:
        ValueError: It would have measured at a step where the run did not.
    """
    wanted = {step for step in range(1, settings.calibration_steps + 1) if settings.measures(step)}
    missing = wanted - set(history.steps)
    if missing:
        raise ValueError(f"calibration_steps={settings.calibration_steps}: not measured at steps {sorted(missing)}")
    some = SNRHistory()
    for name, parameter in history.items():
        some.record(0, name, parameter.shape, {}, parameter.role)
        for step in sorted(wanted & set(parameter.values)):
            some.record(step, name, parameter.shape, parameter.values[step])
    return some


def _agreement(plan: CompressionPlan, other: CompressionPlan) -> float:
    """Return the share of elements in matrices for which both plans choose the same form and dimensions."""
    sizes = {name: math.prod(rule.shape or ()) for name, rule in plan.items() if len(rule.shape or ()) > 1}
    same = [name for name in sizes if (plan[name].form, plan[name].dims) == (other[name].form, other[name].dims)]
    return sum(sizes[name] for name in same) / sum(sizes.values())


def _automatic_run(runs: Runs, setting: Setting, steps: int) -> dict[str, Any]:
    reference = runs.adamw(setting).held_out_loss
    outcome = runs.automatic(setting, AutoPlan(calibration_steps=steps))
    return {
        "workload": setting.workload,
        "lr": setting.lr,
        "seed": setting.seed,
        "calibration_steps": steps,
        "gap": outcome.held_out_loss / reference - 1,
        "second_moments_saved": outcome.second_moments_saved,
    }


def mean_over_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each combination of what is varied, with the means of what is measured."""
    varied = [name for name in ("workload", "lr", "forms", "calibration_steps") if name in rows[0]]

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in varied)

    means = []
    for values, group in groupby(sorted(rows, key=key), key):
        some = list(group)
        measured = [name for name in some[0] if name not in (*varied, "seed")]
        means.append(
            {**dict(zip(varied, values, strict=True)), "seeds": len(some),
             **{name: fmean(row[name] for row in some) for name in measured}}
        )  # fmt: skip
    return means


def bars(means: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which promises AutoPlan keeps, by learning rate and number of steps."""
    held = {}
    for row in means:
        where = f"lr {row['lr']:g}, {row['calibration_steps']} steps"
        held[f"{where}: at least {SMALLEST_SAVING:.0%} saved"] = row["second_moments_saved"] >= SMALLEST_SAVING
        if row["lr"] in LARGEST_GAPS:
            held[f"{where}: gap at most {LARGEST_GAPS[row['lr']]:.1%}"] = row["gap"] <= LARGEST_GAPS[row["lr"]]
    return held
