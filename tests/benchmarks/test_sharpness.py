"""The curvature benchmark, in seconds: every part runs, writes and draws, and what it counts is counted right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.harness.machine import RESULTS
from benchmarks.sharpness import cost, schedule, uv
from benchmarks.sharpness import run as sharpness


@pytest.fixture(autouse=True)
def _as_the_command_runs() -> None:
    """Some backward passes of the byte GPT have no deterministic implementation on an accelerator."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("part", sorted(sharpness.PARTS))
def test_each_part_runs_and_holds_its_bars(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert sharpness.main([part, "--quick", "--out", str(tmp_path), "--pictures", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads((tmp_path / f"sharpness_{part}.json").read_text())
    assert written["findings"]
    assert (tmp_path / f"sharpness-{part}.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert all(finding in printed for finding in [*written["findings"], *written["bars"]])
    if part in ("uv", "edge"):  # what a few seconds can show already
        assert all(written["findings"].values()), written["findings"]


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sharpness.main(["edges"])
    assert stopped.value.code == 2
    assert "there is no part 'edges'" in capsys.readouterr().err


@pytest.mark.parametrize("part", sorted(sharpness.PARTS))
def test_committed_results_say_what_their_findings_say(part: str) -> None:
    result = json.loads((RESULTS / f"sharpness_{part}.json").read_text())
    assert all(result["bars"].values())
    assert result["machine"]["processor"]


def test_period() -> None:
    wave = np.array([1.0, 3.0, 2.0, 5.0] * 40)
    assert uv.period(wave) == 4
    assert uv.period(np.ones(160)) == 1
    assert uv.period(np.random.default_rng(0).random(160)) is None


def test_lyapunov_exponent_of_a_stable_minimum_is_the_slowest_decay() -> None:
    found = uv.scan(np.array([0.5]), 2_000)
    # In function space the minimum contracts; along the valley of minima, where H has eigenvalue 0, nothing does.
    assert found["lyapunov"][0] == pytest.approx(0, abs=1e-2)
    assert found["periods"] == [1]


def test_the_schedule_warms_up_stays_and_decays() -> None:
    shares = [schedule.share_of_rate(step, 100) for step in range(1, 101)]
    assert shares[0] == pytest.approx(1 / 25)
    assert shares[24:70] == pytest.approx([1] * 46)
    assert shares[-1] == pytest.approx(1 / 20)
    assert [schedule.phase(step, 100) for step in (25, 26, 70, 71)] == ["warmup", "stable", "stable", "decay"]


def test_rank_correlation() -> None:
    assert schedule.rank_correlation([1, 2, 9], [10, 20, 21]) == pytest.approx(1)
    assert schedule.rank_correlation([1, 2, 9], [3, 2, 1]) == pytest.approx(-1)


def test_rounded_goes_all_through() -> None:
    assert sharpness.rounded({"a": [1.23456789, (math.nan, 2)], "b": True}) == {"a": [1.23457, [None, 2]], "b": True}


def test_cost_of_a_measurement(tmp_path: Path) -> None:
    assert cost.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "sharpness_cost.json").read_text())
    kept = {(row["optimizer"], row["memory"]): row["kept"] for row in result["memory"]}
    for optimizer in sorted({optimizer for optimizer, _ in kept}):
        assert kept[optimizer, "copy"] == 8
        assert kept[optimizer, "offload"] == 4
        assert 1 <= kept[optimizer, "lean"] <= 1.1
    assert all(row["forward_passes"] <= 6.5 for row in result["time"])
