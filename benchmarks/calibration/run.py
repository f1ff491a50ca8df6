"""Gather the evidence for how slimadam chooses: ``python -m benchmarks.calibration [gap|steps|findings|all]``.

``gap``: how far held-out losses are from AdamW's, and which statistic predicts it. ``steps``: how long
``plan="auto"`` has to measure. ``findings``: which findings of arXiv 2503.01843 small models reproduce.

Finished runs stay in ``build/calibration``: an interrupted study goes on where it was, and studies share runs. All of
them take about two hours on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration import findings, gap, plots, steps
from benchmarks.calibration.runs import FULL, QUICK, Grid, Runs
from benchmarks.harness import machine

Study = Callable[[Runs, Grid], dict[str, Any]]
STUDIES: dict[str, Study] = {
    "gap": gap.study,
    "steps": steps.study,
    "findings": findings.study,
}
RUNS = Path("build/calibration")
PICTURES = Path(__file__).resolve().parents[2] / "docs"


def _print_gap(result: dict[str, Any]) -> None:
    """Print gaps by plan, the noise, and the best predictors."""
    for row in result["summary"]:
        error = f" +-{row['standard_error']:.2%}" if row["standard_error"] is not None else ""
        print(
            f"{row['workload']:12s} lr {row['lr']:<6g} {row['steps']:5d} steps  {row['plan']:40s} "
            f"{row['gap']:+.2%}{error}, {row['second_moments_saved']:.1%} saved, {row['seeds']} seeds"
        )
    for kind, gaps in result["noise"].items():
        print(f"AdamW against itself, {kind}: {gaps['root_mean_square']:.2%} (root mean square)")
    for title, found in result["fits"].items():
        print(
            f"{title}: {found['points']} runs, gap {found['mean']:+.2%} +-{found['standard_deviation']:.2%}; "
            f"saying 'no gap' errs by {found['error_of_no_gap']['root_mean_square']:.2%}"
        )
        for fit in sorted(found["predictors"], key=lambda fit: -abs(fit["spearman"])):
            print("  " + _line(fit))


def _line(fit: dict[str, Any]) -> str:
    error = f"  on a workload left out {fit['error']:.2%}" if fit["error"] is not None else ""
    ranks = f"Spearman {fit['spearman']:+.2f} (of |gap| {fit['spearman_of_size']:+.2f})"
    line = f"gap {fit['intercept']:+.4f} {fit['slope']:+.4f} x  +-{fit['residual']:.2%}"
    return f"{fit['predictor']:46s} {ranks}  Pearson {fit['pearson']:+.2f}  {line}{error}"


def _print_steps(result: dict[str, Any]) -> None:
    """Print agreement with whole runs, gaps of real runs, and bars."""
    for row in result["agreement"]:
        where = (
            f"{row['workload']:9s} lr {row['lr']:<5g} forms {row['forms']:4s} after {row['calibration_steps']:3d} steps"
        )
        print(
            f"{where}: {row['agreement']:.1%} of elements as the whole run, {row['second_moments_saved']:.1%} saved, "
            f"1/SNR {row['noise']:.3f} (whole run's choice {row['noise_of_whole_run']:.3f})"
        )
    for row in result["summary"]:
        print(
            f"{row['workload']} lr {row['lr']:g}, plan='auto' after {row['calibration_steps']} steps: "
            f"gap {row['gap']:+.2%}, {row['second_moments_saved']:.1%} saved"
        )
    machine.print_bars(result["bars"])


def _print_findings(result: dict[str, Any]) -> None:
    """Print each finding, whether it was reproduced, and its main figures."""
    for name, found in result.items():
        if isinstance(found, dict) and "finding" in found:
            print(f"{'reproduced    ' if found['reproduced'] else 'NOT reproduced'}  {name}: {found['finding']}")
            print(f"    {_figures(found)}")


def _figures(found: dict[str, Any]) -> str:
    left_out = ("finding", "reproduced", "over_training", "by_role", "models")
    return "; ".join(f"{key}: {_rounded(value)}" for key, value in found.items() if key not in left_out)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_rounded(inner)}" for key, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else value


PRINTED: dict[str, Callable[[dict[str, Any]], None]] = {
    "gap": _print_gap,
    "steps": _print_steps,
    "findings": _print_findings,
}


def main() -> None:
    """Run the studies asked for, print their figures, write results and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--finished", action="store_true", help="train nothing: report the runs that are finished")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, written to a temporary folder")
    arguments = parser.parse_args()
    grid = QUICK if arguments.quick else FULL
    grid = replace(grid, seeds=tuple(arguments.seeds)) if arguments.seeds else grid
    chosen = list(STUDIES) if arguments.study == "all" else [arguments.study]
    torch.set_num_threads(1)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            _run(chosen, grid, Runs(Path(folder, "runs"), held_out_batches=1), Path(folder), Path(folder))
    else:
        _run(chosen, grid, Runs(RUNS, may_train=not arguments.finished), machine.RESULTS, PICTURES)


def _run(studies: list[str], grid: Grid, runs: Runs, results: Path, pictures: Path) -> None:
    """Run the named studies.

    Args:
        studies: Keys of :data:`STUDIES`.
        grid: Settings that they cover.
        runs: Finished runs, and the means to do the others.
        results: Folder of ``calibration_<study>.json``.
        pictures: Folder of ``calibration-*.png``.
    """
    for name in studies:
        result = STUDIES[name](runs, grid)
        PRINTED[name](result)
        plots.DRAWN[name](result, pictures)
        print("written:", machine.write(f"calibration_{name}", result, results))


if __name__ == "__main__":
    main()
