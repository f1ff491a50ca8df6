"""Every variant of the Triton kernels compiles without a GPU, without spills and with wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only installed on Linux")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_variant_compiles(architecture: str, tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--out", str(tmp_path), "--architecture", architecture],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parents[3],
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    variants = json.loads((tmp_path / "kernels.json").read_text())["variants"]
    assert len(variants) > 80
    assert {variant["kernel"] for variant in variants} >= {
        "update_full", "update_rows", "update_columns", "update_spread", "sum_squares", "finish_sums", "finish_slices",
        "advance_steps",
    }  # fmt: skip
    assert not [variant for variant in variants if variant["spilled_bytes"]]
