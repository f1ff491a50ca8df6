"""Critical sharpness, its log and warmup on several ranks: the same numbers on each, those of one process."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from slimadam import CriticalSharpness, PersistentCatapultWarmup, SharpnessLogger, critical_lr
from tests.distributed.test_sharpness import Run
from tests.ranks import on_ranks
from tests.versions import shards

MEASURED = 3


def _log(run: Run, file: Path) -> list[dict[str, Any]]:
    """Measurements in the pending step and those after it, and the file of rank 0."""
    logger = SharpnessLogger(CriticalSharpness(run.optimizer, memory="lean"), every=1, csv=file)
    for _ in range(MEASURED):
        logger.step(run.loss)
        run.optimizer.step()
        run.backward()
    return [asdict(row) for row in logger.rows]


def _warm_up(run: Run) -> list[float]:
    """Rates of the steps of a warmup to a target far above the critical rate."""
    for group in run.optimizer.param_groups:
        group["lr"] = 1.0
    warmup = PersistentCatapultWarmup(run.optimizer, run.loss)
    rates = []
    for _ in range(MEASURED):
        run.optimizer.step()
        rates.append(run.optimizer.param_groups[0]["lr"])
        warmup.step()
        run.backward()
    return rates


def _measured(kinds: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for kind in ("alone", *kinds):
        run = Run(kind, "SlimAdam")
        start = critical_lr(run.optimizer, run.loss)
        rows = _log(run, folder / f"{kind}.csv")
        found[kind] = start, rows, _warm_up(run), run.loss_of_all()
    return found


@shards
@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [(3, ["replicated", "sharded"]), (4, ["hybrid", "sharded and tensor parallel"])],
)
def test_every_rank_finds_what_one_process_does(ranks: int, kinds: list[str], tmp_path: Path) -> None:
    of_ranks = on_ranks(ranks, tmp_path, _measured, kinds, tmp_path)
    start, rows, rates, loss = of_ranks[0]["alone"]
    assert len({row["critical_lr"] for row in rows}) == MEASURED
    assert 0 < rates[0] < 1
    for kind in kinds:
        assert all(found[kind] == of_ranks[0][kind] for found in of_ranks), kind
        own_start, own_rows, own_rates, own_loss = of_ranks[0][kind]
        assert own_start == pytest.approx(start, rel=1e-3), kind
        assert own_rates == pytest.approx(rates, rel=1e-3), kind
        assert own_loss == pytest.approx(loss, rel=1e-3), kind
        for own, row in zip(own_rows, rows, strict=True):
            assert (own.pop("status"), own.pop("task")) == (row["status"], row["task"]) == ("found", ""), kind
            assert own == pytest.approx({key: row[key] for key in own}, rel=1e-3), kind
        with (tmp_path / f"{kind}.csv").open(newline="") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(MEASURED))
