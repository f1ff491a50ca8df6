"""The warmup benchmark: its short form runs, and its bars can fail."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.correctness.gradient_initialised import LARGEST_ERROR
from benchmarks.warmup import run as warmup
from benchmarks.warmup.runs import BETAS, WORKLOADS, Method, guessing_loss, train
from benchmarks.warmup.sharpness import initial
from benchmarks.workloads.training import Batch


def test_quick_run_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warmup.main(["--quick", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "warmup.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "warmup.json").read_text())
    assert all(result["bars"].values())
    assert result["exactness"]["largest_error"] <= LARGEST_ERROR
    model = result["training"]["models"]["digits MLP"]
    assert model["final_loss"]["no warmup"][0][0] < model["trains_below"] < model["guessing_loss"]
    (catapult,) = model["catapult"]
    assert [run["saved"] for run in catapult["steps_saved"]] == [4, 0]
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    assert printed.count("pass") == len(result["bars"])


def test_bars_fail_where_figures_are_wrong() -> None:
    row = {
        "warmup": 10, "linears_best_rate": 0.1, "above_linear": 0.0,
        "steps_saved": [{"rate": 0.1, "seed": 0, "saved": 3, "expected": 3.9}],
    }  # fmt: skip
    result = {"models": {"m": {"catapult": [row]}}}
    assert list(warmup.training_bars(result).values()) == [True, True]
    slow, worse = copy.deepcopy(result), copy.deepcopy(result)
    slow["models"]["m"]["catapult"][0]["steps_saved"][0]["saved"] = 2
    worse["models"]["m"]["catapult"][0]["above_linear"] = 0.02
    assert list(warmup.training_bars(slow).values()) == [False, True]
    assert list(warmup.training_bars(worse).values()) == [True, False]
    figures = {"error_of_five_steps": {}, "largest_error": 2e-6, "first_update_over_adams": 1.0,
               "sqrt_of_1_minus_beta2": 0.03}  # fmt: skip
    assert list(warmup.exactness_bars(figures).values()) == [False, False]


@pytest.mark.parametrize(
    ("method", "reached"),
    [(Method("no warmup"), None), (Method("linear", 4), 4), (Method("catapult", 4, catapult=True), 3)],
)
def test_when_a_run_reaches_its_target(method: Method, reached: int | None) -> None:
    run = train(WORKLOADS["digits MLP"], method, 0.01, 0, 8, critical=0.003)
    assert run.reached == reached
    assert math.isfinite(run.final_loss)


def test_a_run_that_diverges_ends() -> None:
    assert train(WORKLOADS["digits MLP"], Method("no warmup"), 1e30, 0, 8, critical=1.0).final_loss == math.inf


def test_guessing_costs_the_entropy_of_the_targets() -> None:
    digits = WORKLOADS["digits MLP"]
    targets = torch.cat([labels for _, labels in digits.batches(200, 0)])
    shares = targets.bincount().double() / len(targets)
    assert guessing_loss(digits, 0) == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-12)


class Tiny:
    """Six parameters and a curved loss."""

    betas = BETAS

    def new_model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(5, 1)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield torch.randn(30, 5, generator=generator), torch.randn(30, generator=generator)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return (model(batch[0]).squeeze(1).exp() - batch[1]).square().mean()

    def held_out(self) -> Iterator[Batch]:
        yield from self.batches(1, 1)


def test_preconditioned_sharpness_is_the_dense_ones() -> None:
    task = Tiny()
    found = initial(task, 0)
    model = task.new_model(0).double()
    inputs, targets = (part.double() for part in next(task.batches(1, 0)))

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return ((inputs @ flat[:5] + flat[5]).exp() - targets).square().mean()

    flat = torch.cat([model.weight.flatten(), model.bias]).detach()
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    for variance_init, scale in (("zeros", 1.0), ("gradient", (1 - BETAS[1]) ** -0.5)):
        root = (gradient.abs() * scale + 1e-8).rsqrt()
        expected = torch.linalg.eigvalsh(root[:, None] * hessian * root).max().item()
        assert found[variance_init]["preconditioned_sharpness"] == pytest.approx(expected, rel=1e-3)
    assert found["ratio"] == pytest.approx(1000**0.5, rel=1e-3)
    assert found["gradient"]["critical_lr"] / found["zeros"]["critical_lr"] == pytest.approx(1000**0.5, rel=1 / 15)
