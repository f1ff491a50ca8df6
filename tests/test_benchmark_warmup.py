"""The warmup benchmark: its short form runs, and its bars can fail."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import warmup
from benchmarks.gradient_initialised import LARGEST_ERROR
from benchmarks.warmup_runs import WORKLOADS, Method, guessing_loss, train
from benchmarks.warmup_sharpness import top_eigenvalue


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


def test_top_eigenvalue_is_the_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (4,))
    ]
    preconditioner = [0.1 + torch.rand(param.shape, generator=generator, dtype=torch.float64) for param in params]

    def loss(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.sum() * second).sin().sum() + (first**4).sum() + (second**2).prod()

    gradients = torch.autograd.grad(loss(*params), params, create_graph=True)
    blocks = torch.autograd.functional.hessian(loss, tuple(params))
    dense = torch.cat(
        [torch.cat([block.reshape(row.numel(), -1) for block in blocks[index]], 1) for index, row in enumerate(params)]
    )
    root = torch.cat([part.flatten() for part in preconditioner]).rsqrt()
    expected = torch.linalg.eigvalsh(root[:, None] * dense * root).max().item()
    assert top_eigenvalue(gradients, params, preconditioner) == pytest.approx(expected, rel=1e-3)
