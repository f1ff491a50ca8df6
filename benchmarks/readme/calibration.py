"""The figures of ``docs/calibration.md``, from their result files."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.readme.markdown import origin, table


def parts(result: dict[str, Any]) -> str:
    """Return SNR and loss of a fused weight read as one matrix, as three, and head by head."""
    first = result["runs"][0]["readings"]

    def factored(label: str) -> float:
        return fmean(
            rule["snr"]["factored"] for run in result["runs"] for rule in run["readings"][label]["chosen"].values()
        )

    rows = [
        [label, f"{factored(label):.1f}", f"{reading['saved']:.1%}", f"{result['mean_gap'][label]:+.2%}"]
        for label, reading in first.items()
    ]
    header = ["read as, forms", "SNR of row and column averages", "second moments saved", "held-out loss against AdamW"]
    return f"{_runs(result)} {origin(result['machine'])}:\n\n{table(header, rows)}"


def transfer(result: dict[str, Any]) -> str:
    """Return the comparison of a carried plan with one of the model's own."""
    rows = []
    for forms, mean in result["mean_difference"].items():
        runs = [run[forms] for run in result["runs"]]
        rows.append(
            [
                forms,
                f"{fmean(run['agree'] for run in runs):.0%}",
                f"{fmean(run['loss']['own'] for run in runs):.4f}",
                f"{fmean(run['loss']['carried'] for run in runs):.4f}",
                f"{mean:+.2%}",
            ]
        )
    small, large = (f"{size['layers']} layers of width {size['width']}" for size in (result["small"], result["large"]))
    header = ["forms", "matrices stored alike", "loss, own plan", "loss, carried plan", "difference"]
    return f"From {small} to {large}; {_runs(result)} {origin(result['machine'])}:\n\n{table(header, rows)}"


def _runs(result: dict[str, Any]) -> str:
    return f"{result['steps']} steps at a learning rate of {result['lr']:g}, means of {len(result['runs'])} seeds"


def roles(result: dict[str, Any]) -> str:
    """Return how many matrices have a name."""
    total = result["total"]
    published = [found["name"] for found in result["architectures"] if found["source"] == "transformers"]
    return (
        f"{total['named']} of {total['matrices']} matrices named, {total['unknown']} unknown, {total['wrong']} wrong, "
        f"in {len(published)} architectures of transformers {result['transformers']} ({', '.join(published)}) and "
        f"{len(result['architectures']) - len(published)} written by hand."
    )


def monitoring(result: dict[str, Any]) -> str:
    """Return the cost of the monitor, and the steps at which it warned."""
    rows = [
        [
            str(run["seed"]),
            f"{run['stationary']['memory_share']:.2%}",
            f"{run['stationary']['time_share']:.2%}",
            _warned(run["stationary"]),
            _warned(run["changed"]),
        ]
        for run in result["runs"]
    ]
    steps = result["settings"]["steps"]
    then = f"other data from step {steps // 2}"
    header = ["seed", "memory, of what was saved", "time, of training", "same data throughout", then]
    return (
        f"The demo's model over {steps} steps, `python -m benchmarks.monitoring` {origin(result['machine'])}:\n\n"
        f"{table(header, rows)}"
    )


def _warned(run: dict[str, Any]) -> str:
    return "quiet" if run["warned_at"] is None else f"warns at step {run['warned_at']}"


def snr_overhead(result: dict[str, Any]) -> str:
    """Return the cost of measuring in the default schedule, and of grids with a slim start."""
    rows = [
        [
            name,
            *(f"{found[f'{part}_ms']:.0f} ms" for part in ("step", "measuring")),
            f"{found['overhead']:.2%}",
            *(f"{found[f'{part}_ms']:.1f} ms" for part in ("seeing", "measuring_grids")),
            f"{found['overhead_of_grids']:.2%}",
        ]
        for name, found in result["models"].items()
    ]
    header = ["model", "a training step", "measuring once", "of the time"]
    return (
        f'`plan="auto"` measures {result["measurements"]} times in {result["steps"]} steps; its part of the time of '
        f"these steps, and that of grids, `python -m benchmarks.snr_overhead` {origin(result['machine'])}:\n\n"
        f"{table([*header, 'grids in a step', 'measuring grids once', 'of the time'], rows)}"
    )


def slim_start(result: dict[str, Any]) -> str:
    """Return the peak of a slim start, its agreement with full measurements, and what revised plans did."""
    rows = [
        [
            f"{run['workload']}, {run['size']}",
            str(run["seed"]),
            f"{run['parameters']:,}",
            f"{run['peak']:.2%}",
            f"{run['end']:.2%}",
            f"{run['agreement']:.1%}",
        ]
        for run in result["workloads"]
    ]
    header = ["workload", "seed", "parameters", "most of any step", "at the end", "same form as measured in full"]
    quiet = sum(not run["stationary"] for run in result["revision"])
    changed = [change for run in result["revision"] for change in run["changed"]]
    after = min((change["step"] for change in changed), default=0)
    return (
        f"Second moments and grids, as shares of AdamW's second moments, and the share of all elements whose form is "
        f"the one that full measurements choose, `python -m benchmarks.slim_start` {origin(result['machine'])}:\n\n"
        f"{table(header, rows)}\n\n"
        "The end is above 5% where second moments in bytes are kept. "
        f"With `revise=True` the demo's model over {result['revision_steps']} steps changed nothing on the same data "
        f"with {quiet} of {len(result['revision'])} seeds; on other data from step {result['revision_steps'] // 2} on "
        f"{len(changed)} parameters changed their form, the first in step {after}."
    )


def calibration_gap(result: dict[str, Any]) -> str:
    """Return loss gaps by plan, workload, learning rate and length."""
    plans = list(dict.fromkeys(row["plan"] for row in result["summary"]))
    settings = list(dict.fromkeys((row["workload"], row["lr"], row["steps"]) for row in result["summary"]))
    cells = {
        (
            row["workload"],
            row["lr"],
            row["steps"],
            row["plan"],
        ): f"{row['gap']:+.2%} ({row['second_moments_saved']:.0%})"
        for row in result["summary"]
    }
    rows = [
        [f"{workload}, {lr:g}, {steps}", *(cells.get((workload, lr, steps, plan), "–") for plan in plans)]
        for workload, lr, steps in settings
    ]
    noise = result["noise"]
    seeds = max(row["seeds"] for row in result["summary"])
    return (
        f"Held-out loss against AdamW, and the share of second moments saved, for plans calibrated at a tenth of the "
        f"learning rate; means of up to {seeds} seeds {origin(result['machine'])}. AdamW against itself differs by "
        f"{noise['perturbed']['root_mean_square']:.2%} when the initialisation changes in the sixth digit"
        f"{_other_batches(noise)}.\n\n{table(['workload, learning rate, steps', *plans], rows)}\n\n"
        "![Loss gap by plan, learning rate and kind of model](calibration-gap.png)\n\n"
        "![Loss gap against two statistics of the calibration](calibration-predictor.png)"
    )


def _other_batches(noise: dict[str, Any]) -> str:
    if "other batches" not in noise:
        return ""
    return f", and by {noise['other batches']['root_mean_square']:.2%} on other batches"


def calibration_steps(result: dict[str, Any]) -> str:
    """Return how long plan="auto" has to measure."""
    compared = [row for row in result["agreement"] if row["forms"] == "best"]
    lengths = sorted({row["calibration_steps"] for row in compared})
    settings = list(dict.fromkeys((row["workload"], row["lr"]) for row in compared))
    cells = {(row["workload"], row["lr"], row["calibration_steps"]): f"{row['agreement']:.0%}" for row in compared}
    rows = [[f"{name}, {lr:g}", *(cells[name, lr, length] for length in lengths)] for name, lr in settings]
    trained = [
        [f"{row['workload']}, {row['lr']:g}", str(row["calibration_steps"]), f"{row['gap']:+.2%}",
         f"{row['second_moments_saved']:.1%}", str(row["seeds"])]
        for row in result["summary"]
    ]  # fmt: skip
    agreement = table(["workload, learning rate", *(f"{length} steps" for length in lengths)], rows)
    runs = table(["workload, learning rate", "decides after", "loss against AdamW", "saved", "seeds"], trained)
    return (
        'Share of elements for which `plan="auto"` would choose after so many steps what it would choose after the '
        f"whole run {origin(result['machine'])}:\n\n{agreement}\n\nAnd trained so, for 400 steps in all:\n\n{runs}\n\n"
        "![Agreement with the whole run, noise and loss, by steps](calibration-steps.png)"
    )


def calibration_findings(result: dict[str, Any]) -> str:
    """Return the findings of the paper that the small models reproduce."""
    found = [entry for entry in result.values() if isinstance(entry, dict) and "finding" in entry]
    rows = [[entry["finding"], "yes" if entry["reproduced"] else "no", _measured(entry)] for entry in found]
    return (
        f"Findings of the paper, on small models {origin(result['machine'])}:\n\n"
        f"{table(['finding', 'reproduced', 'measured'], rows)}\n\n"
        "![SNR by role over training](calibration-roles.png)\n\n"
        "![SNR against learning rate, vocabulary, initialisation and for vision](calibration-findings.png)"
    )


def _measured(finding: dict[str, Any]) -> str:
    """Return the figures behind one finding."""
    if "by_role" in finding:
        roles = finding["by_role"].values()
        return f"{sum(role['agreeing'] for role in roles)} of {sum(role['matrices'] for role in roles)} matrices"
    if "by_beta2" in finding:
        return "; ".join(
            f"{beta2}: SNR of the best average "
            + ", ".join(f"{value:.2f} at {lr}" for lr, value in row["snr_of_best_average"].items())
            for beta2, row in finding["by_beta2"].items()
        )
    if "snr" in finding:
        words = {role: rows["dimension 0"] for role, rows in finding["snr"].items()}
        return "; ".join(
            f"{role.replace('_', ' ')} " + ", ".join(f"{value:.2g} for {size} words" for size, value in values.items())
            for role, values in words.items()
        )
    if "models" in finding:
        return ", ".join(f"{name} {model['saved_at_cutoff_1']:.1%}" for name, model in finding["models"].items())
    if "same_choice" in finding:
        shares = {
            form: fmean(row[form] for row in finding["same_choice"].values()) for form in ("averages", "best form")
        }
        return ", ".join(f"{share:.0%} of matrices ({form})" for form, share in shares.items())
    ratios = finding["from_torchs_default_against_0.02"]
    return "SNR from torch's default against 0.02: " + ", ".join(
        f"{role.replace('_', ' ')} {ratio:.2g} times" for role, ratio in ratios.items()
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parts": parts,
    "transfer": transfer,
    "roles": roles,
    "monitoring": monitoring,
    "snr_overhead": snr_overhead,
    "slim_start": slim_start,
    "calibration_gap": calibration_gap,
    "calibration_steps": calibration_steps,
    "calibration_findings": calibration_findings,
}
