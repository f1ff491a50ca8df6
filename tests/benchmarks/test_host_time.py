"""The host time of a step on CUDA, measured without a GPU and in few rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is only installed on Linux")

pytestmark = pytest.mark.timeout(300)


def test_host_time_is_measured_and_written(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_time", "--rounds", "3", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert "196 tensors, 5 launches of SlimAdam\n" in finished.stdout, finished.stderr[-3000:]
    found = json.loads((tmp_path / "host_time.json").read_text())
    assert found["bar"] == 1.0
    assert found["microseconds"].pop("launches") == 5  # rows of 64 and of 256 take one each
    assert len(found["microseconds"]) == 4
    assert min(found["microseconds"].values()) > 0
    assert set(found["ratios"]) == {"in place", "moving"}
    assert finished.returncode == (max(found["ratios"].values()) > found["bar"])
