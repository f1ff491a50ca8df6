"""The step of zero by which torch makes state for a checkpoint is no step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam

PLANS: dict[str, Any] = {
    "none": None,
    "mean": CompressionPlan({"weight": Rule((0,), "mean")}),
    "factored": "factored",
    "auto": AutoPlan(calibration_steps=2, measurements=2, cutoff=0.1),
    "auto, at once": AutoPlan(calibration_steps=1, measurements=1, cutoff=0.1),
}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("variance_init", ["zeros", "gradient"])
@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_training_goes_on_as_if_it_had_not_been(plan: str, is_saved: bool, variance_init: str) -> None:
    model = nn.Linear(5, 7)
    untouched = copy.deepcopy(model)
    options = {"plan": PLANS[plan], "variance_init": variance_init, "lr": 1e-2}
    optimizer, expected = SlimAdam(model, **options), SlimAdam(untouched, **options)
    blank = get_optimizer_state_dict(model, optimizer)
    assert all(state["step"] == 0 for state in blank["state"].values())
    if is_saved:
        optimizer = SlimAdam(model, **options)
        set_optimizer_state_dict(model, optimizer, blank)
        again = get_optimizer_state_dict(model, optimizer)["state"]
        assert {name: state.keys() for name, state in again.items()} == {
            name: state.keys() for name, state in blank["state"].items()
        }
    _train(model, optimizer)
    _train(untouched, expected)
    assert optimizer.plan == expected.plan
    for param, other in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(param, other)
        assert optimizer.state[param]["step"] == 4


@pytest.mark.parametrize("copied", [False, True])
def test_state_loaded_in_place_is_kept(copied: bool) -> None:
    model = nn.Linear(5, 7)
    optimizer = SlimAdam(model, plan=None)
    saved = get_optimizer_state_dict(model, optimizer)
    for state in saved["state"].values():
        for tensor in state.values():
            tensor.fill_(3.0)
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    _train(model, optimizer, 1)
    assert all(optimizer.state[param]["step"] == 4 for param in model.parameters())


def test_a_pending_direction_starts_from_its_gradient() -> None:
    model = nn.Linear(5, 7)
    asked, other = (SlimAdam(model, plan="factored", variance_init="gradient") for _ in range(2))
    get_optimizer_state_dict(model, asked)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    for (_, one), (_, expected) in zip(asked.update_direction(), other.update_direction(), strict=True):
        assert torch.equal(one, expected)


def test_entries_of_others_in_the_state_are_left_alone() -> None:
    model = nn.Linear(5, 7)
    optimizer = SlimAdam(model, plan=None)
    get_optimizer_state_dict(model, optimizer)
    optimizer.state["of a hook"] = {"count": 1}  # type: ignore[index]
    _train(model, optimizer, 1)
    assert optimizer.state["of a hook"] == {"count": 1}  # type: ignore[index]


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_warmup_from_zero_is_counted_as_adamw_does(lr: Any, scale: float) -> None:
    """Zero gradients count once there is state, and a rate of zero with other gradients from the first step."""
    model = nn.Linear(5, 7)
    other = copy.deepcopy(model)
    ours, theirs = SlimAdam(model, lr=copy.deepcopy(lr), plan=None), torch.optim.AdamW(other.parameters(), lr=lr)
    for factor in (1.0, scale, 1.0):
        for one, optimizer in ((model, ours), (other, theirs)):
            for param in one.parameters():
                param.grad = factor * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
            optimizer.step()
    for param, twin in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.state[param]["step"], theirs.state[twin]["step"])
        torch.testing.assert_close(ours.state[param]["exp_avg_sq"], theirs.state[twin]["exp_avg_sq"])
