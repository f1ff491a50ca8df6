"""The walks: figures known by hand, a bar that is missed, and a run of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.correctness import walk

HERE = Path(__file__).parent


def _outer() -> int:
    return _inner() + _inner()


def _inner() -> int:
    return json.loads("1")


def test_counts_known_by_hand() -> None:
    found = walk.follow(_outer, [HERE], parameters=2)
    assert (found.functions, found.calls, found.files, found.hops) == (2, 3, 1, 0)
    both = walk.follow(_outer, [HERE, Path(json.__file__).parent])
    assert both.files == 3  # this file, and the decoder behind json.loads
    assert (both.functions, both.calls, both.hops) == (5, 9, 5)
    assert 2 * found.python_calls_per_parameter == both.python_calls_per_parameter == both.calls


def test_a_missed_bar_is_told() -> None:
    found = walk.Walk(functions=5, calls=9, files=3, hops=4, python_calls_per_parameter=2.5)
    assert found.missed({"files": 3, "hops": 4, "python_calls_per_parameter": 2}) == [
        "python_calls_per_parameter 2.5, at most 2"
    ]


def test_the_command_writes_every_walk_and_fails_for_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(walk, "BARS", {"warm step": {"files": 0}})
    with pytest.raises(SystemExit) as stopped:
        walk.main(["--out", str(tmp_path)])
    assert stopped.value.code == 1
    assert "missed: warm step: files" in capsys.readouterr().out
    written = json.loads((tmp_path / "walk.json").read_text())
    assert len(written["walks"]) == 6
    assert written["walks"]["warm step"]["AdamW"]["files"] == 2
    assert all(rows["SlimAdam"]["files"] > 0 for rows in written["walks"].values())
    monkeypatch.setattr(walk, "BARS", {})
    walk.main(["--out", str(tmp_path)])
