"""How far a reader walks through the source to follow one call: ``python -m benchmarks.walk``.

Six calls run under ``sys.setprofile``, which counts the package's own functions, their calls, the files that they lie
in, and the hops: how often a call goes to another file of the package than the call before it. A generator counts again
whenever it goes on. Steps are compared with ``torch.optim.AdamW``, whose package is ``torch.optim``. Exits with 1 if a
bar is missed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch import nn

import slimadam
from benchmarks.harness import machine
from benchmarks.workloads.skeleton import skeleton
from slimadam import AutoPlan, CompressionPlan, SlimAdam, kernels

MANY = 100
SIZE = 16
WARMUP_STEPS = 3
CALIBRATION_STEPS = 4
OURS = tuple(Path(module.__file__ or "").parent for module in (slimadam, kernels))
TORCH = (Path(torch.optim.__file__).parent,)
BARS: dict[str, dict[str, float]] = {
    "warm step": {"files": 8, "hops": 12},
    f"warm step of {MANY} parameters": {"python_calls_per_parameter": 6},
    "constructor with a JSON plan": {"files": 10},
    "load_state_dict": {"files": 10},
}
"""The highest figures that a walk of ours may have."""
_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Walk:
    """Counts of one call.

    Attributes:
        functions: The package's functions that ran, comprehensions included.
        calls: Calls of these functions.
        files: Files of the package in which these functions lie.
        hops: Pairs of consecutive calls of the package's functions that lie in different files.
        python_calls_per_parameter: Calls of all Python functions, torch's and the standard library's included.
    """

    functions: int
    calls: int
    files: int
    hops: int
    python_calls_per_parameter: float

    def missed(self, bars: Mapping[str, float]) -> list[str]:
        """Return a phrase for each figure above its bar."""
        found = asdict(self)
        return [f"{name} {found[name]:g}, at most {bar:g}" for name, bar in bars.items() if found[name] > bar]


def follow(call: Callable[[], Any], folders: Sequence[Path], parameters: int = 1) -> Walk:
    """Run a call once and count the functions that it passes through.

    Args:
        call: The call, without arguments.
        folders: Folders of the package whose files are counted.
        parameters: Number of parameters that the call works on.
    """
    called: list[CodeType] = []

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            called.append(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    prefixes = tuple(f"{folder}{os.sep}" for folder in folders)
    own = [code for code in called if code.co_filename.startswith(prefixes)]
    files = [code.co_filename for code in own]
    hops = sum(before != after for before, after in pairwise(files))
    return Walk(len(set(own)), len(own), len(set(files)), hops, len(called) / parameters)


def walks() -> dict[str, dict[str, Walk]]:
    """Return the walks of every call, by name and by optimizer."""
    found: dict[str, dict[str, Walk]] = {}
    steps: list[tuple[str, int, dict[str, Any]]] = [
        ("warm step", 1, {}),
        ("warm step, fused=True", 1, {"fused": True}),
        (f"warm step of {MANY} parameters", MANY, {}),
    ]
    for name, count, options in steps:
        ours = _slimadam(count, **options)
        theirs = _stepped(torch.optim.AdamW(_model(count).parameters(), **options))
        found[name] = {"SlimAdam": follow(ours.step, OURS, count), "AdamW": follow(theirs.step, TORCH, count)}
    for name, call in (
        ("constructor with a JSON plan", _construct),
        ("measurement to a decision", _decide),
        ("load_state_dict", _load),
    ):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = {"SlimAdam": follow(call(Path(folder)), OURS)}
    return found


def _model(count: int = 1) -> nn.Module:
    model = skeleton({f"h.{index}.mlp.up_proj.weight": (SIZE, SIZE) for index in range(count)})
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def _slimadam(count: int = 1, steps: int = WARMUP_STEPS, **options: Any) -> SlimAdam:
    """Return an optimizer of new parameters that has taken some steps."""
    return _stepped(SlimAdam(_model(count), **options), steps)


def _stepped(optimizer: _Optimizer, steps: int = WARMUP_STEPS) -> _Optimizer:
    for _ in range(steps):
        optimizer.step()
    return optimizer


def _construct(folder: Path) -> Callable[[], Any]:
    """Return the constructor with a plan file; one optimizer was made before it."""
    model, path = _model(), folder / "plan.json"
    CompressionPlan.from_rules(model).save(path)
    SlimAdam(model, plan=path)
    return lambda: SlimAdam(model, plan=path)


def _decide(_folder: Path) -> Callable[[], Any]:
    """Return the step of ``plan="auto"`` that measures, decides and frees memory."""
    settings = AutoPlan(calibration_steps=CALIBRATION_STEPS, measurements=1)
    return _slimadam(steps=CALIBRATION_STEPS - 1, plan=settings).step


def _load(_folder: Path) -> Callable[[], Any]:
    """Return the loading of a state dict into an optimizer that has taken steps."""
    saved = _slimadam(plan="rules").state_dict()
    optimizer = _slimadam(plan="rules")
    return lambda: optimizer.load_state_dict(saved)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write ``results/walk.json`` and exit with 1 if a bar is missed."""
    out = machine.results_folder(__doc__, arguments)
    torch.set_num_threads(1)
    found = walks()
    print(
        f"{'':32s}{'':10s}{'functions':>11s}{'calls':>7s}{'files':>7s}{'hops':>7s}{'Python calls per parameter':>30s}"
    )
    for name, rows in found.items():
        for label, walk in rows.items():
            print(
                f"{name:32s}{label:10s}{walk.functions:11d}{walk.calls:7d}{walk.files:7d}{walk.hops:7d}"
                f"{walk.python_calls_per_parameter:30.2f}"
            )
    missed = [f"{name}: {phrase}" for name, bars in BARS.items() for phrase in found[name]["SlimAdam"].missed(bars)]
    for phrase in missed:
        print("missed:", phrase)
    figures = {name: {label: asdict(walk) for label, walk in rows.items()} for name, rows in found.items()}
    print("written:", machine.write("walk", {"bars": BARS, "walks": figures, "missed": missed}, out))
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
