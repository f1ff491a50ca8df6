"""Checkpoints: our own, AdamW's, and what must not be loaded."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import CompressionPlan, PlanError, Rule, SlimAdam, convert_state_dict

PLANS: dict[str, Any] = {
    "none": None,
    "mean": CompressionPlan({"0.weight": Rule((1,), "mean"), "1.weight": Rule((0,), "mean")}),
    "factored": "factored",
}


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()


def _saved(optimizer: torch.optim.Optimizer) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _tensors(state: Any) -> list[Tensor]:
    values = (value.values() if isinstance(value, dict) else value for value in state.values())
    return [tensor for value in values for tensor in ([value] if isinstance(value, Tensor) else value)]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stopped_at", [0, 1, 4])
def test_resumed_training_is_bitwise_the_same(plan: str, dtype: torch.dtype, amsgrad: bool, stopped_at: int) -> None:
    if plan == "factored" and amsgrad:
        amsgrad = False
    options = {"lr": 1e-2, "amsgrad": amsgrad, "plan": PLANS[plan], "bf16_stochastic_round": dtype == torch.bfloat16}
    model = _model(dtype)
    optimizer = SlimAdam(model, **options)
    _train(model, optimizer, range(stopped_at))
    weights, saved = copy.deepcopy(model.state_dict()), _saved(optimizer)
    _train(model, optimizer, range(stopped_at, 8))

    resumed = _model(dtype)
    resumed.load_state_dict(weights)
    resumed_optimizer = SlimAdam(resumed, **options)
    resumed_optimizer.load_state_dict(saved)
    _train(resumed, resumed_optimizer, range(stopped_at, 8))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        for x, y in zip(_tensors(optimizer.state[a]), _tensors(resumed_optimizer.state[b]), strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype


def test_state_dict_carries_plan_and_version_and_copies() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["slimadam"]["format_version"] == 2
    assert CompressionPlan.from_dict(saved["slimadam"]["plan"]) == optimizer.plan
    other = SlimAdam(_model(), plan=CompressionPlan.from_dict(saved["slimadam"]["plan"]))
    other.load_state_dict(saved)
    theirs = {tensor.data_ptr() for state in saved["state"].values() for tensor in _tensors(state)}
    assert all(tensor.data_ptr() not in theirs for state in other.state.values() for tensor in _tensors(state))


@pytest.mark.parametrize("torch_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_loads_adamw_and_averages_by_the_plan(torch_class: Any, dtype: torch.dtype, plan: str) -> None:
    model = _model(dtype)
    adamw = torch_class(model.parameters(), lr=0.02, amsgrad=True)
    _train(model, adamw, range(3))
    if plan == "factored":
        adamw.param_groups[0]["amsgrad"] = False
    optimizer = SlimAdam(model, plan=PLANS[plan])
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["variance_init"] == "zeros"
    for (name, parameter), full in zip(model.named_parameters(), adamw.state.values(), strict=True):
        state = optimizer.state[parameter]
        keys = ("exp_avg_sq",) if plan == "factored" else ("exp_avg_sq", "max_exp_avg_sq")
        for key in keys:
            kept = state[key] if isinstance(state[key], list) else [state[key]]
            for part, dims in zip(kept, optimizer.plan[name].averaged_dims(parameter.dim()), strict=True):
                whole = full[key].float()
                assert part.dtype == torch.float32
                torch.testing.assert_close(part, whole.mean(dims, keepdim=True) if dims else whole)
        assert torch.equal(state["exp_avg"], full["exp_avg"])
        assert state["step"] == 3
    _train(model, optimizer, range(3, 4))


@pytest.mark.parametrize("plan", PLANS)
def test_adamw_loads_what_we_give_it(plan: str) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS[plan], lr=0.02, momentum_dtype=torch.bfloat16)
    _train(model, optimizer, range(3))
    given = optimizer.adamw_state_dict()
    adamw = torch.optim.AdamW(model.parameters())
    adamw.load_state_dict(given)
    assert set(adamw.param_groups[0]) - {"param_names"} == set(torch.optim.AdamW([torch.ones(1)]).param_groups[0])
    assert adamw.param_groups[0]["lr"] == 0.02
    for parameter in model.parameters():
        stored = optimizer.state[parameter]["exp_avg_sq"]
        if isinstance(stored, list):
            stored = stored[0] * stored[1] / stored[0].mean()
        assert adamw.state[parameter]["exp_avg_sq"].shape == parameter.shape
        torch.testing.assert_close(adamw.state[parameter]["exp_avg_sq"], stored.expand(parameter.shape))
        assert adamw.state[parameter]["exp_avg"].dtype == parameter.dtype
    _train(model, adamw, range(3, 4))


def _complain(change: Any, message: str, error: type[Exception] = ValueError) -> Any:
    return pytest.param(change, message, error, id=message[:30])


def _first(saved: Any) -> Any:
    return saved["state"][0]


WRONG_STATES = [
    _complain(lambda s: s["slimadam"].update(format_version=3), "format version 3; this release reads 1 to 2"),
    _complain(lambda s: s["param_groups"].pop(), "different number of parameter groups: 0, the optimizer has 1"),
    _complain(lambda s: s["param_groups"][0]["params"].pop(), "group 0 has 3 parameters, the optimizer's 4"),
    _complain(lambda s: s["param_groups"][0].update(lr=-1.0), "Invalid learning rate: -1.0"),
    _complain(lambda s: _first(s).pop("exp_avg"), r"'0.weight': the state dict lacks \['exp_avg'\]"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(2)), r"exp_avg has shape \(2,\), the parameter \(7, 5\)"),
    _complain(
        lambda s: _first(s).update(exp_avg_sq=torch.ones(1, 5)),
        r"'0.weight': the state dict holds a second moment of shape \(1, 5\).*build the optimizer with the plan",
        PlanError,
    ),
    _complain(
        lambda s: _first(s).update(exp_avg_sq=[torch.ones(7, 1), torch.ones(1, 5)]),
        r"of shape \(7, 1\) and \(1, 5\)",
        PlanError,
    ),
    _complain(lambda s: _first(s).update(step=torch.ones(2)), r"'0.weight': the state dict's step is tensor"),
    _complain(lambda s: _first(s).update(step=-1), r"step is -1; it must be one number >= 0"),
    _complain(lambda s: _first(s).update(exp_avg=[1.0]), r"exp_avg holds float, not a dense tensor"),
    _complain(lambda s: _first(s).update(exp_avg_sq=None), r"exp_avg_sq holds NoneType, not a dense tensor"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(7, 5).to_sparse()), r"exp_avg holds Tensor, not a dense"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(7, 5) * 1j), r"exp_avg is torch.complex64, the parameter"),
    _complain(lambda s: s.update(slimadam=None), r"'slimadam' is None; pass what SlimAdam.state_dict"),
    _complain(lambda s: s.update(state=[]), r"'state' is list; pass an optimizer's"),
    _complain(lambda s: s.pop("param_groups"), r"'param_groups' is NoneType"),
    _complain(lambda s: s["state"].update({0: 1}), r"state of parameter 0 is int, not a dict"),
    _complain(lambda s: s["param_groups"][0].update(amsgrad=True), "has no max_exp_avg_sq; set amsgrad=False"),
]


@pytest.mark.parametrize(("change", "message", "error"), WRONG_STATES)
def test_wrong_state_is_refused_and_nothing_is_changed(change: Any, message: str, error: type[Exception]) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(2))
    before, wrong = _saved(optimizer), _saved(optimizer)
    change(wrong)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)


def test_load_hooks_fire_and_may_replace_the_state() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(2))
    saved, seen = optimizer.state_dict(), []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    assert seen == ["post"]


@pytest.mark.parametrize("new", PLANS)
@pytest.mark.parametrize("old", PLANS)
def test_a_state_dict_converts_to_another_plan(old: str, new: str) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS[old])
    _train(model, optimizer, range(3))
    target = SlimAdam(model, plan=PLANS[new])
    converted = convert_state_dict(optimizer.state_dict(), target.plan)
    target.load_state_dict(converted)
    for name, parameter in model.named_parameters():
        stored = optimizer.state[parameter]["exp_avg_sq"]
        if isinstance(stored, list):
            stored = stored[0] * stored[1] / stored[0].mean()
        kept = target.state[parameter]["exp_avg_sq"]
        kept = kept if isinstance(kept, list) else [kept]
        for part, dims in zip(kept, target.plan[name].averaged_dims(parameter.dim()), strict=True):
            whole = stored.expand(parameter.shape)
            torch.testing.assert_close(part, whole.mean(dims, keepdim=True) if dims else whole)
    _train(model, target, range(3, 5))


def test_conversion_refuses_what_it_cannot_do() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="carries no plan"):
        convert_state_dict(torch.optim.AdamW(model.parameters()).state_dict(), None)
    with pytest.raises(PlanError, match=r"'0.weight': dims=\(5,\) is out of range"):
        convert_state_dict(optimizer.state_dict(), CompressionPlan({"0.weight": Rule((5,), "mean")}))
    full = convert_state_dict(optimizer.state_dict(), None)
    assert full["state"][0]["exp_avg_sq"].shape == (7, 5)
    assert CompressionPlan.from_dict(full["slimadam"]["plan"]).second_moments_saved == 0


FIXTURE = Path(__file__).parent / "fixtures" / "state_dict_0_1_0.pt"


def test_state_saved_by_release_0_1_0_still_loads() -> None:
    """Written by tests/fixtures/write.py; later releases must load it and train on to the same weights."""
    saved = torch.load(FIXTURE, weights_only=True)
    for plan, case in saved.items():
        model = _model()
        model.load_state_dict(case["weights"])
        optimizer = SlimAdam(model, plan=CompressionPlan.from_dict(case["optimizer"]["slimadam"]["plan"]))
        optimizer.load_state_dict(case["optimizer"])
        _train(model, optimizer, range(3, 6))
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, case["weights_3_steps_later"][name], rtol=1e-5, atol=1e-6, msg=plan)


def test_killed_at_20_random_steps_training_ends_bitwise_the_same() -> None:
    script = Path(__file__).parent / "scripts" / "killed_and_resumed.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "20 kills, bitwise equal" in done.stdout


def test_converting_to_what_is_stored_alike_changes_no_tensor() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan="factored")
    _train(model, optimizer, range(5))
    saved = optimizer.state_dict()
    alike = CompressionPlan({key: Rule(rule.dims, rule.form, rule.shape) for key, rule in optimizer.plan.items()})
    converted = convert_state_dict(saved, alike)["state"]
    for index, state in saved["state"].items():
        for before, after in zip(_tensors(state), _tensors(converted[index]), strict=True):
            assert torch.equal(before, after)
