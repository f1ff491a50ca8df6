"""The critical learning rate where a loss is computed in 16 bits, whose rounding hides what a small step does."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from slimadam import CriticalSharpness, PersistentCatapultWarmup, critical_lr
from slimadam.cli import cli
from slimadam.curvature.probe.bracketing import Crossing, RoughSearch
from tests.command_line import CliRunner

NARROW = [torch.bfloat16, torch.float16]
NOISE = 4e-4
RESOLUTION = 1e-4
CERTAIN = 1e-2


# -- the search itself -------------------------------------------------------------------------------------------------


def search(
    rise: Callable[[float], float], start: float, *, seed: int = 0, noise: float = NOISE, max_eta: float = math.inf
) -> tuple[Crossing, int]:
    """What is found on a rise with noise, the same each time at the same rate, and in how many evaluations."""
    drawn: dict[float, float] = {}
    draw = random.Random(seed)
    evaluations = 0

    def noisy(eta: float) -> float:
        nonlocal evaluations
        evaluations += 1
        return rise(eta) + drawn.setdefault(eta, draw.uniform(-noise, noise))

    return RoughSearch(noisy, 1 / 16, RESOLUTION, 200, max_eta, certain=CERTAIN).run(start), evaluations


def parabola(eta: float, depth: float = 0.2, crossing: float = 0.1) -> float:
    """Zero at ``crossing``, and lowest at half of that."""
    return 4 * depth * ((eta / crossing) ** 2 - eta / crossing)


@pytest.mark.parametrize("start", [1e-12, 1e-6, 0.03, 0.1, 0.2, 1e9])
@pytest.mark.parametrize("depth", [0.2, 0.02, 0.004])
def test_a_fall_deeper_than_the_noise_is_found_from_anywhere(start: float, depth: float) -> None:
    for seed in range(20):
        found, evaluations = search(lambda eta: parabola(eta, depth), start, seed=seed)
        assert (found.status, evaluations < 60) == ("found", True)
        assert found.lower < found.upper
        assert (found.lower + found.upper) / 2 == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("start", [1e-6, 0.1, 10.0])
def test_a_fall_within_the_noise_is_never_found_elsewhere(start: float) -> None:
    found = [search(lambda eta: parabola(eta, NOISE / 2), start, seed=seed)[0] for seed in range(100)]
    assert {crossing.status for crossing in found} <= {"found", "no descent", "too noisy"}
    rates = [(crossing.lower + crossing.upper) / 2 for crossing in found if crossing.status == "found"]
    assert len(rates) <= 10
    assert all(0.1 / 3 < rate < 0.1 * 3 for rate in rates)


def test_noise_about_a_rise_is_no_descent() -> None:
    statuses = [search(lambda eta: eta, start, seed=seed)[0].status for start in (1e-6, 0.1) for seed in range(200)]
    assert set(statuses) <= {"found", "no descent", "too noisy"}
    assert statuses.count("found") <= 4


def test_up_to_the_largest_rate_noise_is_no_increase() -> None:
    assert search(parabola, 1e-6, max_eta=0.03)[0] == Crossing(0.03, math.inf, "no increase")
    assert search(lambda eta: 0.0, 1e-6, noise=0.0)[0].status == "no increase"


@pytest.mark.parametrize("start", [0.055, 0.09, 0.11, 0.15])
def test_from_nearby_it_takes_few_evaluations(start: float) -> None:
    assert search(parabola, start)[1] <= 5


# -- in training -------------------------------------------------------------------------------------------------------


class Training:
    """A small network before one of its steps, with the gradient pending."""

    def __init__(self, seed: int, steps: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
            nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10),
        )  # fmt: skip
        self.optimizer: Optimizer = AdamW(self.model.parameters(), lr=1e-3)
        for step in range(steps):
            self.inputs = torch.randn(64, 16)
            self.optimizer.zero_grad()
            self.loss(dtype).backward()
            if step < steps - 1:
                self.optimizer.step()

    def loss(self, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return nn.functional.cross_entropy(self.model(self.inputs), self.inputs[:, :10].argmax(1))


@cache
def in_float32(seed: int, steps: int, dtype: torch.dtype) -> float:
    training = Training(seed, steps, dtype)
    return critical_lr(training.optimizer, lambda: training.loss(torch.float32))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("steps", [1, 60])
def test_under_autocast_it_is_the_rate_of_float32(steps: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        training = Training(seed, steps, dtype)
        before = [param.detach().clone() for param in training.model.parameters()]
        found = critical_lr(training.optimizer, partial(training.loss, dtype))
        assert found == pytest.approx(in_float32(seed, steps, dtype), rel=0.1)
        assert all(map(torch.equal, before, training.model.parameters()))


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_a_persistent_warmup_starts_there_too(seed: int) -> None:
    training = Training(seed, 60, torch.bfloat16)
    for group in training.optimizer.param_groups:
        group["lr"] = 1.0
    warmup = PersistentCatapultWarmup(training.optimizer, partial(training.loss, torch.bfloat16))
    training.optimizer.step()
    assert warmup.rate == pytest.approx(in_float32(seed, 60, torch.bfloat16), rel=0.1)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_loss_of_16_bits_itself(dtype: torch.dtype) -> None:
    for seed in range(4):
        training = Training(seed, 20, torch.float32)
        for start in (1e-6, 1e-2):
            found = critical_lr(training.optimizer, lambda: training.loss(torch.float32).to(dtype), start=start)  # noqa: B023
            assert found == pytest.approx(in_float32(seed, 20, torch.float32), rel=0.1)


def hidden_by_rounding(dtype: torch.dtype) -> tuple[Optimizer, Callable[[], Tensor]]:
    """A loss that is lowest where it is but for jumps as those of rounding."""
    param = torch.zeros(1, requires_grad=True)
    param.grad = torch.ones(1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return 1 + param.square().sum() + 4e-4 * (1 + 1e6 * param.abs()).log2().mul(41.7).sin().sum()

    return SGD([param], lr=0.1), loss


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("start", [1e-6, 1e-5, 1e-3])
def test_jumps_without_a_fall_are_too_noisy(start: float, dtype: torch.dtype) -> None:
    optimizer, loss = hidden_by_rounding(dtype)
    assert CriticalSharpness(optimizer, start=start, max_forwards=100).measure(loss).status == "too noisy"
    with pytest.raises(RuntimeError, match="too noisy: computed in 16 bits, the loss 1 changes"):
        critical_lr(optimizer, loss, start=start)


# -- find-lr -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn
torch.manual_seed({seed})
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(),
    nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(60):
    inputs = torch.randn(64, 16)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype={dtype}):
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
    loss.backward()
    optimizer.step()
"""


def find_lr(source: str, *options: str) -> Result:
    Path("script.py").write_text(source, encoding="utf-8")
    return CliRunner().invoke(cli, ["find-lr", *options, "script.py"], prog_name="slimadam")


@pytest.mark.parametrize(("seed", "step"), [(1, 1), (0, 20), (0, 60)])
@pytest.mark.parametrize("dtype", NARROW)
def test_find_lr_knows_16_bits(
    seed: int, step: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = find_lr(SCRIPT.format(seed=seed, dtype=dtype), "--json", "--step", str(step))
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found["status"] == "found"
    assert found["critical_lr"] == pytest.approx(in_float32(seed, step, dtype), rel=0.1)


JUMPS = """
import torch
param = torch.zeros(1, requires_grad=True)
optimizer = torch.optim.SGD([param], lr=0.1)
for step in range(2):
    loss = 1 + param.square().sum() + (param - param.detach()).sum()
    loss = loss + 4e-4 * (1 + 1e6 * param.abs()).log2().mul(41.7).sin().sum() + 0 * param.to({dtype}).relu().sum()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize("dtype", NARROW)
def test_find_lr_pastes_nothing_where_it_is_too_noisy(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = find_lr(JUMPS.format(dtype=dtype), "--json")
    assert result.exit_code == 3, result.output
    assert json.loads(result.stdout.splitlines()[-1])["status"] == "too noisy"
    assert "run it in float32" in result.stderr
    assert "CatapultWarmup" not in result.stderr
