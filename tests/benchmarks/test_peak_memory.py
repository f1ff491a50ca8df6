"""Peaks of memory are counted exactly, and the benchmark holds them against its bar."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from benchmarks.gpu.training import GPT2
from benchmarks.harness.exactness import WrongStepError
from benchmarks.peak import run, scenarios
from benchmarks.peak.meters import Peak, ProcessBytes, TensorBytes
from slimadam import SlimAdam
from tests.versions import on_cuda

ELEMENTS = 1 << 18
BYTES = 4 * ELEMENTS


def test_blocks_are_counted_when_they_are_made_and_freed() -> None:
    meter = TensorBytes()
    with meter.running():
        kept = torch.zeros(ELEMENTS)
        with meter.phase("made"):
            more = kept + 1
            del more
            also = kept.double()
        with meter.phase("freed"):
            del kept, also
    assert meter.peaks() == {"made": Peak(BYTES, 3 * BYTES, 3 * BYTES), "freed": Peak(3 * BYTES, 3 * BYTES, 0)}
    assert meter.peaks()["made"].beyond == meter.peaks()["freed"].beyond == 0


def test_temporaries_of_kernels_and_of_autograd_are_counted() -> None:
    meter = TensorBytes()
    with meter.running():
        logits, targets = torch.randn(512, 512, requires_grad=True), torch.zeros(512, dtype=torch.long)
        with meter.phase("forward, without a graph"), torch.no_grad():
            F.cross_entropy(logits, targets)
        with meter.phase("forward"):
            loss = F.cross_entropy(logits, targets)
        with meter.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
    without, forward, backward = meter.peaks().values()
    assert BYTES <= without.beyond < BYTES + 1024  # the logarithms of the softmax
    assert BYTES <= forward.after - forward.before < BYTES + 1024
    assert BYTES <= backward.peak - backward.before < 2 * BYTES + 1024
    assert logits.grad is not None


def test_the_process_grows_and_its_peak_is_reset() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not reset a process's peak")
    meter, size = ProcessBytes(), 1 << 27
    with meter.running():
        with meter.phase("large"):
            torch.ones(size // 4)
        with meter.phase("nothing"):
            pass
    large, nothing = meter.peaks().values()
    assert large.peak - large.before > 0.9 * size
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this process may not reset its peak")
    assert nothing.peak - nothing.before < 0.5 * size


def test_a_training_holds_what_follows_from_its_shapes() -> None:
    with torch.device("meta"):
        params = list(GPT2(scenarios.MODELS["tiny"]).parameters())
    weights = sum(4 * param.numel() for param in params)
    for label, a_step in ((scenarios.FUSED, 0), (scenarios.FOREACH, weights)):
        peaks = {name: Peak(*of) for name, of in scenarios.measure("training", label, "tiny", "cpu").items()}
        assert peaks["model"].after == weights
        state = peaks["step 1"].after - peaks["step 1"].before
        assert state == 2 * weights + 4 * len(params)
        assert abs(peaks["step 3"].beyond - a_step) < 0.1 * weights
        tokens = 8 * (scenarios.LENGTH + 1)
        assert peaks["forward and backward 3"].after == peaks["step 3"].after == 4 * weights + 4 * len(params) + tokens


def test_an_optimizer_is_measured_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "benchmarks.peak.scenarios", "training", "SlimAdam (rules)", "--model", "tiny"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2], timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = {name: Peak(*of) for name, of in json.loads(done.stdout.splitlines()[-1]).items()}
    with torch.device("meta"):
        memory = SlimAdam(GPT2(scenarios.MODELS["tiny"]), plan="rules").memory()
    assert peaks["step 1"].after - peaks["step 1"].before == memory.total + memory.monitor
    assert peaks["step 3"].beyond < 1024


@on_cuda
@pytest.mark.parametrize("label", ["SlimAdam (auto)", "SlimAdam (factored)", "SlimAdam (rules)"])
def test_on_cuda_a_step_holds_next_to_nothing_and_training_less_than_with_adamw(label: str) -> None:
    adamw, ours = (
        {name: Peak(*of) for name, of in scenarios.measure("training", one, "gpt2-small", "cuda").items()}
        for one in (scenarios.FUSED, label)
    )
    assert ours["step 3"].beyond < 0.02 * ours["model"].after
    assert ours["forward and backward 3"].peak < 0.9 * adamw["forward and backward 3"].peak


@on_cuda
@pytest.mark.parametrize("label", scenarios.with_checkpoints())
def test_on_cuda_the_bar_is_met(label: str) -> None:
    found = scenarios.measure("checkpoints", label, "gpt2-small", "cuda")
    largest = run.largest_moments(GPT2(scenarios.MODELS["gpt2-small"]))
    assert {name: of for name, of in found.items() if Peak(*of).beyond > largest} == {}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Measure AdamW and one kind of SlimAdam alone, in this process."""
    every = scenarios.contenders()
    training = {label: every[label] for label in (scenarios.FUSED, "SlimAdam (rules)")}
    ours = {"SlimAdam (rules)": every["SlimAdam (rules)"]}
    scenes = {"training": (lambda: training, scenarios.train), "checkpoints": (lambda: ours, scenarios.checkpoints)}
    monkeypatch.setattr(scenarios, "SCENARIOS", scenes)
    monkeypatch.setattr(run, "SCENARIOS", scenes)
    monkeypatch.setattr(run, "with_checkpoints", lambda: ours)
    monkeypatch.setattr(run, "_in_own_process", scenarios.measure)
    return ours


def test_all_is_measured_written_and_shown(
    few: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--model", "tiny", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "pass  SlimAdam (rules): loading" in printed
    found = json.loads((tmp_path / "peak_memory_tiny.json").read_text())
    assert found["largest_moments"] == 8 * 700 * 64
    assert 0 <= found["worst_share_of_rounding"] <= 1
    assert list(found["training"]) == list(found["process"]) == [scenarios.FUSED, "SlimAdam (rules)"]
    adamw, rules = (run.training_row(label, found) for label in found["training"])
    assert float(rules[2]) < float(adamw[2]) - 3
    assert len(found["checkpoints"]["SlimAdam (rules)"]) == 12
    assert run.markdown(found) in printed


def test_a_bar_that_is_missed_is_the_exit_status(
    few: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "largest_moments", lambda model: 1000)
    assert run.main(["--model", "tiny", "--out", str(tmp_path)]) == 1
    assert run.bars(json.loads((tmp_path / "peak_memory_tiny.json").read_text())).popitem()[1] is False


def test_wrong_moments_are_refused_before_anything_is_measured(
    few: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlimAdam, "load_state_dict", lambda self, saved: None)
    with pytest.raises(WrongStepError, match="the loaded second moment is not the average of AdamW's"):
        run.main(["--model", "tiny", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
