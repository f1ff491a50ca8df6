"""Compare warmup from the critical learning rate with plain warmup, and check GI-Adam: ``python -m benchmarks.warmup``.

``exactness``: GI-Adam's first five steps in every implementation and form beside the formula. ``training``: the range
of target rates that train with each warmup, the steps saved, the sharpness at initialisation. Without either, both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.correctness import gradient_initialised
from benchmarks.harness import machine
from benchmarks.warmup import sharpness
from benchmarks.warmup.plot import draw
from benchmarks.warmup.runs import BETAS, WORKLOADS, Method, Runs, Study, guessing_loss

DOCS = Path(__file__).resolve().parents[2] / "docs"
QUICK = Study(steps=20, warmups=(4,), rates=(1e-2, 0.5), seeds=(0,), workloads=("digits MLP",))
ALLOWED_LOSS = 0.01
"""Share of the distance from guessing to the best loss by which catapult may be worse than linear warmup."""


def exactness(forms: Sequence[str]) -> dict[str, Any]:
    """Compare GI-Adam with the formula."""
    missing = gradient_initialised.missing()
    ran = [name for name in gradient_initialised.IMPLEMENTATIONS if name not in missing]
    errors = {name: gradient_initialised.errors(name, forms) for name in ran}
    return {
        "not_measured": missing,
        "error_of_five_steps": errors,
        "largest_error": max(max(found.values()) for found in errors.values()),
        "rounded_first_moments": {name: gradient_initialised.rounded_moments(name, forms) for name in ran},
        "first_update_over_adams": gradient_initialised.first_update_of_adams(),
        "sqrt_of_1_minus_beta2": math.sqrt(1 - gradient_initialised.HYPER.betas[1]),
    }


def exactness_bars(result: dict[str, Any]) -> dict[str, bool]:
    """Return whether each bar of the exactness is met."""
    update = result["first_update_over_adams"] / result["sqrt_of_1_minus_beta2"]
    return {
        f"GI-Adam's first five steps are within {gradient_initialised.LARGEST_ERROR:g} of the formula, in "
        f"{len(result['error_of_five_steps'])} implementations: {result['largest_error']:.1e}":
            result["largest_error"] <= gradient_initialised.LARGEST_ERROR,
        f"its first update is sqrt(1 - beta2) of Adam's: {update:.9f} times that": abs(update - 1) <= 1e-6,
    }  # fmt: skip


def training(study: Study) -> dict[str, Any]:
    """Train all runs of a study, by model."""
    found = {}
    for name in study.workloads:
        began = time.monotonic()
        print(f"training the {name}: {len(study.methods) * len(study.rates) * len(study.seeds)} runs", flush=True)
        runs = Runs(study, name).run()
        found[name] = {
            **_summary(runs, guessing_loss(WORKLOADS[name], study.seeds[0])),
            "at_initialisation": [sharpness.initial(WORKLOADS[name], seed) for seed in study.seeds],
            "seconds": time.monotonic() - began,
        }
    return {"steps": study.steps, "betas": BETAS, "rates": study.rates, "seeds": study.seeds, "models": found}


def _summary(runs: Runs, guessing: float) -> dict[str, Any]:
    """Return the phase diagram, what trains, and what catapult warmup saves, of one model."""
    study = runs.study
    table = {
        method.label: [runs.losses(method, rate) for rate in study.rates] for method in study.methods
    }  # by rate, then by seed
    best = min(statistics.fmean(losses) for row in table.values() for losses in row)
    limit = (guessing + best) / 2
    return {
        "critical_lr": [runs.critical[seed] for seed in study.seeds],
        "guessing_loss": guessing,
        "best_loss": best,
        "trains_below": limit,
        "final_loss": table,
        "trains": {label: [max(losses) < limit for losses in row] for label, row in table.items()},
        "largest_rate": {label: _largest_rate(study, row, limit) for label, row in table.items()},
        "catapult": [
            _against_linear(runs, method, guessing - best, limit) for method in study.methods if method.catapult
        ],
    }


def _largest_rate(study: Study, row: list[list[float]], limit: float) -> float | None:
    return max((rate for rate, losses in zip(study.rates, row, strict=True) if max(losses) < limit), default=None)


def _against_linear(runs: Runs, catapult: Method, learnt: float, limit: float) -> dict[str, Any]:
    """Return steps saved, and the loss above that of linear warmup of the same slope, as a share of what is learnt."""
    study, linear = runs.study, Method("linear", catapult.warmup)
    saved = []
    for rate in study.rates:
        for seed in study.seeds:
            plain, ours = (runs.runs[method.label, rate, seed] for method in (linear, catapult))
            expected = catapult.warmup * min(1.0, runs.critical[seed] / rate)
            if plain.reached is not None and ours.reached is not None:
                saved.append({"rate": rate, "seed": seed, "saved": plain.reached - ours.reached, "expected": expected})
    means = {rate: statistics.fmean(runs.losses(linear, rate)) for rate in study.rates}
    above = {rate: (statistics.fmean(runs.losses(catapult, rate)) - means[rate]) / learnt for rate in study.rates}
    best = min(means, key=lambda rate: means[rate])
    trained = [rate for rate in study.rates if max(runs.losses(linear, rate)) < limit]
    return {
        "warmup": catapult.warmup,
        "steps_saved": saved,
        "linears_best_rate": best,
        "above_linear": above[best],
        "above_linear_where_it_trains": {f"{rate:g}": above[rate] for rate in trained},
    }


def training_bars(result: dict[str, Any]) -> dict[str, bool]:
    """Return whether each bar of the training is met."""
    bars = {}
    for name, found in result["models"].items():
        for row in found["catapult"]:
            runs, label = row["steps_saved"], f"{name}, warmup {row['warmup']}: catapult"
            off = max((abs(run["saved"] - math.floor(run["expected"] + 1e-6)) for run in runs), default=0)
            bars[
                f"{label} reaches the target floor(warmup critical_lr / target) steps before linear, "
                f"{len(runs)} runs: off by {off} steps at most"
            ] = off == 0
            bars[
                f"{label} trains no worse at linear's best target, {row['linears_best_rate']:g}: final loss "
                f"{row['above_linear']:+.2%} of what can be learnt (bar: {ALLOWED_LOSS:+.0%})"
            ] = row["above_linear"] <= ALLOWED_LOSS
    return bars


def _print_training(result: dict[str, Any]) -> None:
    for name, found in result["models"].items():
        critical = ", ".join(f"{rate:.3g}" for rate in found["critical_lr"])
        print(
            f"{name}: critical learning rate {critical}; trains where the loss ends below {found['trains_below']:.3f}"
        )
        print(f"{'target':>24s}" + "".join(f"{rate:>8g}" for rate in result["rates"]) + "   largest that trains")
        for label, row in found["final_loss"].items():
            cells = "".join(f"{statistics.fmean(losses):8.3f}" for losses in row)
            print(f"{label:>24s}{cells}   {found['largest_rate'][label]}")
        for row in found["catapult"]:
            cells = ", ".join(f"{rate}: {above:+.1%}" for rate, above in row["above_linear_where_it_trains"].items())
            print(f"  final loss of catapult {row['warmup']} above linear, of what can be learnt, by target: {cells}")
        for each in found["at_initialisation"]:
            print(
                f"  at the start: preconditioned sharpness {each['zeros']['preconditioned_sharpness']:.4g}, GI-Adam"
                f" {each['gradient']['preconditioned_sharpness']:.4g}, ratio {each['ratio']:.1f}; critical learning "
                f"rate {each['zeros']['critical_lr']:.3g}, GI-Adam {each['gradient']['critical_lr']:.3g}"
            )


def _print_exactness(result: dict[str, Any]) -> None:
    for name, errors in result["error_of_five_steps"].items():
        worst = max(errors, key=lambda form: errors[form])
        print(f"{name:10s} largest relative error of five steps {errors[worst]:.1e} ({worst})")
    for name, reason in result["not_measured"].items():
        print(f"{name:10s} not measured: {reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write ``results/warmup.json`` and ``docs/warmup.png``; 1 if a bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("what", nargs="?", choices=["exactness", "training"], help="only this; nothing is written then")
    parser.add_argument("--quick", action="store_true", help="one form and a few short runs, to see that it works")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the picture")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {}
    bars: dict[str, bool] = {}
    if options.what != "training":
        forms = list(gradient_initialised.FORMS)
        result["exactness"] = exactness(forms[-1:] if options.quick else forms)
        _print_exactness(result["exactness"])
        bars |= exactness_bars(result["exactness"])
    if options.what != "exactness":
        result["training"] = training(QUICK if options.quick else Study())
        _print_training(result["training"])
        bars |= training_bars(result["training"])
    met = machine.print_bars(bars)
    if options.what is None:
        print("written:", machine.write("warmup", {**result, "bars": bars}, options.out))
        print("written:", draw(result["training"], options.docs / "warmup.png"))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
