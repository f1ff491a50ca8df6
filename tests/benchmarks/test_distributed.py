"""The benchmark of training on shards holds its bars here, and in the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.distributed import run as distributed
from benchmarks.harness.machine import RESULTS


def test_it_holds_here(tmp_path: Path) -> None:
    assert distributed.main(["--ranks", "3", "--backends", "foreach", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "distributed.json").read_text())["rows"]
    assert [(row["ranks"], row["backend"], row["sharded"]) for row in rows] == [(3, "foreach", 0), (3, "foreach", 1)]


def test_committed_results_hold_for_every_implementation() -> None:
    rows = json.loads((RESULTS / "distributed.json").read_text())["rows"]
    assert {(row["ranks"], row["backend"]) for row in rows} == {
        (n, name) for n in (2, 3) for name in distributed.BACKENDS
    }
    assert all(0 < row["difference"] <= distributed.LARGEST_DIFFERENCE for row in rows)
    assert all(row["all_reduces_per_step"] == [row["expected"]] for row in rows)
