"""Edges of stability against torch's own optimizers on a quadratic just below and just above them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from slimadam import SlimAdam, edge_of_stability

LR = 0.03
STEPS = 1000
ROOT = 0.5  # the frozen sqrt(v_hat), with eps = 0
CASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "gradient descent": (torch.optim.SGD, {}),
    "gradient descent, decay": (torch.optim.SGD, {"weight_decay": 3.0}),
    "momentum": (torch.optim.SGD, {"momentum": 0.8}),
    "momentum, decay": (torch.optim.SGD, {"momentum": 0.8, "weight_decay": 3.0}),
    "dampened": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.6, "weight_decay": 3.0}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "Nesterov, decay": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 3.0}),
    "Adam": (torch.optim.Adam, {"betas": (0.8, 1 - 1e-12)}),
    "Adam without momentum": (torch.optim.Adam, {"betas": (0.0, 1 - 1e-12)}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 1 - 1e-12), "weight_decay": 0.0}),
    "AdamW, decay": (torch.optim.AdamW, {"betas": (0.8, 1 - 1e-12), "weight_decay": 0.3}),
    "SlimAdam, decay": (SlimAdam, {"betas": (0.8, 1 - 1e-12), "weight_decay": 0.3, "plan": None}),
}


def _growth(kind: type[Optimizer], options: dict[str, Any], curvature: float) -> float:
    """Size after many steps on ``curvature / 2 theta**2`` against that at the start, the preconditioner held still.

    In float64 from 1e-150, so that neither an overflow nor the second moment's change matters.
    """
    theta = nn.Parameter(torch.full((1,), 1e-150, dtype=torch.float64))
    optimizer = kind([theta], lr=LR, **options)
    if "betas" in options:
        optimizer.param_groups[0]["eps"] = 0.0
        optimizer.state[theta] = {
            "step": torch.tensor(1e15, dtype=torch.float64),
            "exp_avg": torch.zeros_like(theta),
            "exp_avg_sq": torch.full_like(theta, ROOT**2),
        }
        curvature *= ROOT
    for _ in range(STEPS):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    return abs(theta.item()) / 1e-150


@pytest.mark.parametrize("name", sorted(CASES))
def test_threshold_parts_convergence_from_divergence(name: str) -> None:
    kind, options = CASES[name]
    threshold = edge_of_stability(kind([nn.Parameter(torch.zeros(1))], lr=LR, **options))
    assert threshold is not None
    # The root -1 moves by at least lr/2 (1 - b) of the change in curvature: 1,000 steps show a share of 1e-2.
    assert _growth(kind, options, threshold * (1 - 1e-2)) < 0.5
    assert _growth(kind, options, threshold * (1 + 1e-2)) > 2


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (torch.optim.SGD, {"lr": 0.1}, 20.0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3}, 380.0),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}, 380 - 0.3),
        (torch.optim.AdamW, {"lr": torch.tensor(0.1), "weight_decay": 0.0}, 380.0),
        (torch.optim.SGD, {"lr": 0.0}, math.inf),
        (torch.optim.Adam, {"lr": 0.0}, math.inf),
    ],
)
def test_values(kind: type[Optimizer], options: dict[str, Any], expected: float) -> None:
    assert edge_of_stability(kind([nn.Parameter(torch.zeros(1))], **options)) == pytest.approx(expected, rel=1e-6)


def test_the_group_with_the_largest_rate_counts() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr, "weight_decay": lr} for lr in (0.1, 0.5, 0.2)]
    assert edge_of_stability(torch.optim.SGD(groups, lr=1.0)) == pytest.approx(2 / 0.5 - 0.5)


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop], ids=lambda k: k.__name__)
def test_none_where_no_formula_is_known(kind: type[Optimizer]) -> None:
    assert edge_of_stability(kind([nn.Parameter(torch.zeros(1))])) is None


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, not float"):
        edge_of_stability(0.1)
