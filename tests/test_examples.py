"""The examples, as they are started, and what they promise."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from benchmarks.distributed.scale import pretended
from examples import fsdp2_gpt
from tests.ranks import environment_of_ranks, on_ranks

ROOT = Path(__file__).resolve().parent.parent


def _options(folder: Path, *more: str) -> Any:
    data = ["--tiny", "--tokens", str(folder / "tokens.npy"), "--precision", "float32", "--log-every", "1"]
    sizes = ["--width", "36", "--context", "16", "--steps", "9", "--lr", "1e-2", "--save-every", "3"]
    return fsdp2_gpt.parse([*data, *sizes, *more])


def _killed_in_its_second_save(options: Any) -> list[Path]:
    """Train until then, leaving behind what a killed rank would; returns where the saves went."""
    paths: list[Path] = []

    def save(state: Any, checkpoint_id: Path) -> None:
        paths.append(checkpoint_id)
        if len(paths) == 2:
            checkpoint_id.mkdir(parents=True, exist_ok=True)
            (checkpoint_id / "__0_0.distcp").write_bytes(b"half")
            raise KeyboardInterrupt
        dcp.save(state, checkpoint_id=checkpoint_id)

    fsdp2_gpt.dcp = SimpleNamespace(save=save, load=dcp.load)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        fsdp2_gpt.train(options)
    fsdp2_gpt.dcp = dcp
    return paths


class Together(NamedTuple):
    """What two ranks found.

    Attributes:
        losses: Of a run.
        resumed: Of one that went on after it had been killed.
        kept: Its checkpoints in the end.
        from_critical_rate: Losses of a run whose warmup starts at the critical learning rate.
        measured: Of the same one, killed, resumed, and its sharpness measured.
        printed: By that.
    """

    losses: dict[int, float]
    resumed: dict[int, float]
    kept: list[str]
    from_critical_rate: dict[int, float]
    measured: dict[int, float]
    printed: list[str]


def _train_then_resume(folder: Path) -> Together:
    losses = fsdp2_gpt.train(_options(folder))
    options = _options(folder, "--checkpoints", str(folder / "saved"))
    assert [path.name for path in _killed_in_its_second_save(options)] == ["step-00000003", "step-00000006"]
    with pytest.raises(SystemExit, match=r"holds a run with --steps 9, not 12; --lr 0\.01, not 0\.02: resume"):
        fsdp2_gpt.train(_options(folder, "--checkpoints", str(folder / "saved"), "--steps", "12", "--lr", "2e-2"))
    resumed = fsdp2_gpt.train(options)
    torch.distributed.barrier()
    kept = sorted(path.name for path in (folder / "saved").iterdir())

    catapult = ["--catapult", "--lr", "0.3"]
    from_critical_rate = fsdp2_gpt.train(_options(folder, *catapult))
    options = _options(folder, *catapult, "--probe-every", "4", "--checkpoints", str(folder / "measured"))
    _killed_in_its_second_save(options)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        measured = fsdp2_gpt.train(options)
    lines = [line.split(" ", 3)[1:3] for line in printed.getvalue().splitlines()]
    return Together(losses, resumed, kept, from_critical_rate, measured, [" ".join(line) for line in lines])


def _train_alone(folder: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of one rank, and of one that goes on from a checkpoint of several."""
    (folder / "saved" / "latest").write_text("step-00000006")
    options = _options(folder, "--checkpoints", str(folder / "saved"))
    return fsdp2_gpt.train(_options(folder)), fsdp2_gpt.train(options)


def test_fsdp2_gpt_resumes_as_if_nothing_had_happened_on_any_number_of_ranks(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", (np.arange(5000) * 7 % 97).astype(np.uint16))
    together = on_ranks(2, tmp_path, _train_then_resume, tmp_path)
    losses, resumed, kept, from_critical_rate, measured, printed = together[0]
    assert together[1] == together[0]._replace(printed=[])
    assert list(losses) == list(range(1, 10))
    assert resumed == {step: loss for step, loss in losses.items() if step > 3}
    assert kept == ["latest", "step-00000006", "step-00000009"]
    assert from_critical_rate[1] == losses[1]  # before the first step
    assert from_critical_rate[2] != pytest.approx(losses[2], rel=1e-3)
    assert measured == {step: loss for step, loss in from_critical_rate.items() if step > 3}
    assert printed == ["4 loss", "4 sharpness/critical", *(f"{step} loss" for step in (5, 6, 7, 8)),
                       "8 sharpness/critical", "9 loss"]  # fmt: skip
    (tmp_path / "store").unlink()
    ((alone, went_on),) = on_ranks(1, tmp_path, _train_alone, tmp_path)
    assert alone == pytest.approx(losses, rel=2e-5)
    assert went_on == pytest.approx({step: loss for step, loss in losses.items() if step > 6}, rel=2e-5)


def test_fsdp2_gpt_learns_under_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "examples" / "fsdp2_gpt.py"), "--tiny", "--log-every", "5", "--lr", "3e-3"]
    environment = environment_of_ranks()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == ["5", "10", "15", "20"]
    assert float(rows[-1][3]) < float(rows[0][3]) - 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup", "20"], "--warmup 20 must be less than --steps 20"),
        (["--keep", "0"], "argument --keep: '0' must be a whole number of at least 1"),
        (["--heads", "5"], "--width 64 must be a multiple of --heads 5"),
        (["--plan", "auto", "--checkpoints", "run"], "--plan auto is not saved"),
    ],
)
def test_fsdp2_gpt_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fsdp2_gpt.parse(["--tiny", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((99, 99), np.uint16), "must be one array of integers"),
        (np.zeros(99, np.float32), "must be one array of integers"),
        (np.zeros(16, np.uint16), "has 16 tokens, --context 16 needs more"),
        (np.full(17, 256, np.uint16), "--vocabulary 256 must be larger than any token; found 256 to 256"),
    ],
)
def test_fsdp2_gpt_refuses_tokens(tokens: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", tokens)
    options = _options(tmp_path)
    with pytest.raises(SystemExit, match=message), pretended(1):
        next(fsdp2_gpt.batches(fsdp2_gpt.read_tokens(options), options, 0, torch.device("cpu")))
