"""The commands under torchrun: one plan, that of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.distributed.scale import pretended
from slimadam import SNRHistory
from slimadam.cli import cli
from slimadam.cli.script.names import prefix_of
from tests.command_line import CliRunner
from tests.ranks import environment_of_ranks
from tests.versions import shards

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "sharded.py")
STEPS = 5


def _torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launch, "-m", "slimadam", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, env=environment_of_ranks())


def _storage(path: Path) -> dict[str, Any]:
    rules = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    return {name: (rule["role"], rule.get("form"), rule.get("dims")) for name, rule in rules.items()}


@shards
def test_calibrates_a_sharded_script_into_one_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    options = ["calibrate", "--steps", str(STEPS), "--every", "2", "--json", "--out"]
    more = ["--history", "history.csv", SCRIPT, "100"]
    alone = CliRunner().invoke(cli, [*options, "alone/plan.json", *more], catch_exceptions=False)
    history = SNRHistory.load_csv("history.csv")
    done = _torchrun(2, *options, "together/plan.json", *more)
    assert (alone.exit_code, done.returncode) == (0, 0), done.stderr
    lines = done.stdout.splitlines()
    assert [json.loads(line)["steps"] for line in lines if line.startswith("{")] == [STEPS]  # and "trained" by neither
    assert "trained" not in lines
    assert done.stderr.count("plan written to") == 1
    assert [path.name for path in (tmp_path / "together").iterdir()] == ["plan.json"]
    rules = _storage(tmp_path / "alone" / "plan.json")
    assert _storage(tmp_path / "together" / "plan.json") == rules
    assert {form for _, form, _ in rules.values()} > {"full"}
    for name, measured in SNRHistory.load_csv("history.csv").items():
        assert measured.shape == history[name].shape
        for step, values in measured.values.items():
            assert values == pytest.approx(history[name].values[step], rel=1e-4)


def test_several_sharded_models_are_told_apart_by_their_own_classes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pretended(2):
        fully_shard(model)
        assert prefix_of(model.parameters()) == "Sequential"


def test_find_lr_says_that_it_follows_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = CliRunner().invoke(cli, ["find-lr", SCRIPT, "3"])
    assert found.exit_code == 2
    assert "one of 2 processes" in found.stderr
    assert "slimadam.critical_lr(optimizer, closure)" in " ".join(found.stderr.split())
