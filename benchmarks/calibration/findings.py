"""Check for the small models here which findings of arXiv 2503.01843 hold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean, median
from typing import Any

from benchmarks.calibration.runs import WORKLOADS, Grid, Runs, Setting, UnfinishedError
from benchmarks.calibration.statistics import Measurements
from slimadam import CompressionPlan, SNRHistory
from slimadam.measurement.history import ParameterSNR
from slimadam.plans.selection import Forms
from slimadam.state.rule import FACTORED, Candidate

PAPER_DIMS = {
    "token_embedding": (1,),
    "lm_head": (1,),
    "query": (1,),
    "key": (1,),
    "attention_output": (0,),
    "mlp_down": (0,),
}
"""Dimensions that the paper recommends, for the roles on which its models agree."""
DIMENSIONS: dict[str, Candidate] = {"dimension 0": (0,), "dimension 1": (1,), "row and column averages": FACTORED}
GPT = "byte GPT"
SWEPT = {"beta2 = 0.95": GPT, "beta2 = 0.999": "byte GPT, torch's betas"}
"""The demo's decay of second moments and torch's default, at each of which the learning rate is varied."""
TORCH_INITIALISATION = "byte GPT, torch's initialisation"
VOCABULARIES = {256: "word GPT, 256 words", 4096: "word GPT"}
VISION = ("digits ViT", "digits ResNet")
LARGEST_DROP = 0.5
"""The share of matrices whose SNR has to be lower at the largest learning rate than at the smallest."""
CHANGED = 1.5
"""How much an initialisation has to raise or lower a role's SNR."""
MOST = 0.9

Histories = Sequence[SNRHistory]


def study(runs: Runs, grid: Grid) -> dict[str, Any]:
    """Measure, and say of each finding whether it was reproduced; leave out what is unfinished.

    Args:
        runs: Runs, finished or not.
        grid: Settings that the study covers.
    """
    lowest = grid.finding_rates[0]

    def small(lr: float) -> list[SNRHistory]:
        return [found.history for setting in _settings(grid, lr) for found in _finished(runs.calibration, setting)]

    def full(lr: float, workload: str = GPT) -> list[SNRHistory]:
        settings = _settings(grid, lr, workload)
        return [found.history for setting in settings for found in _finished(runs.measurements, setting)]

    def one(workload: str) -> SNRHistory:
        return runs.measurements(Setting(workload, lowest, grid.steps, grid.seeds[0])).history

    findings: dict[str, Callable[[], dict[str, Any]]] = {
        "roles": lambda: _roles(small(lowest), full(lowest)),
        "learning_rate": lambda: learning_rate(
            {label: {lr: full(lr, name) for lr in grid.swept_rates} for label, name in SWEPT.items()}
        ),
        "vocabulary": lambda: vocabulary({size: one(name) for size, name in VOCABULARIES.items()}),
        "initialisation": lambda: _initialisation([one(GPT)], [one(TORCH_INITIALISATION)]),
        "vision": lambda: vision({name: one(name) for name in VISION}),
        "transfer": lambda: _transfer(runs, grid),
    }
    result: dict[str, Any] = {"learning_rate_of_roles": lowest}
    for name, find in findings.items():
        with suppress(UnfinishedError):
            result[name] = find()
    result["savings"] = _savings(runs, grid)
    return result


def _savings(runs: Runs, grid: Grid) -> dict[str, dict[str, float]]:
    """Return the share of second moments that plain averages save in each model, measured at the full learning rate."""
    rows = {}
    for name in WORKLOADS:
        setting = Setting(name, grid.finding_rates[0], grid.steps, grid.seeds[0])
        for found in _finished(runs.measurements, setting):
            rows[name] = {f"saved_at_cutoff_{cutoff}": _saved([found.history], cutoff) for cutoff in (1, 2)}
    return rows


def _settings(grid: Grid, lr: float, workload: str = GPT) -> list[Setting]:
    return [Setting(workload, lr, grid.steps, seed) for seed in grid.seeds]


def _finished(find: Callable[[Setting], Measurements], setting: Setting) -> list[Measurements]:
    with suppress(UnfinishedError):
        return [find(setting)]
    return []


def matrices(histories: Histories) -> list[ParameterSNR]:
    """Return every measured parameter that has at least two dimensions."""
    return [parameter for history in histories for parameter in history.values() if len(parameter.shape) > 1]


def best_average(parameter: ParameterSNR) -> float:
    """Return the highest SNR among the plain averages, the paper's candidates."""
    return max(value for candidate, value in parameter.average().items() if candidate != FACTORED)


def geometric_mean(values: Sequence[float]) -> float:
    """Return ``exp`` of the mean logarithm."""
    return math.exp(fmean(map(math.log, values)))


def _saved(histories: Histories, cutoff: float = 1.0) -> float:
    """Return the share of second moments that the paper's rule saves, averaged over the runs."""
    return fmean(CompressionPlan.from_snr(history, cutoff).second_moments_saved for history in histories)


def _roles(small: Histories, full: Histories) -> dict[str, Any]:
    """Return the SNR by role, at a tenth of the learning rate, which the paper's rule uses, and at all of it."""
    by_role: dict[str, dict[str, Any]] = {}
    for role, dims in PAPER_DIMS.items():
        averages = [parameter.average() for parameter in matrices(small) if parameter.role == role]
        if averages:
            other = (1 - dims[0],)
            by_role[role] = {
                "paper_dims": dims,
                "agreeing": sum(snr[dims] > snr[other] for snr in averages),
                "matrices": len(averages),
                "snr": {label: fmean(snr[candidate] for snr in averages) for label, candidate in DIMENSIONS.items()},
                "over_training": {label: _over_training(full, role, label) for label in DIMENSIONS},
            }
    higher = {role: row["snr"][f"dimension {row['paper_dims'][0]}"]
              > row["snr"][f"dimension {1 - row['paper_dims'][0]}"] for role, row in by_role.items()}  # fmt: skip
    return {
        "finding": "the dimension with the higher SNR is a matter of the layer's role",
        "reproduced": bool(higher) and all(higher.values()),
        "by_role": by_role,
    }


def _over_training(histories: Histories, role: str, label: str) -> list[tuple[int, float]]:
    """Return median over layers and runs at each measured step."""
    values: dict[int, list[float]] = defaultdict(list)
    for parameter in matrices(histories):
        if parameter.role == role:
            for step, value in parameter.series(DIMENSIONS[label]):
                values[step].append(value)
    return [(step, median(values[step])) for step in sorted(values)]


def learning_rate(sweeps: Mapping[str, Mapping[float, Histories]]) -> dict[str, Any]:
    """Return how the SNR changes with the learning rate, matrix by matrix, for each decay of the second moments."""
    rows = {}
    for label, by_rate in sweeps.items():
        rates = sorted(lr for lr in by_rate if by_rate[lr])
        if not rates:
            raise UnfinishedError(label)
        best = {lr: [best_average(parameter) for parameter in matrices(by_rate[lr])] for lr in rates}
        factored = {lr: [parameter.average()[FACTORED] for parameter in matrices(by_rate[lr])] for lr in rates}
        lower = [after < before for before, after in zip(best[rates[0]], best[rates[-1]], strict=True)]
        rows[label] = {
            "seeds": len(by_rate[rates[0]]),
            "lower_at_the_largest_rate": fmean(lower),
            "snr_of_best_average": {f"{lr:g}": geometric_mean(best[lr]) for lr in rates},
            "snr_of_row_and_column_averages": {f"{lr:g}": geometric_mean(factored[lr]) for lr in rates},
            "saved_at_cutoff_1": {f"{lr:g}": _saved(by_rate[lr]) for lr in rates},
            "saved_at_cutoff_2": {f"{lr:g}": _saved(by_rate[lr], 2.0) for lr in rates},
        }
    return {
        "finding": "the SNR falls as the learning rate grows",
        "reproduced": all(_falls(row) for row in rows.values()),
        "by_beta2": rows,
    }


def _falls(row: Mapping[str, Any]) -> bool:
    """Return whether most matrices, and their mean, have a lower SNR at the largest rate than at the smallest."""
    smallest, *_, largest = row["snr_of_best_average"].values()
    return bool(largest < smallest and row["lower_at_the_largest_rate"] > LARGEST_DROP)


def vocabulary(histories: Mapping[int, SNRHistory]) -> dict[str, Any]:
    """Return SNR of embedding and head for growing heavy-tailed vocabularies."""
    snr = {
        role: {
            label: {str(size): parameter.average()[candidate] for size, history in histories.items()
                    for parameter in history.values() if parameter.role == role}
            for label, candidate in DIMENSIONS.items()
        }
        for role in ("token_embedding", "lm_head")
    }  # fmt: skip
    along_tokens = [list(found["dimension 0"].values()) for found in snr.values()]
    return {
        "finding": "the larger a heavy-tailed vocabulary, the lower the SNR along its tokens",
        "reproduced": all(values[-1] < values[0] for values in along_tokens),
        "snr": snr,
    }


def _initialisation(gpt2: Histories, torch: Histories) -> dict[str, Any]:
    """Return the SNR from a standard deviation of 0.02 and from torch's defaults, by role."""
    by_role = {
        label: {
            role: geometric_mean([best_average(found) for found in matrices(histories) if found.role == role])
            for role in dict.fromkeys(parameter.role for parameter in matrices(histories))
        }
        for label, histories in {"0.02 normal": gpt2, "torch's default": torch}.items()
    }
    ratios = {role: torch_snr / by_role["0.02 normal"][role] for role, torch_snr in by_role["torch's default"].items()}
    return {
        "finding": f"another initialisation changes the SNR of some roles {CHANGED:g} times and more",
        "reproduced": max(max(ratio, 1 / ratio) for ratio in ratios.values()) >= CHANGED,
        "snr_of_best_average_by_role": by_role,
        "from_torchs_default_against_0.02": ratios,
    }


def vision(histories: Mapping[str, SNRHistory]) -> dict[str, Any]:
    """Return how far the second moments of vision models can be averaged."""
    models: dict[str, dict[str, Any]] = {
        name: {"saved_at_cutoff_1": _saved([history]), "saved_at_cutoff_2": _saved([history], 2.0),
               "snr_by_role": _by_role(history)}
        for name, history in histories.items()
    }  # fmt: skip
    return {
        "finding": f"a vision transformer and a ResNet do without {MOST:.0%} of their second moments at cutoff 1",
        "reproduced": all(model["saved_at_cutoff_1"] >= MOST for model in models.values()),
        "models": models,
    }


def _by_role(history: SNRHistory) -> dict[str, dict[str, float]]:
    """Return SNR along each single dimension or group of them, averaged over the layers of a role."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for parameter in matrices([history]):
        for candidate, value in parameter.average().items():
            if math.isfinite(value):
                found[parameter.role][str(candidate)].append(value)
    return {role: {candidate: fmean(values) for candidate, values in row.items()} for role, row in found.items()}


def _transfer(runs: Runs, grid: Grid) -> dict[str, Any]:
    """Return the share of matrices for which a tenth of the learning rate and all of it choose the same."""
    rows = {}
    for name, rates in grid.learning_rates.items():
        for lr in rates:
            settings = [setting for setting in grid.short_settings() if (setting.workload, setting.lr) == (name, lr)]
            pairs = [
                (small.history, full.history)
                for setting in settings
                for small in _finished(runs.calibration, setting)
                for full in _finished(runs.measurements, setting)
            ]
            if pairs:
                rows[f"{name}, lr {lr:g}"] = {
                    "averages": _same_choices(pairs, "mean"),
                    "best form": _same_choices(pairs, "best"),
                }
    return {
        "finding": "what is chosen at a tenth of the learning rate is what the full rate would choose",
        "reproduced": fmean(row["averages"] for row in rows.values()) >= MOST,
        "same_choice": rows,
    }


def _same_choices(pairs: list[tuple[SNRHistory, SNRHistory]], forms: Forms) -> float:
    same = []
    for small, full in pairs:
        plans = [CompressionPlan.from_snr(history, forms=forms) for history in (small, full)]
        same += [
            (plans[0][name].form, plans[0][name].dims) == (plans[1][name].form, plans[1][name].dims)
            for name, measured in small.items()
            if len(measured.shape) > 1
        ]
    return fmean(same)
