"""Sharpness over a run: which steps are measured, what the rows say, and where they go."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

from slimadam import CriticalSharpness, SharpnessLogger, SharpnessRow, SlimAdam
from slimadam.curvature.records import COLUMNS, read_csv

HEADER = "step,sharpness,critical_lr,lower,upper,forward_passes,loss,lr,threshold,status,task"
CURVATURE = 3.0
TOL = 1 / 16


class Run:
    """Gradient descent on ``CURVATURE / 2 |x|^2``, whose sharpness along any descent is ``CURVATURE``."""

    def __init__(self, **options: Any) -> None:
        self.x = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.x], lr=0.01)
        self.logger = SharpnessLogger(self.optimizer, **options)

    def loss(self) -> Tensor:
        return CURVATURE / 2 * self.x.square().sum()

    def train(self, steps: int, closure: Any = None) -> list[SharpnessRow]:
        found = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            found += self.logger.step(closure or self.loss)
            self.optimizer.step()
        return found


def _places(rows: list[SharpnessRow]) -> list[tuple[int, str]]:
    return [(row.step, row.task) for row in rows]


# -- what is measured ---------------------------------------------------------------------------------------


def test_measures_every_so_many_steps() -> None:
    run = Run(every=3)
    dues = []
    for _ in range(8):
        dues.append(run.logger.is_due)
        run.train(1)
    assert dues == [True, False, False, True, False, False, True, False]
    assert [row.step for row in run.logger.rows] == [0, 3, 6]
    assert run.logger.steps == 8
    for row in run.logger.rows:
        assert row.sharpness == pytest.approx(CURVATURE, rel=TOL)
        assert row.lower <= 2 / CURVATURE * (1 + 1e-12) < row.upper
        assert (row.lr, row.status, row.task) == (0.01, "found", "")
        # The loss shrinks by (1 - lr CURVATURE)^2 with each step.
        assert row.loss == pytest.approx(CURVATURE / 2 * 5 * (1 - 0.01 * CURVATURE) ** (2 * row.step), rel=1e-12)


def test_step_returns_what_it_measured_and_measure_counts_none() -> None:
    run = Run(every=2)
    assert run.train(3) == run.logger.rows
    assert run.train(0) == []
    run.loss().backward()
    [row] = run.logger.measure(run.loss)
    assert (row.step, run.logger.steps, run.logger.rows[-1]) == (3, 3, row)


def test_several_tasks_along_one_update() -> None:
    run = Run(every=2)
    tasks = {"": run.loss, "steeper": lambda: 5 * run.loss(), "shifted": lambda: (run.x - 0.5).square().sum()}
    run.train(2, tasks)
    assert _places(run.logger.rows) == [(0, ""), (0, "steeper"), (0, "shifted")]
    own, steeper, shifted = run.logger.rows
    # Along D = CURVATURE x, at x = (1, -2): D^T H D / D^T g with H = 2 and g = 2 (x - 1/2).
    descent = CURVATURE * 2 * (1 * 0.5 + 2 * 2.5)
    assert shifted.sharpness == pytest.approx(2 * CURVATURE**2 * 5 / descent, rel=TOL)
    assert steeper.sharpness == pytest.approx(own.sharpness, rel=TOL)


def test_a_measurement_that_finds_nothing_is_a_row_too(tmp_path: Path) -> None:
    run = Run()
    run.logger = SharpnessLogger(CriticalSharpness(run.optimizer, max_lr=10.0), every=1, csv=tmp_path / "s.csv")
    run.train(1, {"up": lambda: -run.loss(), "nan": lambda: run.loss() * math.nan, "line": lambda: run.x[0]})
    up, nan, line = run.logger.rows
    assert [row.status for row in run.logger.rows] == ["no descent", "not finite", "no increase"]
    assert math.isnan(up.sharpness)
    assert math.isnan(nan.loss)
    assert (line.sharpness, line.critical_lr) == (0.0, math.inf)
    assert repr(read_csv(tmp_path / "s.csv")) == repr(run.logger.rows)
    for row in run.logger.rows:
        assert not row.found
        assert all(map(math.isfinite, row.as_dict().values()))
        assert row.as_dict()[f"sharpness/{row.task}/found"] == 0.0
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        run.logger.plot(tmp_path / "s.svg")
    drawn = (tmp_path / "s.svg").read_text()
    assert "up: no descent" in drawn
    assert "nan: not found" in drawn


def test_settings_of_a_probe_at_hand() -> None:
    run = Run()
    run.logger = SharpnessLogger(CriticalSharpness(run.optimizer, tol=1 / 1024), every=1)
    run.train(1)
    assert run.logger.rows[0].sharpness == pytest.approx(CURVATURE, rel=1 / 1024)


def test_threshold_is_the_measurements() -> None:
    run = Run(every=1)
    run.loss().backward()
    expected = run.logger.probe.measure(run.loss).threshold
    assert run.train(1)[0].threshold == expected


def test_slimadam_trains_on_as_if_not_watched() -> None:
    def trained(watched: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1))
        optimizer = SlimAdam(model, lr=1e-2, plan="rules")
        logger = SharpnessLogger(optimizer, every=2)
        data = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(2))
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if watched:
                logger.step(lambda x=x: model(x).square().mean())  # type: ignore[misc]
            optimizer.step()
        assert len(logger.rows) == 3 * watched
        return [param.detach() for param in model.parameters()]

    for watched, alone in zip(trained(True), trained(False), strict=True):
        assert torch.equal(watched, alone)


# -- where rows go ------------------------------------------------------------------------------------------


def test_csv_is_whole_after_each_row(tmp_path: Path) -> None:
    path = tmp_path / "sharpness.csv"
    run = Run(every=2, csv=path)
    assert not path.exists()
    for count in (1, 2, 3):
        run.train(2)
        lines = path.read_text().splitlines()
        assert lines[0] == HEADER == ",".join(COLUMNS)
        assert len(lines) == 1 + count
        assert read_csv(path) == run.logger.rows


def test_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Run(every=2, csv=tmp_path / "whole.csv")
    whole.train(9)

    first = Run(every=2, csv=tmp_path / "parts.csv")
    first.train(5)
    checkpoint = {"x": first.x.detach().clone(), "logger": first.logger.state_dict()}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    first.train(2)  # what is measured after the checkpoint is measured again
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = Run(every=2, csv=tmp_path / "parts.csv")
    second.x.data.copy_(loaded["x"])
    second.logger.load_state_dict(loaded["logger"])
    second.train(4)

    assert second.logger.steps == 9
    assert second.logger.rows == whole.logger.rows == read_csv(tmp_path / "parts.csv")
    assert len((tmp_path / "parts.csv").read_text().splitlines()) == 1 + 5 + 1


def test_state_dict_is_plain() -> None:
    run = Run(every=1)
    run.train(2)
    assert json.loads(json.dumps(run.logger.state_dict())) == run.logger.state_dict()


@pytest.mark.parametrize("broken", [{}, {"steps": 1, "rows": [{}], "probe": {}}, {"steps": 1, "rows": [], "probe": {}}])
def test_other_state_dicts_are_refused(broken: dict[str, Any]) -> None:
    run = Run(every=1)
    run.train(1)
    rows = list(run.logger.rows)
    with pytest.raises(ValueError, match="state_dict is not one of a SharpnessLogger"):
        run.logger.load_state_dict(broken)
    assert (run.logger.rows, run.logger.steps) == (rows, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step,loss\n1,2\n", r"csv='.*s\.csv': the file begins with 'step,loss', not with step,sharpness,.*; name"),
        (HEADER + "\n0,1,2,1,3,5,1", r"its last line is cut off"),
    ],
)
def test_other_files_are_not_added_to(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Run(csv=path)
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0,1,2", r"s\.csv, line 2: "),
        ("x,1,2,1,3,5,1,1,,found,", r"line 2: invalid literal for int"),
        ("0,1,2,1,3,5,1,1,,lost,", r"line 2: has the status 'lost', not one of found, "),
    ],
)
def test_damaged_files_are_not_read(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_csv(path)


def test_dicts_as_wandb_takes_them() -> None:
    logged: list[tuple[dict[str, float], int]] = []
    run = Run(every=2, log=lambda scalars, step: logged.append((scalars, step)))
    run.train(3, {"": run.loss, "code": run.loss})
    assert [step for _, step in logged] == [0, 0, 2, 2]
    row, scalars = run.logger.rows[0], dict(logged[0][0])
    scalars.pop("sharpness/threshold", None)
    assert scalars == {
        "sharpness/critical": row.sharpness,
        "sharpness/critical_lr": row.critical_lr,
        "sharpness/lower": row.lower,
        "sharpness/upper": row.upper,
        "sharpness/loss": row.loss,
        "sharpness/lr": 0.01,
        "sharpness/forward_passes": row.forward_passes,
        "sharpness/found": 1.0,
    }
    assert logged[1][0]["sharpness/code/critical"] == run.logger.rows[1].sharpness


class Writer:
    """Collects what a SummaryWriter would write."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))


def test_scalars_as_tensorboard_takes_them() -> None:
    writer = Writer()
    run = Run(every=2, writer=writer)
    run.train(3)
    expected = [(tag, value, row.step) for row in run.logger.rows for tag, value in row.as_dict().items()]
    assert writer.scalars == expected
    assert ("sharpness/critical", run.logger.rows[1].sharpness, 2) in writer.scalars


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer()
    run = Run(every=1, writer=writer, csv=tmp_path / "s.csv")
    with monkeypatch.context() as rank_1:
        rank_1.setattr("torch.distributed.is_initialized", lambda: True)
        rank_1.setattr("torch.distributed.get_world_size", lambda: 1)
        rank_1.setattr("torch.distributed.get_rank", lambda: 1)
        run.train(1)
    assert len(run.logger.rows) == 1
    assert not writer.scalars
    assert not (tmp_path / "s.csv").exists()
    run.train(1)
    assert writer.scalars
    assert [row.step for row in read_csv(tmp_path / "s.csv")] == [1]


def test_plot(tmp_path: Path) -> None:
    run = Run(every=2)
    with pytest.raises(ValueError, match="there is no measurement to plot yet"):
        run.logger.plot(tmp_path / "s.png")
    run.train(5, {"train": run.loss, "code": lambda: 2 * run.loss()})
    run.logger.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Run(every=1)
    run.train(1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "slimadam.curvature.plots", raising=False)
    with pytest.raises(ImportError, match=r"plots of sharpness need matplotlib: pip install 'slimadam\[cli\]'$"):
        run.logger.plot(tmp_path / "s.png")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, r"every=0 must be an integer >= 1"),
        ({"every": True}, ValueError, r"every=True must be an integer >= 1"),
        ({"log": 3}, TypeError, r"log=3 must be a function of a dict of scalars and the step"),
        ({"writer": print}, TypeError, r"writer=.* must have add_scalar\(tag, value, step\)"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Run(**options)
