"""The calibration studies' figures on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def print_gap(result: dict[str, Any]) -> None:
    """Gaps by plan, the noise, and the best predictors."""
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


def print_steps(result: dict[str, Any]) -> None:
    """Agreement with whole runs, gaps of real runs, bars."""
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
    for bar, held in result["bars"].items():
        print(f"  {'pass' if held else 'FAIL'}  {bar}")


def print_findings(result: dict[str, Any]) -> None:
    """Each finding, whether it was reproduced, and its main figures."""
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
    "gap": print_gap,
    "steps": print_steps,
    "findings": print_findings,
}
