"""The documents' section on warmup, from its result file."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.readme.markdown import origin, table


def warmup(result: dict[str, Any]) -> str:
    """Return the rates that train with each warmup, the steps saved, and GI-Adam's figures."""
    training, exactness = result["training"], result["exactness"]
    lines = [
        f"`python -m benchmarks.warmup` {origin(result['machine'])}: {len(training['seeds'])} seeds, "
        f"{training['steps']} steps each, warmup and then a cosine to zero. A target rate trains where the final loss "
        "of every seed is below the middle between guessing by frequency and the best loss of all. The number after a "
        "method is the length of the plain warmup.",
        "",
    ]
    for name, found in training["models"].items():
        lines += [*_table(name, found, training), ""]
    lines += [*(f"- {bar}." for bar, held in result["bars"].items() if held and "catapult" in bar)]
    ran = ", ".join(exactness["error_of_five_steps"])
    lines.append(
        f"- GI-Adam's first five steps are within {exactness['largest_error']:.1e} of the formula in float64 ({ran})."
    )
    return "\n".join(lines)


def _table(name: str, found: dict[str, Any], training: dict[str, Any]) -> list[str]:
    critical = ", ".join(f"{rate:.2g}" for rate in found["critical_lr"])
    ratios = [each["ratio"] for each in found["at_initialisation"]]
    rates = [each["gradient"]["critical_lr"] for each in found["at_initialisation"]]
    rows = [
        [label, *(f"{statistics.fmean(losses):.2f}" for losses in row), str(found["largest_rate"][label] or "-")]
        for label, row in found["final_loss"].items()
    ]
    return [
        f"{name}: critical learning rate at initialisation (smallest of 4 batches) {critical} by seed, with GI-Adam "
        f"{', '.join(f'{rate:.2g}' for rate in rates)}; its preconditioned sharpness is {min(ratios):.0f} to "
        f"{max(ratios):.0f} times smaller.",
        "",
        table(["", *(f"{rate:g}" for rate in training["rates"]), "largest that trains"], rows),
        "",
        "Final loss of catapult above linear warmup of the same slope, as a share of what is learnt, at each target "
        "that trains with linear: " + "; ".join(_above_linear(row) for row in found["catapult"]) + ".",
    ]


def _above_linear(row: dict[str, Any]) -> str:
    cells = ", ".join(f"{above:+.1%} at {rate}" for rate, above in row["above_linear_where_it_trains"].items())
    return f"warmup {row['warmup']}: {cells}"


SECTIONS = {"warmup": warmup}
