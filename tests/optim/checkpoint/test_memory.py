"""What loading, deciding and expanding hold at most: one parameter's moments more than what comes of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peak.meters import Peak, meter_of
from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, convert_state_dict
from slimadam.optim.checkpoint import loading
from tests.versions import ON_CUDA

SHAPES = ((600, 1024), (2048, 1024), (600, 1024), (600, 1024), (600, 1024))
MOMENTS = 8 * 2048 * 1024 + 4
"""Bytes of both of the largest parameter's, and of its step count."""
AUTO = AutoPlan(calibration_steps=2, cutoff=0.0)
NAMES = [str(index) for index in range(len(SHAPES))]
PLANS: dict[str, dict[str, Any]] = {
    "plan=None": {"plan": None},
    "mean": {"plan": CompressionPlan({name: Rule((1,), "mean") for name in NAMES})},
    "factored": {"plan": "factored"},
    "codes": {"plan": CompressionPlan({name: Rule(form="float8") for name in NAMES})},
    "auto": {"plan": AUTO},
    "factored, int8 momentum": {"plan": "factored", "momentum_dtype": "int8"},
}
on_each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=ON_CUDA,
        ),
    ],
)


def _params(device: str = "cpu") -> nn.ParameterList:
    torch.manual_seed(3)
    params = nn.ParameterList(nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES)
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def _steps(optimizer: torch.optim.Optimizer, count: int = 2) -> torch.optim.Optimizer:
    for _ in range(count):
        optimizer.step()
    return optimizer


def _assert_equal(one: SlimAdam, other: SlimAdam) -> None:
    for group, its in zip(one.param_groups, other.param_groups, strict=True):
        for param, its_param in zip(group["params"], its["params"], strict=True):
            state, its_state = one.state[param], other.state[its_param]
            assert list(state) == list(its_state)
            assert all(torch.equal(state[key], its_state[key]) for key in state)


@on_each_device
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_loading_holds_one_parameters_moments_more_than_its_result(options: dict[str, Any], device: str) -> None:
    meter = meter_of(device)
    with meter.running():
        params = _params(device)
        saved = _steps(torch.optim.AdamW(params)).state_dict()
        fresh, used = (SlimAdam(params, **options) for _ in range(2))
        with meter.phase("fresh"):
            fresh.load_state_dict(saved)
        _steps(used, 1)
        with meter.phase("over a state"):
            used.load_state_dict(saved)
        own = _steps(used, 3).state_dict()
        _steps(fresh, 3)
        with meter.phase("its own"):
            fresh.load_state_dict(own)
    assert {name: peak.beyond for name, peak in meter.peaks().items() if peak.beyond > MOMENTS} == {}
    _assert_equal(fresh, used)


@on_each_device
def test_a_decision_and_expanding_hold_less_than_one_parameters_moments(device: str) -> None:
    meter = meter_of(device)
    with meter.running():
        params = _params(device)
        optimizer = SlimAdam(params, plan=AutoPlan(calibration_steps=4, cutoff=0.0), monitor=False)
        _steps(optimizer, 1)
        with meter.phase("measurement"):
            optimizer.step()
        optimizer.step()
        with meter.phase("decision"):
            optimizer.step()
        with meter.phase("expand"):
            optimizer.expand("1")
        own = optimizer.state_dict()
        with meter.phase("convert"):
            full = convert_state_dict(own, None)
    measured, decision, expanded, converted = meter.peaks().values()
    shrunk = sum(4 * param.numel() for param in params) - sum(3 * sum(shape) * 4 for shape in SHAPES)
    assert decision.before - decision.after > shrunk
    grown = 4 * 2048 * 1024
    assert grown * 0.99 < expanded.after - expanded.before <= grown
    assert decision.beyond <= measured.beyond + MOMENTS
    assert converted.beyond <= MOMENTS
    if device == "cpu":
        assert decision.beyond <= MOMENTS
        assert expanded.beyond < grown
    assert full["state"][0]["exp_avg_sq"].shape == SHAPES[0]


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_loading_over_a_state_is_loading(options: dict[str, Any]) -> None:
    params = _params()
    saved = _steps(torch.optim.AdamW(params), 3).state_dict()
    fresh, used = SlimAdam(params, **options), SlimAdam(params, **options)
    _steps(used, 1)
    for optimizer in (fresh, used):
        optimizer.load_state_dict(saved)
    _assert_equal(fresh, used)
    assert list(used.state) == list(params)


def test_a_state_dict_of_the_optimizer_itself_is_copied() -> None:
    optimizer = SlimAdam(_params(), plan="factored")
    own = _steps(optimizer).state_dict()
    before = copy.deepcopy(own)
    optimizer.load_state_dict(own)
    _steps(optimizer)
    torch.testing.assert_close(own["state"], before["state"], rtol=0, atol=0)
    optimizer.load_state_dict(own)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


class _FailsAt:
    """Stands for the loading of one parameter, and runs out of memory at one of them."""

    def __init__(self, index: int) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._index, self._load = index, loading._loaded_moments

    def __call__(self, slot: Any, saved: Any) -> dict[str, Any]:
        self.shapes.append(slot.shape)
        if len(self.shapes) > self._index:
            raise MemoryError
        return self._load(slot, saved)


def _state_of(optimizer: SlimAdam) -> dict[Any, dict[str, Tensor]]:
    return {param: dict(state) for param, state in optimizer.state.items()}


def test_what_does_not_fit_fails_at_the_largest_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = _params()
    saved = _steps(torch.optim.AdamW(params), 3).state_dict()
    optimizer = SlimAdam(params, plan="factored", lr=0.01)
    _steps(optimizer)
    before, fails = _state_of(optimizer), _FailsAt(0)
    monkeypatch.setattr(loading, "_loaded_moments", fails)
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(saved)
    assert fails.shapes == [(2048, 1024)]
    assert list(optimizer.state) == list(before)
    for param, state in before.items():
        assert all(optimizer.state[param][key] is value for key, value in state.items())
    assert optimizer.param_groups[0]["lr"] == 0.01
    _steps(optimizer)
    assert optimizer.state[params[0]]["step"] == 4


@pytest.mark.parametrize("other", ["measuring", "shares", "lacks"])
def test_a_state_of_another_form_or_shared_is_there_until_all_is_loaded(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = _params()
    optimizer = SlimAdam(params, plan=AutoPlan(calibration_steps=2 if other == "shares" else 9, cutoff=0.0))
    _steps(optimizer)
    decided = SlimAdam(params, plan=AUTO)
    saved = (optimizer if other == "shares" else _steps(decided)).state_dict()
    if other == "lacks":
        del optimizer.state[params[2]]
    before = _state_of(optimizer)
    monkeypatch.setattr(loading, "_loaded_moments", _FailsAt(4))
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(saved)
    for param, state in before.items():
        assert all(optimizer.state[param][key] is value for key, value in state.items())


def test_an_interruption_leaves_every_parameter_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    params = _params()
    saved = _steps(torch.optim.AdamW(params), 5).state_dict()
    optimizer = SlimAdam(params, plan="factored")
    _steps(optimizer)
    monkeypatch.setattr(loading, "_loaded_moments", _FailsAt(2))
    with pytest.raises(MemoryError):
        optimizer.load_state_dict(saved)
    assert [int(optimizer.state[param]["step"]) for param in params] == [5, 5, 2, 2, 2]
    _steps(optimizer)


def test_entries_of_users_that_cannot_be_copied_change_nothing() -> None:
    optimizer = SlimAdam(_params(), plan="factored")
    saved = _steps(optimizer).state_dict()
    saved = {**copy.deepcopy(saved), "state": {**copy.deepcopy(saved["state"])}}
    saved["state"][4]["mine"] = (entry for entry in ())
    before = _state_of(optimizer)
    with pytest.raises(TypeError, match="generator"):
        optimizer.load_state_dict(saved)
    for param, state in before.items():
        assert all(optimizer.state[param][key] is value for key, value in state.items())


def test_a_peak_is_beyond_what_was_there_and_what_is_left() -> None:
    assert Peak(5, 9, 7).beyond == 2
    assert Peak(8, 9, 7).beyond == 1
