"""A rank killed while it saves leaves the previous checkpoint as it was; the results hold 20 such kills."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.distributed.checkpoint_kills import PREVIOUS, main
from benchmarks.harness.machine import RESULTS
from tests.versions import shards


@shards
def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    main(["--out", str(tmp_path)])
    found = json.loads((tmp_path / "checkpoint_kills.json").read_text())
    assert [trial["in_background"] for trial in found["trials"]] == 10 * [False, True]
    assert found["lost"] == []


def test_twenty_kills_lost_nothing() -> None:
    found = json.loads((RESULTS / "checkpoint_kills.json").read_text())
    assert found["kills"] == len(found["trials"]) == 20
    assert found["lost"] == []
    in_time = [trial for trial in found["trials"] if trial["newest_complete"] == f"step-{PREVIOUS}"]
    assert found["before_the_end"] == len(in_time) >= 10
