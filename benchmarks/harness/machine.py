"""Describe the machine a figure comes from, and write figures with it."""

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


def results_folder(description: str | None, arguments: Sequence[str] | None) -> Path:
    """Parse the command line of a benchmark that takes nothing but a folder; return that folder.

    Args:
        description: Docstring of the benchmark, for ``--help``.
        arguments: Words of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    folder: Path = parser.parse_args(arguments).out
    return folder


def write(name: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write figures with the machine's description as ``<name>.json`` and return the path.

    Args:
        name: Name of the file, without its suffix.
        figures: Figures that JSON can hold.
        folder: Folder of the file, made if it is missing.
    """
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
