"""Put the committed figures into the README: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def origin(machine: dict[str, Any]) -> str:
    """Where and when a result was measured, in one line."""
    versions = f"Python {machine['python']}, torch {machine['versions']['torch']}"
    return f"({machine['processor']}, {machine['cores']} cores, {versions}, {machine['date']})"


def throughput(result: dict[str, Any]) -> str:
    """Time of a step, as ratios to AdamW's default."""
    rows = [f"| {label} | {ratio:.2f} |" for label, ratio in result["ratios"].items()]
    return "\n".join(
        [
            "Time of one step over the shapes of GPT-2 124M in float32 on a CPU, as a ratio to `torch.optim.AdamW`, "
            f"medians of one run {origin(result['machine'])}:",
            "",
            "| | time |",
            "|---|---|",
            *rows,
        ]
    )


def parity(result: dict[str, Any]) -> str:
    """How exact the step is."""
    ulps = " and ".join(f"{value:.1f} ulp ({dtype.removeprefix('torch.')})" for dtype, value in result["ulps"].items())
    return (
        f"Largest difference to AdamW over 25 steps and all options: {ulps}. Largest difference of a compressed "
        f"float32 parameter to float64 after 12 steps: {result['float64_error']:.1e} {origin(result['machine'])}."
    )


def demo(result: dict[str, Any]) -> str:
    """The demo's table: one column a seed."""
    runs = result["runs"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("held-out loss, AdamW", lambda run: f"{run['adamw']['held_out_loss']:.4f}"),
        ("held-out loss, SlimAdam", lambda run: f"{run['slimadam']['held_out_loss']:.4f} ({run['loss_gap']:+.2%})"),
        ("second moments saved", lambda run: f"{run['second_moments_saved']:.1%}"),
        ("optimizer state saved", lambda run: f"{run['state_saved']:.1%}"),
        ("optimizer step, SlimAdam to AdamW", lambda run: f"{_step_ratio(run):.2f}"),
    ]
    machine = {"processor": result["machine"]["cpu"], "cores": result["machine"]["cores"], "date": result["date"][:10]}
    versions = {"python": result["versions"]["python"], "versions": result["versions"]}
    header = ["| | " + " | ".join(f"seed {run['seed']}" for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    lines = [f"| {label} | " + " | ".join(show(run) for run in runs) + " |" for label, show in rows]
    return "\n".join([f"What it prints, for three seeds {origin({**machine, **versions})}:", "", *header, *lines])


def _step_ratio(run: dict[str, Any]) -> float:
    ratio: float = run["slimadam"]["median_optimizer_ms"] / run["adamw"]["median_optimizer_ms"]
    return ratio


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"demo": demo, "throughput": throughput, "parity": parity}


def filled(text: str) -> str:
    """The README's text with each marked section made anew from its result file."""

    def section(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[2]}.json").read_text(encoding="utf-8"))
        return f"{match[1]}\n{SECTIONS[match[2]](result)}\n\n{match[3]}"

    return SECTION.sub(section, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
