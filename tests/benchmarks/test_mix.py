"""The mixing study: its code runs, its verdict follows its criterion, its domains are what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.harness import machine
from benchmarks.mix import domains
from benchmarks.mix import run as mix
from benchmarks.readme.mix import mix as figures
from slimadam import MixAdvice
from slimadam.demo.data import ByteData


def _text(seed: int) -> ByteData:
    generator = torch.Generator().manual_seed(seed)
    low = 40 * seed
    drawn = torch.randint(low, low + 60, (3000,), dtype=torch.uint8, generator=generator)
    return ByteData(drawn[:2500], drawn[2500:], f"text {seed}")


@pytest.fixture
def small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "prose", lambda: _text(1))
    monkeypatch.setattr(mix, "code", lambda: _text(2))


@pytest.mark.usefixtures("small_texts")
def test_quick_run_prints_and_leaves_the_results_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {}
    monkeypatch.setattr(
        machine, "write", lambda name, result, folder: written.setdefault(folder / f"{name}.json", result)
    )
    assert mix.main(["--quick"]) == 0
    [(path, result)] = written.items()
    assert path.parent != machine.RESULTS
    assert result["settings"] == asdict(mix.QUICK)
    printed = capsys.readouterr().out
    assert f"confirmed: {'yes' if result['confirmed'] else 'no'}" in printed
    assert printed.count("advised") >= len(mix.QUICK.seeds)
    json.dumps(result, allow_nan=False)


@pytest.mark.usefixtures("small_texts")
def test_every_share_starts_from_the_same_checkpoint() -> None:
    texts = {"prose": mix.prose(), "code": mix.code()}
    checkpoint = mix.pretrained(mix.QUICK, texts["prose"], 0)
    before = {name: value.clone() for name, value in checkpoint["model"].items()}
    all_prose = mix.finetuned(mix.QUICK, texts, checkpoint, 1.0, 0)
    torch.testing.assert_close(checkpoint["model"], before, rtol=0, atol=0)
    again = mix.finetuned(mix.QUICK, texts, checkpoint, 1.0, 0)
    torch.testing.assert_close(again.state_dict(), all_prose.state_dict(), rtol=0, atol=0)
    all_code = mix.finetuned(mix.QUICK, texts, checkpoint, 0.0, 0)
    assert not torch.equal(all_code.lm_head.weight, all_prose.lm_head.weight)


def _advice(middle: float) -> MixAdvice:
    sharpness = np.array([[[9.0], [middle], [1.0]], [[1.0], [middle], [9.0]]])
    return MixAdvice.from_sharpness(["prose", "code"], ["prose", "code"], [(0, 1), (0.5, 0.5), (1, 0)], sharpness)


@pytest.mark.parametrize(
    ("changes", "held", "best", "inside"),
    [
        ([(0.2, -0.3), (-0.1, -0.2), (-0.2, 0.1)], [True, True, True], 0.5, True),
        ([(0.2, -0.3), (0.1, -0.2), (-0.2, 0.3)], [False, True, True], 0.5, True),
        ([(-0.2, -0.3), (-0.1, -0.2), (-0.2, 0.3)], [True, False, True], 0.0, False),
        ([(0.2, -0.3), (-0.1, -0.2), (-0.2, -0.3)], [True, True, False], 1.0, False),
    ],
)
def test_verdict(changes: list[tuple[float, float]], held: list[bool], best: float, inside: bool) -> None:
    named = [dict(zip(mix.TASKS, change, strict=True)) for change in changes]
    found = mix.verdict((0.0, 0.5, 1.0), named, _advice(2.0))
    assert list(found["criterion"].values()) == held
    assert (found["best_share"], found["best_in_interval"]) == (best, inside)
    assert found["worse_change_at_advised"] == max(changes[1])


def test_no_advice_is_not_confirmed() -> None:
    changes = [{"prose": -0.1, "code": -0.1}] * 3
    sharpness = np.full((2, 3, 1), np.inf)
    advice = MixAdvice.from_sharpness(["prose", "code"], ["prose", "code"], [(0, 1), (0.5, 0.5), (1, 0)], sharpness)
    assert not any(mix.verdict((0.0, 0.5, 1.0), changes, advice)["criterion"].values())


def test_the_committed_result_is_what_the_page_shows() -> None:
    result: dict[str, Any] = json.loads((machine.RESULTS / "mix.json").read_text(encoding="utf-8"))
    assert figures(result) in (Path(__file__).parents[2] / "docs" / "data-mixing.md").read_text(encoding="utf-8")
    for run in result["runs"]:
        assert run["worse_change"] == [max(change.values()) for change in run["changes"]]
    assert result["confirmed"] == all(all(run["criterion"].values()) for run in result["runs"])


def test_prose_is_docstrings_and_the_same_each_time() -> None:
    text = domains.prose()
    assert len(text.train) > 1_000_000
    assert 0.02 < len(text.held_out) / len(text.train) < 0.3
    words = bytes(text.train.tolist()).decode()
    assert "Return" in words
    assert "import annotations" not in words
    assert torch.equal(text.train, domains.prose().train)


def test_a_batch_is_windows_and_the_bytes_after_them() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    inputs, targets = domains.batch(text, 3, 5, 7)
    assert inputs.shape == targets.shape == (5, 7)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, domains.batch(text, 3, 5, 7)[0])
