"""What is fitted to the protocol's runs, on planted points, and both commands on a tiny workload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.equivalence import ablation, expectation, workloads
from benchmarks.equivalence.expectation import Point, fit, slope
from benchmarks.equivalence.runs import Protocol, Record, run_all
from benchmarks.equivalence.workloads import Kind, Task
from slimadam import AutoPlan
from tests.benchmarks.test_equivalence import Tiny


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder with the runs of two workloads on which plan="auto" was judged."""
    names = ("tiny", "tiny too")
    for name in names:
        monkeypatch.setitem(workloads.WORKLOADS, name, Kind(lambda size: Tiny(), 20, 10, max_norm=1.0))
    record = Record(tmp_path / "equivalence.jsonl")
    assert run_all([Task(name) for name in names], ["AdamW", "auto"], record, Protocol(selection=1, judged=2))
    return tmp_path


def test_a_planted_line_is_found_and_predicts_what_was_left_out() -> None:
    points = [Point(name, "auto", share, 0.03 * share) for name, share in (("a", 0.1), ("b", 0.2), ("c", 0.4))]
    found = fit(points)
    assert found["slope"] == pytest.approx(0.03)
    assert found["deviation"] == pytest.approx(0, abs=1e-12)
    assert found["error_left_out"] == pytest.approx(0, abs=1e-12)
    assert found["error_of_expecting_nothing"] == pytest.approx(0.03 * 0.7 / 3)


def test_workloads_are_left_out_as_a_whole() -> None:
    points = [Point("a", "auto", 0.5, 0.01), Point("a", "averages", 1.0, 0.02), Point("b", "auto", 0.5, 0.02)]
    found = fit(points)
    errors = [0.01 - 0.5 * 0.04, 0.02 - 1.0 * 0.04, 0.02 - 0.5 * 0.02]
    assert found["error_left_out"] == pytest.approx(sum(map(abs, errors)) / 3)
    assert slope(points) == pytest.approx((0.5 * 0.01 + 0.02 + 0.5 * 0.02) / 1.5)


def test_shares_are_measured_and_fitted(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "VARIANTS", {"as measured": AutoPlan(calibration_steps=4)})
    assert ablation.main(["--out", str(judged), "--workloads", "tiny", "tiny too", "--seeds", "2"]) == 0
    assert expectation.main(["--out", str(judged)]) == 0
    points = json.loads((judged / "expectation.json").read_text())["points"]
    assert [point["workload"] for point in points] == ["tiny", "tiny too"]
    assert all(0 < point["share"] < 1 for point in points)


def test_without_runs_nothing_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expectation.main(["--out", str(tmp_path)]) == 1
    assert "run python -m benchmarks.ablation first" in capsys.readouterr().out


def test_forms_are_compared_with_adamws_runs(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"averages": AutoPlan(calibration_steps=4, cutoff=0.0), "never": AutoPlan(calibration_steps=1000)}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    assert ablation.main(["--out", str(judged), "--workloads", "tiny", "--seeds", "2"]) == 0
    (row,) = json.loads((judged / "ablation.json").read_text())["workloads"]
    # What never decides is AdamW, to the last bit or two.
    assert max(map(abs, row["variants"]["never"]["differences"])) < 1e-6
    assert any(abs(one) > 1e-6 for one in row["variants"]["averages"]["differences"])
    assert row["variants"]["averages"]["bytes_per_parameter"] < row["variants"]["never"]["bytes_per_parameter"]


def test_workloads_without_adamws_runs_are_left_out(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(["--out", str(judged), "--workloads", "tiny", "--seeds", "3"]) == 1
    assert "left out: tiny: run python -m benchmarks.equivalence --workloads 'tiny' first" in capsys.readouterr().out
