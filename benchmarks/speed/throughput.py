"""Time of one optimizer step, side by side: ``python -m benchmarks.throughput``.

Every optimizer steps the same parameters in the same process, each beside a step of fused AdamW, so that a busy machine
slows both. Before one of ours is timed, it is compared with the float64 formula; a wrong one is refused. Bytes are
those that must move: parameters and state read and written, gradients read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.harness.comparison import Comparison, compare, ratios_to_default
from benchmarks.harness.contenders import DEFAULT, FUSED, PEERS, Contender, ours, torch_own, without_library
from benchmarks.speed.plot import draw
from benchmarks.workloads.shapes import MODELS, elements

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PICTURES = Path(__file__).resolve().parents[2] / "docs"
# On a CPU in float32, by model: relative to which row of torch's, at most what.
BARS = {
    "gpt2-small": {
        "SlimAdam (plan=None)": (FUSED, 1.05),
        "SlimAdam (rules)": (FUSED, 0.85),
        "SlimAdam (factored)": (FUSED, 1.05),
        "SlimAdam (rules, bfloat16 momentum)": (FUSED, 0.80),
        "SlimAdam (rules, int8 momentum)": (FUSED, 1.10),
        "SlimAdam (rules, foreach=True)": (DEFAULT, 1.10),
    },
    "gpt2-narrow": {f"SlimAdam ({plan})": (FUSED, 1.15) for plan in ("plan=None", "rules", "factored")},
}
MOST_CALLS = 6
"""Python functions that a step of ours by the compiled library may call for each parameter."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON and a picture; 1 if a bar is missed or one of ours is wrong."""
    options = _parser().parse_args(arguments)
    shapes = MODELS[options.model]()
    bars = BARS.get(options.model, {}) if (options.device, options.dtype) == ("cpu", "float32") else {}
    chosen = _chosen(options)
    again = [one for one in chosen if one.label in (FUSED, DEFAULT, *bars)]
    with _kept_busy(options.busy):
        runs = [
            compare(shapes, again if number else chosen, options.device, DTYPES[options.dtype], options.rounds)
            for number in range(options.runs)
        ]
    found = median_of(runs)
    title = f"{options.model}, {options.dtype}, {elements(shapes):,} parameters, {options.device}"
    figures: dict[str, Any] = {
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "elements": elements(shapes),
        "rounds": options.rounds,
        "busy_processes": options.busy,
        "runs": [{label: row["ratio"] for label, row in run.rows.items()} for run in runs],
        **vars(found),
        "ratios": ratios_to_default(found.rows),
    }
    usual = (options.model, options.device, options.dtype) == ("gpt2-small", "cpu", "float32") and not options.busy
    name = "throughput" if usual else f"throughput_{options.model}_{options.device}_{options.dtype}"
    name += f"_busy{options.busy}" if options.busy else ""
    missed = _missed(found, {label: bar for label, bar in bars.items() if _is_chosen(label, options)})
    print(f"{title}, {torch.get_num_threads()} threads, medians of {options.rounds} steps, of {options.runs} runs")
    print("\n".join([*table(found), *missed]))
    print("written:", machine.write(name, figures, options.out))
    pictures = PICTURES if usual and options.out == machine.RESULTS else options.out
    print("drawn:", draw(found.rows, title, pictures / f"{name}.png"))
    return 1 if missed or found.refused else 0


def median_of(runs: Sequence[Comparison]) -> Comparison:
    """Return, of whole comparisons, for each row the one whose ratio is the median; of two the larger."""
    rows = {}
    for label in runs[0].rows:
        own = sorted((run.rows[label] for run in runs if label in run.rows), key=lambda row: float(row["ratio"]))
        rows[label] = own[len(own) // 2]
    refused = {label: reason for run in runs for label, reason in run.refused.items()}
    return Comparison(rows, runs[0].left_out, refused, [one for run in runs for one in run.copies], runs[0].batches)


@contextmanager
def _kept_busy(processes: int) -> Iterator[None]:
    """Keep as many cores busy as there are other processes, as data loaders do."""
    work = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with this process
    busy = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()


def table(found: Comparison) -> list[str]:
    """Return a line for each row, and the reasons of those that have none."""
    heads = ["ms", "of fused", "GB/s", "of copy", "state B/p", "calls/p", "allocated", "peak", "launches", "host ms"]
    keys = {
        "milliseconds": ".2f",
        "ratio": ".3f",
        "gigabytes_per_second": ".1f",
        "share_of_copy_bandwidth": ".0%",
        "state_bytes_per_parameter": ".3f",
        "python_calls_per_parameter": ".1f",
        "allocated_bytes_per_parameter": ".3f",
        "peak_bytes_per_parameter": ".3f",
        "launches": "d",
        "host_milliseconds": ".2f",
    }
    lines = [" " * 40 + "".join(f"{head:>11s}" for head in heads)]
    for label, row in found.rows.items():
        cells = (format(row[key], style) if key in row else "" for key, style in keys.items())
        lines.append(f"{label:40s}" + "".join(f"{cell:>11s}" for cell in cells))
    lines += [f"left out: {label}: {reason}" for label, reason in found.left_out.items()]
    return lines + [f"REFUSED: {label}: {reason}" for label, reason in found.refused.items()]


def _missed(found: Comparison, bars: Mapping[str, tuple[str, float]]) -> list[str]:
    missed = []
    for label, (baseline, bar) in bars.items():
        if label not in found.rows or baseline not in found.rows:
            missed.append(f"FAIL {label}: not measured; bar {bar:.2f} of {baseline}")
            continue
        ratio = found.rows[label]["ratio"] / found.rows[baseline]["ratio"]
        if ratio > bar:
            missed.append(f"FAIL {label}: {ratio:.3f} of {baseline}, bar {bar:.2f}")
    for label in bars.keys() & found.rows.keys():
        row = found.rows[label]
        if set(row.get("backends", ())) == {"compiled"} and row["python_calls_per_parameter"] > MOST_CALLS:
            missed.append(f"FAIL {label}: {row['python_calls_per_parameter']:.1f} calls, bar {MOST_CALLS}")
    return missed


def _chosen(options: argparse.Namespace) -> list[Contender]:
    every = [*torch_own(), *ours(), *(PEERS[name] for name in options.peers)]
    if options.device == "cpu":
        every.append(without_library())
    return [one for one in every if _is_chosen(one.label, options)]


def _is_chosen(label: str, options: argparse.Namespace) -> bool:
    return label == FUSED or any(fnmatch(label, pattern) for pattern in options.only)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=25, help="timed steps of each optimizer")
    parser.add_argument(
        "--runs",
        type=int,
        default=1,
        help="whole comparisons, of which the median counts; those after the first are of what has a bar",
    )
    parser.add_argument("--busy", type=int, default=0, help="other processes that keep a core busy each")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="other projects' optimizers")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of labels; fused AdamW is always measured")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
