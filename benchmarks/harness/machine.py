"""Describe the machine a figure comes from, and print and write figures with it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = ("slimadam", "torch", "numpy", "triton")


def describe() -> dict[str, Any]:
    """Return processor, cores, accelerator, versions and date, for a result file."""
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


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with ``--out``, the folder of the results; a benchmark's docstring names its command."""
    command = re.search(r"python -m [\w.]+", description or "")
    made = argparse.ArgumentParser(
        prog=command and command[0],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return made


def results_folder(description: str | None, arguments: Sequence[str] | None) -> Path:
    """Parse the command line of a benchmark that takes nothing but a folder; return that folder.

    Args:
        description: Docstring of the benchmark, for ``--help``.
        arguments: Words of the command line; None for the process's own.
    """
    folder: Path = parser(description).parse_args(arguments).out
    return folder


def print_bars(bars: Mapping[str, bool]) -> bool:
    """Print each bar and whether it was met; return whether all were."""
    for bar, met in bars.items():
        print(f"  {'pass' if met else 'FAIL'}  {bar}", flush=True)
    return all(bars.values())


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures with the machine's description as ``<name>.json`` and return the path.

    Args:
        name: Name of the file, without its suffix.
        figures: Figures that JSON can hold.
        folder: Folder of the file, made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    return unfinished.replace(path)  # who is killed while writing leaves the file as it was


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
