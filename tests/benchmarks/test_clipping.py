"""The benchmark of clipping runs on a small model, refuses wrong steps and writes its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness.exactness import WrongStepError
from benchmarks.speed import clipping


def test_all_contenders_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clipping.MODELS, "gpt2-small", lambda: {"a.weight": (40, 30), "b.weight": (30, 40)})
    assert clipping.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "clipping.json").read_text())
    assert len(written["rows"]) == 4
    assert all(len(row["laps"]) == 2 and row["milliseconds"] > 0 for row in written["rows"].values())
    assert 0 <= written["worst_share_of_rounding"] <= 1


def test_a_wrong_factor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimadam.optim.slimadam.clip_factor", lambda norm, max_norm: torch.full((), 0.4))
    with pytest.raises(WrongStepError):
        clipping.check()
