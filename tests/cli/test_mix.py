"""``slimadam mix`` through the command line."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from click.testing import Result

from slimadam import advise_mix
from slimadam.cli import cli
from tests.command_line import CliRunner

MODULE = """
import torch
from torch import nn


def _checkpoint(centers, others=()):
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    loss_to = lambda center: lambda batch: (1 + batch) * (x - torch.tensor(center, dtype=torch.float64)).square().sum()
    losses = {name: loss_to(center) for name, center in centers.items()}
    return (optimizer, losses, {name: loss_to(center) for name, center in others}) if others else (optimizer, losses)


def agreeing():
    return _checkpoint({"prose": (1.0, 0.2), "code": (0.3, 1.0)})


def opposite():
    return _checkpoint({"prose": (1.0, 0.0), "code": (-1.0, 0.0)})


def judged():
    return _checkpoint({"prose": (1.0, 0.2), "code": (0.3, 1.0)}, [("tests", (1.0, 1.0))])


def three():
    return _checkpoint({"prose": (1.0, 0.2), "code": (0.3, 1.0), "maths": (0.5, 0.5)})


def nothing():
    return None


def one_domain():
    return _checkpoint({"prose": (1.0, 0.2)})
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"checkpoint_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def _mix(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["mix", *arguments])


def test_prints_the_curves_and_the_advice(module: str) -> None:
    done = _mix(f"{module}:agreeing", "--batches", "2")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["prose", "code", "sharpness", "of", "prose", "sharpness", "of", "code", "largest"]
    assert len(lines) == 1 + 11 + 1
    assert sum(line.endswith("advised") for line in lines) == 1
    assert lines[-1].startswith("advised mix: 0.5 prose (0.5 to 0.5), 0.5 code (0.5 to 0.5); no task is hurt up to")


def test_writes_what_the_function_finds(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--ratios", "0.2,0.5,0.8", "--batches", "3", "--seed", "5", "--tol", "0.01", "--max-grad-norm", "0.5")
    done = _mix(f"{module}:agreeing", *arguments, "--json", "--plot", "mix.png", "--out", "mix.csv")
    assert done.exit_code == 0, done.output
    monkeypatch.syspath_prepend(str(tmp_path))
    optimizer, losses = __import__(module).agreeing()
    advice = advise_mix(optimizer, losses, ratios=[0.2, 0.5, 0.8], batches=3, seed=5, tol=0.01, max_grad_norm=0.5)
    assert json.loads(done.stdout) == json.loads(json.dumps(advice.to_dict()))
    assert (tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "mix.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in row.items()} for row in advice.rows()]


def test_other_tasks_judge(module: str) -> None:
    done = _mix(f"{module}:judged", "--batches", "1", "--json")
    assert done.exit_code == 0, done.output
    assert [curve["task"] for curve in json.loads(done.stdout)["curves"]] == ["tests"]


def test_three_domains(module: str) -> None:
    done = _mix(f"{module}:three", "--batches", "1", "--json")
    assert done.exit_code == 0, done.output
    advice = json.loads(done.stdout)
    assert math.isclose(sum(advice["weights"].values()), 1)
    assert len(advice["mixes"]) == 15


def test_no_advice_is_exit_code_1(module: str) -> None:
    done = _mix(f"{module}:opposite", "--batches", "1", "--ratios", "0,0.3,0.8,1")
    assert done.exit_code == 1, done.output
    assert done.stdout.splitlines()[-1] == "no mix is advised: at each, some task has no safe step"
    assert _mix(f"{module}:opposite", "--batches", "1", "--ratios", "0,0.3,1", "--json").exit_code == 1


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        ("{}:nothing", [], "returned None, not (optimizer, losses) or (optimizer, losses, tasks)"),
        ("{}:missing", [], "failed: AttributeError"),
        ("{}", [], "must read MODULE:CALLABLE"),
        ("no_such_module:f", [], "failed: ModuleNotFoundError"),
        ("{}:one_domain", [], "losses must be a dict of at least 2 losses by name"),
        ("{}:agreeing", ["--ratios", "0,half"], "'0,half' must be numbers between commas"),
        ("{}:agreeing", ["--ratios", "0,2"], "2.0 must be 2 weights in 0..1 that sum to 1"),
        ("{}:agreeing", ["--batches", "0"], "0 is not in the range"),
        ("{}:agreeing", ["--plot", "missing/mix.png"], "does not exist"),
    ],
)
def test_trouble_is_exit_code_2(module: str, builder: str, options: list[str], message: str) -> None:
    done = _mix(builder.format(module), *options)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
