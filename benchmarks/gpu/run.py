"""Everything that needs a GPU, in one command of a few minutes: ``python -m benchmarks.gpu --out DIR``.

Correctness on the device, throughput, memory, and a short training, each in a process of its own (a kernel that
crashes takes its process with it), each with its share of the time. Needs the repository, torch, numpy and Triton,
nothing else. After each stage it writes one JSON file for it, ``results.json`` and a page, ``results.md``.

Two stages are run only when they are asked for: ``--stage sweep`` compares launch settings, ``--stage training`` trains
longer. That goes on where it was ended, so that it may take several calls; it exits with 3 while something is left.
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
from benchmarks.gpu.stages import LONGER, OTHERS, STAGES, NotApplicable, Settings, Stage
from benchmarks.harness import machine

RUN_SECONDS = 440.0
"""Time of the whole command, unless it is told another."""
GRACE_SECONDS = 25.0
"""Time that a process may take beyond its stage's: to start, and for an item that has begun."""


def run_stage(name: str, stage: Stage, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a stage in this process; its file is written anew after each item, so that finished items stay.

    Args:
        name: Name of the stage and of its file.
        stage: The stage.
        settings: Device and size.
        folder: Folder of the result.
        seconds: Its time; what has not begun by then is left out, and counts as failed unless a later call goes on.
    """
    deadline = time.monotonic() + seconds
    items = stage.items(settings, deadline)
    found: dict[str, Any] = {label: {"failed": "not reached"} for label in items}
    figures = {"stage": name, "device": settings.device, "quick": settings.quick, "items": found}
    machine.write(name, figures, folder)
    for label, item in items.items():
        if time.monotonic() > deadline:
            late = f"the stage's {seconds:.0f} s were used up"
            if stage.goes_on:
                found[label] = {"unfinished": "not begun"}
            else:
                found[label] = {"not_applicable" if label.endswith(OTHERS) else "failed": late}
            machine.write(name, figures, folder)
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


def run_isolated(name: str, stage: Stage, settings: Settings, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a stage in a process of its own, ended when it takes too long, and read its file.

    Args:
        name: Name of the stage and of its file.
        stage: The stage.
        settings: Device and size.
        folder: Folder of the result.
        seconds: Its time; the process may take :data:`GRACE_SECONDS` longer.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--device", settings.device]
    command += ["--stage", name, "--seconds", str(seconds), *(["--quick"] if settings.quick else [])]
    (folder / f"{name}.json").unlink(missing_ok=True)
    try:
        ended = subprocess.run(command, timeout=seconds + GRACE_SECONDS, check=False)
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


def run_all(settings: Settings, folder: Path, seconds: float) -> list[str]:
    """Run every stage, and write all results so far after each; return what failed or missed a bar.

    Args:
        settings: Device and size.
        folder: Folder of the results.
        seconds: Time of all stages. Each gets its share of what is left, so that none has to wait for a slow one.
    """
    run = run_isolated if torch.device(settings.device).type == "cuda" else run_stage
    started = time.monotonic()
    stages: dict[str, dict[str, Any]] = {}
    for name, stage in STAGES.items():
        ahead = sum(one.seconds for other, one in STAGES.items() if other not in stages)
        left = started + seconds - GRACE_SECONDS - time.monotonic()
        if left > 0:
            stages[name] = run(name, stage, settings, folder, left * stage.seconds / ahead)
        else:
            stages[name] = {name: {"failed": f"the run's {seconds:.0f} s were used up"}}
        _write(settings, folder, stages, round(time.monotonic() - started))
    return failures(stages)


def _write(settings: Settings, folder: Path, stages: Mapping[str, Any], seconds: int) -> None:
    figures: dict[str, Any] = {"device": settings.device, "quick": settings.quick, "seconds": seconds}
    figures |= {"missed": failures(stages), "to_come": [name for name in STAGES if name not in stages]}
    machine.write("results", {**figures, "stages": stages}, folder)
    (folder / "results.md").write_text(page({"machine": machine.describe(), **figures}, stages))


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
    if "unfinished" in item:
        return f"not finished: {item['unfinished']}"
    return "done"


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, or one; 1 if something failed or a bar was missed, 3 if only a further call can finish it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--stage", choices=[*STAGES, *LONGER], help="this one alone, in this process")
    parser.add_argument(
        "--seconds", type=float, default=RUN_SECONDS, help="time of the command, %(default)s by default"
    )
    parser.add_argument(
        "--state", type=Path, help="folder of what --stage training goes on from; default: that of --out"
    )
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.quick, options.state or options.out)
    if torch.device(settings.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {settings.device}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        return _run_one(options.stage, settings, options.out, options.seconds)
    missed = run_all(settings, options.out, options.seconds)
    print("written:", options.out / "results.json")
    print("\n".join([f"FAIL {line}" for line in missed] or ["everything passed"]))
    return 1 if missed else 0


def _run_one(name: str, settings: Settings, folder: Path, seconds: float) -> int:
    started = time.monotonic()
    if name in LONGER:
        seconds = max(0.0, seconds - GRACE_SECONDS)
    found = run_stage(name, {**STAGES, **LONGER}[name], settings, folder, seconds)
    if name in LONGER:
        run = {"machine": machine.describe(), "device": settings.device, "quick": settings.quick, "to_come": []}
        run |= {"seconds": round(time.monotonic() - started), "missed": failures({name: found})}
        (folder / f"{name}.md").write_text(page(run, {name: found}))
    if failures({name: found}):
        return 1
    return 3 if any("unfinished" in item for item in found.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
