"""Everything that needs a GPU, in one command of a few minutes: ``python -m benchmarks.gpu --out DIR``.

Correctness on the device, throughput, memory, and a short training, each in a process of its own (a kernel that
crashes takes its process with it), each with a time budget. Needs the repository, torch, numpy and Triton, nothing
else. Writes one JSON file a stage, ``results.json`` and a page, ``results.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.page import page
from benchmarks.gpu.stages import STAGES, NotApplicable, Settings, Stage
from benchmarks.harness import machine

GRACE_SECONDS = 30.0
"""Time that an item that has begun may take beyond its stage's budget before its process is ended."""


def run_stage(name: str, stage: Stage, settings: Settings, folder: Path) -> dict[str, Any]:
    """Run a stage in this process; its file is written anew after each item, so that finished items stay.

    Args:
        name: Name of the stage and of its file.
        stage: The stage.
        settings: Device and size.
        folder: Folder of the result.
    """
    deadline = time.monotonic() + stage.seconds
    items = stage.items(settings, deadline)
    found: dict[str, Any] = {label: {"failed": "not reached"} for label in items}
    figures = {"stage": name, "device": settings.device, "quick": settings.quick, "items": found}
    machine.write(name, figures, folder)
    for label, item in items.items():
        if time.monotonic() > deadline:
            found[label] = {"failed": f"the stage's {stage.seconds:.0f} s were used up"}
            continue
        started = time.monotonic()
        try:
            found[label] = item()
        except NotApplicable as reason:
            found[label] = {"not_applicable": str(reason)}
        except Exception:  # recorded, so that one failure does not lose the rest
            found[label] = {"failed": traceback.format_exc(limit=-6)}
        found[label]["seconds"] = round(time.monotonic() - started, 1)
        machine.write(name, figures, folder)
        print(f"{name}: {label}: {_state(found[label])}, {found[label]['seconds']} s", flush=True)
    return found


def run_isolated(name: str, stage: Stage, settings: Settings, folder: Path) -> dict[str, Any]:
    """Run a stage in a process of its own, ended when it takes too long, and read its file.

    Args:
        name: Name of the stage and of its file.
        stage: The stage.
        settings: Device and size.
        folder: Folder of the result.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--device", settings.device]
    command += ["--stage", name, *(["--quick"] if settings.quick else [])]
    (folder / f"{name}.json").unlink(missing_ok=True)
    try:
        ended = subprocess.run(command, timeout=stage.seconds + GRACE_SECONDS, check=False)
        reason = f"its process ended with {ended.returncode}"
    except subprocess.TimeoutExpired as error:
        reason = f"its process was ended after {error.timeout:.0f} s"
    try:
        found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())["items"]
    except FileNotFoundError:
        return {name: {"failed": f"the stage wrote nothing; {reason}"}}
    return {
        label: {"failed": f"not reached; {reason}"} if item == {"failed": "not reached"} else item
        for label, item in found.items()
    }


def failures(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each item that failed and each bar that was missed."""
    lines = []
    for name, items in stages.items():
        for label, item in items.items():
            if "failed" in item:
                lines.append(f"{name}: {label}: {item['failed'].strip().splitlines()[-1]}")
            for bar in item.get("bars", ()):
                if not bar["passed"]:
                    lines.append(f"{name}: {label}: {bar['name']}: {_shown(bar['value'])}, bar {bar['limit']}")
    return lines


def _state(item: Mapping[str, Any]) -> str:
    if "failed" in item:
        return f"FAILED: {item['failed'].strip().splitlines()[-1]}"
    if "not_applicable" in item:
        return f"not applicable: {item['not_applicable']}"
    return "done"


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, write the results; 1 if something failed or a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.quick)
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {settings.device}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        found = run_stage(options.stage, STAGES[options.stage], settings, options.out)
        return 1 if failures({options.stage: found}) else 0
    run = run_isolated if torch.device(settings.device).type == "cuda" else run_stage
    started = time.monotonic()
    stages = {name: run(name, stage, settings, options.out) for name, stage in STAGES.items()}
    missed, seconds = failures(stages), round(time.monotonic() - started)
    figures = {"device": settings.device, "quick": settings.quick, "seconds": seconds, "missed": missed}
    print("written:", machine.write("results", {**figures, "stages": stages}, options.out))
    (options.out / "results.md").write_text(page({"machine": machine.describe(), **figures}, stages))
    print("\n".join([f"FAIL {line}" for line in missed] or ["everything passed"]))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
