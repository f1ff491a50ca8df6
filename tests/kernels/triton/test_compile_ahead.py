"""Every variant of the Triton kernels compiles without a GPU, without spills and with wide accesses."""

from __future__ import annotations

import json
import math
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
    kernels = {variant["kernel"] for variant in variants}
    assert kernels == {"update_full", "update_rows", "update_spread", "advance_steps"}
    assert not [variant for variant in variants if variant["spilled_bytes"]]
    per_multiprocessor = {"80": 1.8e12 / 108, "90": 4.3e12 / 132}[architecture]
    modelled = [variant for variant in variants if variant["elements"]]
    assert len(modelled) > 80
    for variant in modelled:
        transfer = variant["elements"] * variant["bytes_per_parameter"] / per_multiprocessor
        expected = _utilization(variant["programs_at_once"], transfer / (variant["waits"] * 0.8e-6))
        assert variant["predicted_share"] == pytest.approx(expected)
    plain = [variant for variant in variants if variant["is_plain"] and variant["precision"] == "fp32"]
    moved = {variant["kernel"]: variant["bytes_per_parameter"] for variant in plain}
    assert moved == {"update_full": 28, "update_rows": 20, "update_spread": 20}
    coded = [variant for variant in variants if variant["flags"] == "full, codes"]
    moved = {variant["precision"]: variant["bytes_per_parameter"] for variant in coded}
    assert (moved["fp32"], moved["bf16"]) == (22, 12)
    return figures


def _utilization(customers: int, ratio: float) -> float:
    """Return how busy the server of a closed queue is, by the formula of the machine repairman."""
    ways = [math.perm(customers, queued) * ratio**queued for queued in range(customers + 1)]
    return 1 - 1 / sum(ways)


LOAD, STORE, BARRIER = "ld.global.b32 a;\n", "st.global.b32 b;\n", "bar.sync 0;\n"


ORDERED = [
    LOAD + BARRIER + STORE,
    LOAD + BARRIER + STORE + LOAD + STORE,
    f"$L__1:\n{LOAD}@p bra $L__1;\n{BARRIER}{STORE}",
]
RACING = [
    "",
    LOAD + STORE + BARRIER,
    BARRIER + LOAD + STORE,
    f"{LOAD}@p bra $L__1;\n{BARRIER}$L__1:\n{STORE}",
    f"{LOAD}{BARRIER}@p bra $L__1;\n{STORE}",
]


def _verdicts(check: str, codes: list[str]) -> list[bool]:
    """In a process of its own: the command switches Triton's interpreter off when it is imported."""
    program = (
        f"import json; from benchmarks.speed.kernels import {check} as check; "
        f"print(json.dumps([check(ptx) for ptx in {codes}]))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    found: list[bool] = json.loads(finished.stdout)
    return found


def test_barriers_count_on_every_way_to_the_store() -> None:
    found = _verdicts("has_barrier_before_store", ORDERED + RACING)
    assert found == [True] * len(ORDERED) + [False] * len(RACING)


RELEASED = ["st.global.b32 [a], b;\nbar.sync 0;\n@p1 red.global.gpu.release.add.u32 [c], 1;"]
EARLY = [
    "bar.sync 0;\nst.global.b32 [a], b;\n@p1 red.global.gpu.release.add.u32 [c], 1;",
    "bar.sync 0;\n$L__BB0_2:\n@p1 atom.global.gpu.release.add.u32 d, [c], 1;",
    "st.global.b32 [a], b;\nbar.sync 0;\n@p1 red.global.gpu.relaxed.add.u32 [c], 1;",
    "",
]


def test_a_count_before_all_warps_have_stored_is_found() -> None:
    found = _verdicts("has_barrier_before_release", RELEASED + EARLY)
    assert found == [True] * len(RELEASED) + [False] * len(EARLY)
