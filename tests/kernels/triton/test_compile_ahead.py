"""Every variant of the Triton kernels compiles without a GPU, without spills and with wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is only installed on Linux")


ROOT = Path(__file__).resolve().parents[3]
OTHER_TRITON = "3.6.0"
"""The release beside the newest torch that GPU machines have; it inlines later than 3.9, and so loses other hints."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_variant_compiles(architecture: str, tmp_path: Path) -> None:
    _assert_every_variant_compiles(architecture, tmp_path, os.environ.get("PYTHONPATH", ""))


@pytest.mark.timeout(900)
def test_every_variant_compiles_with_another_triton(tmp_path: Path) -> None:
    installed = metadata.version("triton")
    if installed.split(".")[:2] == OTHER_TRITON.split(".")[:2]:
        pytest.skip(f"Triton {installed} is the one that is installed")
    paths = [str(_other_triton()), *filter(None, [os.environ.get("PYTHONPATH")])]
    figures = _assert_every_variant_compiles("90", tmp_path, os.pathsep.join(paths))
    assert figures["machine"]["versions"]["triton"] == OTHER_TRITON


def _other_triton() -> Path:
    """The folder with the other release; it is fetched once, and skipped where it cannot be had."""
    folder = ROOT / ".triton" / f"{OTHER_TRITON}-py{sys.version_info.major}.{sys.version_info.minor}"
    if (folder / "installed").exists():
        return folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
    try:
        ended = subprocess.run(
            [*command, f"triton=={OTHER_TRITON}"], capture_output=True, text=True, check=False, timeout=400
        )
        reason = ended.stderr.strip().splitlines()[-1:] if ended.returncode else []
    except subprocess.TimeoutExpired as error:
        reason = [str(error)]
    if reason:
        pytest.skip(f"the wheel of Triton {OTHER_TRITON} cannot be had: {reason[0][:200]}")
    (folder / "installed").touch()
    return folder


def _assert_every_variant_compiles(architecture: str, out: Path, paths: str) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--out", str(out), "--architecture", architecture],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        cwd=ROOT,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    figures: dict[str, Any] = json.loads((out / "kernels.json").read_text())
    variants = figures["variants"]
    assert len(variants) > 80
    assert {variant["kernel"] for variant in variants} >= {
        "update_full", "update_rows", "update_columns", "update_spread", "sum_squares", "finish_sums", "finish_slices",
        "advance_steps",
    }  # fmt: skip
    assert not [variant for variant in variants if variant["spilled_bytes"]]
    return figures
