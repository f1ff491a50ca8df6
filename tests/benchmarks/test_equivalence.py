"""The equivalence protocol: its statistics find what was planted, and an interrupted run continues."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.equivalence import contenders, run, runs, workloads
from benchmarks.equivalence.report import bars, figures, markdown
from benchmarks.equivalence.runs import Protocol, Record, Run, Runner, grid_rate, run_all
from benchmarks.equivalence.statistics import MARGIN, Comparison, EdgeError, best_rate, compare
from benchmarks.equivalence.workloads import Kind, Task
from benchmarks.workloads.training import Batch


def planted(mean: float, spread: float, pairs: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return losses, and reference losses that lie below them by exactly that mean and spread, relative to them."""
    generator = np.random.default_rng(0)
    reference = 2 + generator.random(pairs)
    noise = generator.standard_normal(pairs)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    return reference * (1 + mean + spread * noise), reference


def compared(mean: float, spread: float) -> Comparison:
    return compare(*(values.tolist() for values in planted(mean, spread)))


def test_interval_and_tests_are_those_of_scipy() -> None:
    losses, reference = planted(0.002, 0.004)
    found = compare(losses.tolist(), reference.tolist())
    differences = losses / reference - 1
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    below = stats.ttest_1samp(differences, MARGIN, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -MARGIN, alternative="greater").pvalue
    assert found.mean == pytest.approx(0.002)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.p_no_worse == pytest.approx(below)
    assert found.p_equivalent == pytest.approx(max(below, above))


@pytest.mark.parametrize(
    ("mean", "spread", "equivalent", "no_worse"),
    [
        (0.001, 0.003, True, True),
        (0.001, 0.03, False, False),  # too few pairs to tell
        (0.0045, 0.003, False, False),
        (0.01, 0.003, False, False),
        (-0.01, 0.003, False, True),  # better is not the same
    ],
)
def test_verdicts_on_planted_differences(mean: float, spread: float, equivalent: bool, no_worse: bool) -> None:
    found = compared(mean, spread)
    assert (found.equivalent, found.no_worse) == (equivalent, no_worse)


def test_the_margin_decides_at_the_level() -> None:
    """Exactly at the critical value the p-value is 5%."""
    error = 0.003 / math.sqrt(10)
    critical = MARGIN - stats.t.ppf(0.95, 9) * error
    assert compared(critical, 0.003).p_equivalent == pytest.approx(0.05)
    assert compared(-critical, 0.003).p_equivalent == pytest.approx(0.05)


def test_equal_losses_are_equivalent_and_diverged_ones_are_not() -> None:
    assert compare([2.0, 3.0], [2.0, 3.0]).equivalent
    diverged = compare([2.0, math.inf], [2.0, 3.0])
    assert diverged.mean == math.inf
    assert not diverged.no_worse
    with pytest.raises(ValueError, match="two pairs"):
        compare([1.0], [1.0])
    with pytest.raises(ValueError, match="shorter"):
        compare([1.0, 2.0], [1.0])


def test_a_best_rate_at_an_edge_is_refused() -> None:
    assert best_rate({1.0: [3.0, 1.0], 2.0: [1.0, 2.0], 4.0: [2.0, math.inf]}) == 2.0
    for losses, direction in (({1.0: [1.0], 2.0: [2.0]}, -1), ({1.0: [2.0], 2.0: [1.0]}, 1)):
        with pytest.raises(EdgeError) as refused:
            best_rate(losses)
        assert refused.value.direction == direction
    with pytest.raises(ValueError, match="same seeds"):
        best_rate({1.0: [1.0, 2.0], 2.0: [1.0], 4.0: [2.0, 1.0]})


class Tiny:
    """A linear model of four inputs."""

    betas = (0.9, 0.99)

    def new_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(4, 3)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            inputs = torch.randn(16, 4, generator=generator)
            yield inputs, (inputs[:, :3] + 0.5 * torch.randn(16, 3, generator=generator)).argmax(1)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def held_out(self) -> Iterator[Batch]:
        yield from self.batches(4, 10**6)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setitem(workloads.WORKLOADS, "tiny", Kind(lambda size: Tiny(), 20, 10, max_norm=1.0))
    return Task("tiny")


NAMES = ["AdamW", "factored", "AdamW perturbed", "AdamW reordered"]
SHORT = Protocol(selection=2, judged=3)


def without_seconds(path: Path) -> list[dict[str, object]]:
    return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]


def interrupted(stop_after: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the runner fail after so many runs, and return how to undo it."""
    train, count = Runner._train, iter(range(stop_after))

    def failing(self: Runner, contender: str, lr: float, seed: int) -> Run:
        if next(count, None) is None:
            raise KeyboardInterrupt
        return train(self, contender, lr, seed)

    monkeypatch.setattr(Runner, "_train", failing)
    return lambda: monkeypatch.setattr(Runner, "_train", train)


def test_an_interrupted_record_continues_to_the_same(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert run_all([tiny], NAMES, Record(whole), SHORT)
    undo = interrupted(7, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_all([tiny], NAMES, Record(torn), SHORT)
    undo()
    torn.write_bytes(torn.read_bytes()[:-20])  # the seventh line is torn
    assert len(Record(torn).runs) == 6
    assert run_all([tiny], NAMES, Record(torn), SHORT)
    assert without_seconds(torn) == without_seconds(whole)
    before = torn.read_bytes()
    assert run_all([tiny], NAMES, Record(torn), SHORT)
    assert torn.read_bytes() == before


def test_rates_are_extended_until_the_best_has_neighbours(tiny: Task, tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    best = Runner(tiny, record, SHORT).select("AdamW")
    tried = sorted({found.lr for found in record.runs})
    assert tried[0] < best < tried[-1]
    assert len(tried) > 3
    assert set(tried) <= {grid_rate(step) for step in range(-2, 23)}
    assert all(math.isclose(high / low, math.sqrt(2), rel_tol=1e-2) for low, high in itertools.pairwise(tried))


def test_no_row_without_neighbours(
    tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "FARTHEST", 1)
    record = Record(tmp_path / "runs.jsonl")
    assert run_all([tiny], ["AdamW"], record, SHORT)
    assert "left out: AdamW on tiny: the best learning rate" in capsys.readouterr().out
    row = figures(record.runs)["tasks"][0]["contenders"]["AdamW"]
    assert "one tried" in row["refused"]
    assert "best_rate" not in row


def test_the_command_stops_in_time_and_reports(tiny: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--out", str(tmp_path), "--docs", str(tmp_path)]
    some = ["--workloads", "tiny", "--contenders", *NAMES, "--seeds", "3"]
    assert run.main([*common, *some, "--minutes", "0"]) == 1
    assert not (tmp_path / "equivalence.jsonl").exists()
    assert run.main([*common, *some]) == 0
    assert run.main([*common, "--report"]) == 1  # too few workloads
    printed = capsys.readouterr().out
    assert "| factored |" in printed
    assert "FAIL  auto: the same within 0.5% on 0 of 1 workloads (bar: 6)" in printed
    assert (tmp_path / "equivalence.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "equivalence.json").read_text())
    assert result["margin"] == 0.005
    rows = result["tasks"][0]["contenders"]
    assert rows["factored"]["at_own_best"]["pairs"] == 3
    assert rows["factored"]["bytes_per_parameter"] < rows["AdamW"]["bytes_per_parameter"]
    assert (
        abs(rows["AdamW perturbed"]["at_own_best"]["mean"]) < 1e-4 < abs(rows["AdamW reordered"]["at_own_best"]["mean"])
    )
    assert result["tasks"][0]["start_loss"] > 1.2 * sum(rows["AdamW"]["losses"]) / 3


def test_runs_of_other_code_or_data_are_not_mixed(tiny: Task, tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    run_all([tiny], ["AdamW", "factored"], record, SHORT)
    result = figures(record.runs)
    older = [dataclasses.replace(found, code="older", loss=0.0) for found in record.runs]
    other = [dataclasses.replace(found, data="other", loss=0.0) for found in record.runs]
    assert figures(other + older + record.runs) == result
    assert "factored" in markdown(result)


def test_bars_can_fail_and_pass() -> None:
    def task(equivalent: bool, mean: float, size: float) -> dict[str, object]:
        row = {
            "at_own_best": {"equivalent": equivalent},
            "at_reference_best": {"mean": mean},
            "bytes_per_parameter": size,
        }
        return {"workload": str(mean), "size": "small", "length": "short", "contenders": {"auto": row}}

    good = [task(True, 0.001 * number, 4.3) for number in range(6)]
    assert list(bars(good).values()) == [True] * 13
    assert list(bars([*good[:5], task(False, 0.006, 4.5)]).values()) == [False, *[True] * 10, False, False]


def test_a_diverged_run_is_kept_as_infinite(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl")
    found = Run("tiny", "small", "short", "d", "AdamW", "c", 1.0, 0, math.inf, 1.0, 15, 8.0, 0.1, 20, 1)
    record.append(found)
    assert Record(record.path).runs == [found]


def test_versions_ignore_prose_and_see_code(tmp_path: Path) -> None:
    one, other, prose = (tmp_path / name for name in ("one.py", "other.py", "prose.py"))
    one.write_text('def f():\n    """Say."""\n    return 1\n')
    prose.write_text('# why\ndef f():\n    """Say more."""\n    logger.info("done")\n    return 1\n')
    other.write_text('def f():\n    """Say."""\n    return 2\n')
    assert contenders._statements(one) == contenders._statements(prose) != contenders._statements(other)


def test_the_version_of_a_task_depends_on_its_settings(tiny: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(workloads.WORKLOADS["tiny"], weight_decay=0.1)
    monkeypatch.setitem(workloads.WORKLOADS, "changed", changed)
    assert Task("tiny").version == tiny.version != Task("changed").version
    assert Task("tiny", length="long").version != tiny.version


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_workloads_grow_with_their_size(name: str) -> None:
    if workloads.WORKLOADS[name].missing() or name == "fine-tuning":  # which would train its first half
        pytest.skip("its data or models are not here")
    counts = [
        sum(parameter.numel() for parameter in Task(name, size).workload.new_model(0).parameters())
        for size in workloads.SIZES
    ]
    assert 20_000 < counts[0] < counts[1] < counts[2] < 5_000_000


def test_peers_that_cannot_run_are_told_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(contenders.CONTENDERS["Adam-mini"], package="no-such-distribution")
    monkeypatch.setitem(contenders.CONTENDERS, "Adam-mini", absent)
    assert contenders.known(["AdamW", "Adam-mini"]) == ["AdamW"]
    monkeypatch.setitem(workloads.WORKLOADS, "absent", Kind(lambda size: Tiny(), 1, 0, packages=("no-such-data",)))
    assert workloads.present(["byte GPT", "absent"]) == ["byte GPT"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all("is not installed; pip install no-such-" in line for line in printed)


def test_muon_takes_the_matrices_of_hidden_layers_only() -> None:
    task = Task("byte GPT")
    model = task.workload.new_model(0)
    optimizer = contenders.CONTENDERS["Muon and AdamW"].make(model, task)
    assert isinstance(optimizer, contenders.MuonWithAdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert "blocks.0.mlp.up.weight" in muon
    assert {"token_embedding.weight", "position_embedding.weight", "lm_head.weight", "final_norm.weight"} <= adamw
    with pytest.raises(contenders.UnsuitableError):
        contenders.MuonWithAdamW(nn.Conv2d(1, 2, 3), task)
