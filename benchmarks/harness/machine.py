"""Where a figure comes from: processor, versions, date."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("slimadam", "torch", "numpy", "triton")


def describe() -> dict[str, Any]:
    """Processor, cores, accelerator, versions and date, for a result file."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def results_folder(description: str | None, arguments: Sequence[str] | None) -> Path:
    """The folder for results from the command line of a benchmark that takes nothing else."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    folder: Path = parser.parse_args(arguments).out
    return folder


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures with the machine's description as ``results/<name>.json``; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
