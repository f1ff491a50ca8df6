"""Measure peaks of memory: ``python -m benchmarks.peak_memory``.

A GPT-2 of 124 million parameters is trained on sequences of 64 tokens by AdamW and by SlimAdam, ``plan="auto"`` past
its decision, each in a process of its own: once counting tensors, once the pages of the process. Then each kind of
SlimAdam saves, loads, converts and expands. On a CPU the tensors are counted by torch's profiler, which sees every
block that the allocator hands out; on CUDA by the allocator. What is measured is checked first: steps against float64,
loaded moments bit by bit. Bar: nothing that is done with a checkpoint, nor a decision, holds more than one parameter's
moments beyond what was there and what comes of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.gpu.training import GPT2
from benchmarks.harness import machine
from benchmarks.harness.stopwatch import is_cuda
from benchmarks.peak.checks import check_loading, steps_are_right
from benchmarks.peak.meters import Peak
from benchmarks.peak.scenarios import CALIBRATION_STEPS, LENGTH, MODELS, SCENARIOS, STEPS, with_checkpoints
from benchmarks.readme.markdown import table

Peaks = Mapping[str, Sequence[int]]
MB = 1e6


def _in_own_process(scenario: str, label: str, model: str, device: str, process: bool = False) -> dict[str, list[int]]:
    command = [sys.executable, "-m", "benchmarks.peak.scenarios", scenario, label, "--model", model, "--device", device]
    command += ["--process"] if process else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _model_of(name: str) -> nn.Module:
    with torch.device("meta"):
        return GPT2(MODELS[name])


def largest_moments(model: nn.Module) -> int:
    """Return the bytes of both float32 moments of the largest parameter."""
    return max(2 * 4 * param.numel() for param in model.parameters())


def measure(model: str, device: str) -> dict[str, Any]:
    """Check, then measure every optimizer; print what is found as it comes.

    Args:
        model: A key of ``MODELS``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        WrongStepError: A step, or a loaded moment, is wrong.
    """
    worst = steps_are_right(device)
    for make in with_checkpoints().values():
        check_loading(make, MODELS["tiny"], device)
    found: dict[str, Any] = {
        "model": model,
        "device": device,
        "parameters": sum(param.numel() for param in _model_of(model).parameters()),
        "tokens": LENGTH,
        "largest_moments": largest_moments(_model_of(model)),
        "worst_share_of_rounding": worst,
        "training": {},
        "process": {},
        "checkpoints": {},
    }
    for label in SCENARIOS["training"][0]():
        found["training"][label] = _in_own_process("training", label, model, device)
        found["process"][label] = _in_own_process("training", label, model, device, process=True)
        print("  ".join(training_row(label, found)), flush=True)
    for label in with_checkpoints():
        found["checkpoints"][label] = _in_own_process("checkpoints", label, model, device)
        print(label, {phase: round(Peak(*of).beyond / MB) for phase, of in found["checkpoints"][label].items()})
    return found


def bars(result: Mapping[str, Any]) -> dict[str, bool]:
    """Return for each optimizer whether nothing holds more than one parameter's moments beyond its result.

    Args:
        result: What ``peak_memory.json`` holds.
    """
    return {
        f"{label}: loading, saving, converting, expanding and deciding hold at most one parameter's moments beyond "
        "what was there and the result": all(Peak(*of).beyond <= result["largest_moments"] for of in peaks.values())
        for label, peaks in result["checkpoints"].items()
    }


def training_row(label: str, result: Mapping[str, Any]) -> list[str]:
    """Return a contender's peaks of training: bytes per parameter until the decision and after it, and steps in MB.

    Args:
        label: The contender.
        result: What ``peak_memory.json`` holds.
    """
    peaks, count = result["training"][label], result["parameters"]
    process = result["process"][label]
    of_process = max(peak for _, peak, _ in process.values()) - process["model"][0]
    first, decided, last = (Peak(*peaks[f"step {step}"]).beyond / MB for step in (1, CALIBRATION_STEPS, STEPS))
    return [
        label,
        f"{_most(peaks, range(1, CALIBRATION_STEPS + 1)) / count:.2f}",
        f"{_most(peaks, range(CALIBRATION_STEPS + 1, STEPS + 1)) / count:.2f}",
        f"{of_process / count:.2f}",
        *(f"{megabytes:.0f}" for megabytes in (first, decided, last)),
    ]


def _most(peaks: Peaks, steps: range) -> int:
    return max(peaks[f"{part} {step}"][1] for step in steps for part in ("forward and backward", "step"))


def _checkpoint_rows(result: Mapping[str, Any]) -> list[list[str]]:
    columns = list(result["checkpoints"].values())
    phases = [phase for phase in columns[0] if not phase.startswith("step ")]
    return [[phase, *(f"{Peak(*peaks[phase]).beyond / MB:.0f}" for peaks in columns)] for phase in phases]


def markdown(result: Mapping[str, Any]) -> str:
    """Return a table of trainings, and one of what is done with checkpoints.

    Args:
        result: What ``peak_memory.json`` holds.
    """
    heads = ["", "first steps", "after the decision", "process", "first step", "deciding step", "a step"]
    labels = [label.removeprefix("SlimAdam (").removesuffix(")") for label in result["checkpoints"]]
    return "\n\n".join(
        [
            table(heads, (training_row(label, result) for label in result["training"])),
            "What is held for a while beyond what was there and what comes of it, in MB; one parameter's moments are "
            f"{result['largest_moments'] / MB:.0f} MB at most, which is the bar:",
            table(["", *labels], _checkpoint_rows(result)),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print, write ``peak_memory.json``; 1 if the bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    result = measure(options.model, options.device)
    print(markdown(result))
    met = machine.print_bars(bars(result))
    name = "peak_memory" if not is_cuda(options.device) else "peak_memory_cuda"
    if options.model != "gpt2-small":
        name += f"_{options.model}"
    print("written:", machine.write(name, result, options.out))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
