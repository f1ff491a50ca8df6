"""Second moments in one byte for each element."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, convert_state_dict
from slimadam.kernels import float8
from slimadam.utils.errors import PlanError
from tests.reference import gradients

PLAN = CompressionPlan({"w": Rule(form="float8")})
BACKENDS: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "reference": {"foreach": False}}


def _all_numbers() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what the codes stand for, in order, from the words of the module alone."""
    powers = 2.0 ** np.arange(-64, 63)
    return np.concatenate([[0.0], np.stack([powers, 1.5 * powers], 1).ravel(), [math.inf]])


def _optimizer(param: nn.Parameter, **options: Any) -> SlimAdam:
    return SlimAdam([("w", param)], **{"plan": PLAN, "lr": 1e-2, "betas": (0.9, 0.95), **options})


def _steps(param: nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()


def test_codes_stand_for_these_numbers() -> None:
    codes = torch.arange(256).to(torch.uint8)
    np.testing.assert_array_equal(float8.decode(codes).numpy(), _all_numbers())


def test_numbers_that_are_codes_are_kept_exactly() -> None:
    codes = torch.arange(256).to(torch.uint8)
    for step in range(1, 20):
        again = float8.encode(float8.decode(codes), torch.randn(256), torch.tensor(float(step)))
        assert torch.equal(again, codes)


@pytest.mark.parametrize("value", [3e-9, 1.0001, 1.2, 1.49, 1.9, 7.7e6])
def test_rounding_is_to_a_neighbour_and_right_on_average(value: float) -> None:
    numbers, count = _all_numbers(), 200_000
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(count, generator=generator)
    found = float8.decode(float8.encode(torch.full((count,), value), param, torch.tensor(3.0))).double()
    lower, upper = numbers[numbers <= value].max(), numbers[numbers >= value].min()
    assert set(found.tolist()) <= {lower, upper}
    chance = (value - lower) / (upper - lower)
    # The upper half of a float32 has about 3,000 values among so many normal numbers, each with one draw for all.
    deviation = (upper - lower) * math.sqrt(chance * (1 - chance) / 3000)
    assert abs(found.mean().item() - value) < 5 * deviation


def test_rounding_without_a_gradient_is_right_on_average_over_steps() -> None:
    steps, value = 20_000, torch.tensor([1.2])
    none = torch.zeros(1)
    codes = [float8.encode(value, none, torch.tensor(float(step))) for step in range(steps)]
    mean = float8.decode(torch.cat(codes)).double().mean().item()
    assert abs(mean - 1.2) < 5 * 0.5 * math.sqrt(0.4 * 0.6 / steps)


def test_what_is_out_of_range_stays_a_number_of_the_same_kind() -> None:
    values = torch.tensor([0.0, 1e-45, 1e-30, 1e30, math.inf, math.nan])
    found = float8.decode(float8.encode(values, torch.ones(6), torch.tensor(1.0)))
    assert found.tolist() == [0.0, 2.0**-64, 2.0**-64, 1.5 * 2.0**62, math.inf, math.inf]


def test_a_parameter_that_differs_in_its_last_bits_rounds_alike() -> None:
    param = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    value = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
    one, other = (float8.encode(value, given, torch.tensor(5.0)) for given in (param, param * (1 + 2**-23)))
    assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_that_of_adamw_from_the_stored_moments(backend: str, dtype: torch.dtype) -> None:
    """Rounding touches what is stored, never the update."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(33, 17, generator=generator, dtype=torch.float64).to(dtype)
    param = nn.Parameter(start.clone())
    optimizer = _optimizer(param, weight_decay=0.1, maximize=True, **BACKENDS[backend])
    grads = gradients((33, 17), 6)
    _steps(param, optimizer, grads[:5])
    before = optimizer.state[param]
    twin = nn.Parameter(param.detach().double())
    adamw = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, maximize=True)
    moments = {
        "step": before["step"].clone(),
        "exp_avg": before["exp_avg"].double(),
        "exp_avg_sq": float8.decode(before["exp_avg_sq_codes"]).double(),
    }
    adamw.load_state_dict({"state": {0: moments}, "param_groups": adamw.state_dict()["param_groups"]})
    _steps(param, optimizer, grads[5:])
    _steps(twin, adamw, [grads[5].to(dtype)])
    # One rounding of the parameter, and of the first moment in its precision; all else is float32 or finer.
    epsilon = max(torch.finfo(dtype).eps, 2.0**-40)
    torch.testing.assert_close(param.double(), twin, rtol=2 * epsilon, atol=4 * epsilon)


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_the_stored_moment_follows_the_true_one_without_bias(beta2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(64, 128))
    optimizer = _optimizer(param, betas=(0.9, beta2), foreach=False)
    true = np.zeros((64, 128))
    ratios = []
    for step in range(1, 301):
        grad = torch.randn(64, 128, generator=generator) * 1e-3
        _steps(param, optimizer, [grad])
        true = beta2 * true + (1 - beta2) * grad.double().numpy() ** 2
        if step > 200:
            stored = float8.decode(optimizer.state[param]["exp_avg_sq_codes"]).double().numpy()
            ratios.append(stored.mean() / true.mean())
    # 8192 elements of a relative deviation of at most 0.5 each, averaged over correlated steps.
    assert abs(np.mean(ratios) - 1) < 5 * 0.5 / math.sqrt(8192)
    assert 0.2 < np.std(stored / true) < 0.6  # an SNR of about 5


def test_updates_grow_while_gradients_fall_and_come_back() -> None:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(64, 64, generator=generator))
    twin = nn.Parameter(param.detach().clone())
    optimizer = _optimizer(param, lr=1e-3, weight_decay=0.0)
    adamw = torch.optim.AdamW([twin], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    ratios = []
    for step in range(500):
        grad = torch.randn(64, 64, generator=generator) * (1.0 if step < 200 else 1e-2)
        before = param.detach().clone(), twin.detach().clone()
        _steps(param, optimizer, [grad])
        _steps(twin, adamw, [grad])
        moved, expected = (one.detach() - old for one, old in zip((param, twin), before, strict=True))
        ratios.append((moved.norm() / expected.norm()).item())
    assert 1.0 < np.mean(ratios[100:200]) < 1.1
    assert 1.5 < max(ratios[200:]) < 2.5
    assert 1.0 < np.mean(ratios[-50:]) < 1.1


def test_equal_gradients_are_rounded_apart() -> None:
    """A whole matrix with gradients of one value does not drift together."""
    param = nn.Parameter(torch.randn(200, 200, generator=torch.Generator().manual_seed(0)))
    optimizer = _optimizer(param, betas=(0.9, 0.999), foreach=False, lr=1e-4)
    _steps(param, optimizer, [torch.ones(200, 200)] * 400)
    stored = float8.decode(optimizer.state[param]["exp_avg_sq_codes"]).double()
    # Elements deviate by less than a half, and about 3,000 kinds of them each on its own.
    assert abs(stored.mean().item() / (1 - 0.999**400) - 1) < 5 * 0.5 / math.sqrt(3000)


def test_large_matrices_are_rounded_in_blocks_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    value, param = (torch.rand(3, 401, 127, generator=generator) for _ in range(2))
    whole = float8._encode(value, param, torch.tensor(7.0))
    assert torch.equal(float8.encode(value, param, torch.tensor(7.0)), whole)
    flat = [tensor.reshape(1, -1) for tensor in (value, param)]
    assert torch.equal(float8.encode(*flat, torch.tensor(7.0)), whole.reshape(1, -1))


def test_saves_three_of_four_bytes_and_says_so() -> None:
    param = nn.Parameter(torch.randn(50, 40))
    optimizer = _optimizer(param)
    _steps(param, optimizer, gradients((50, 40), 1))
    state = optimizer.state[param]
    assert state["exp_avg_sq_codes"].dtype == torch.uint8
    assert optimizer.memory().exp_avg_sq == state["exp_avg_sq_codes"].nbytes == 2000
    assert optimizer.memory().second_moments_saved == optimizer.plan.second_moments_saved == 0.75


@pytest.mark.parametrize("options", [{}, {"momentum_dtype": "int8"}, {"variance_init": "gradient"}], ids=str)
def test_resumes_to_the_last_bit(options: dict[str, Any]) -> None:
    grads = gradients((33, 17), 12)
    param = nn.Parameter(torch.randn(33, 17))
    optimizer = _optimizer(param, **options)
    _steps(param, optimizer, grads[:7])
    resumed = nn.Parameter(param.detach().clone())
    other = _optimizer(resumed, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _steps(param, optimizer, grads[7:])
    _steps(resumed, other, grads[7:])
    assert torch.equal(param, resumed)
    assert torch.equal(optimizer.state[param]["exp_avg_sq_codes"], other.state[resumed]["exp_avg_sq_codes"])


def test_takes_over_adamws_state_and_gives_it_back() -> None:
    grads = gradients((33, 17), 5)
    param = nn.Parameter(torch.randn(33, 17))
    adamw = torch.optim.AdamW([param], betas=(0.9, 0.95))
    _steps(param, adamw, grads)
    optimizer = _optimizer(param)
    optimizer.load_state_dict(adamw.state_dict())
    full = adamw.state[param]["exp_avg_sq"]
    given = optimizer.adamw_state_dict()["state"][0]["exp_avg_sq"]
    assert ((given / full >= 2 / 3) & (given / full <= 3 / 2)).all()
    optimizer.expand("w")
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], given)


def test_a_checkpoint_in_codes_is_refused_under_another_plan_and_can_be_converted() -> None:
    param = nn.Parameter(torch.randn(33, 17))
    optimizer = _optimizer(param)
    _steps(param, optimizer, gradients((33, 17), 3))
    saved = optimizer.state_dict()
    for plan in (None, "factored"):
        other = _optimizer(param, plan=plan)
        with pytest.raises(PlanError, match=r"in codes.*convert_state_dict"):
            other.load_state_dict(saved)
        other.load_state_dict(convert_state_dict(saved, other.plan))
        assert other.state[param]["step"] == 3


@pytest.mark.parametrize("option", ["amsgrad", "differentiable"])
def test_options_without_codes_are_refused_and_auto_goes_without(option: str) -> None:
    param = nn.Parameter(torch.randn(8, 6))
    with pytest.raises(PlanError, match=f"{option}=True has no form='float8'"):
        _optimizer(param, **{option: True})
    optimizer = _optimizer(param)
    optimizer.param_groups[0][option] = True  # as a schedule of one's own may do, before and after the first step
    for _ in range(2):
        param.grad = torch.ones(8, 6)
        with pytest.raises(PlanError, match=f"{option}=True has no form='float8'"):
            optimizer.step()
        optimizer.param_groups[0][option] = False
        optimizer.step()
        optimizer.param_groups[0][option] = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bool, torch.float64], ids=str)
def test_codes_of_another_precision_are_refused(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.randn(8, 6))
    optimizer = _optimizer(param)
    _steps(param, optimizer, gradients((8, 6), 2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg_sq_codes"] = saved["state"][0]["exp_avg_sq_codes"].to(dtype)
    with pytest.raises(ValueError, match=r"exp_avg_sq_codes is torch\..*, its codes must be torch.uint8"):
        _optimizer(param).load_state_dict(saved)


def test_a_float64_direction_is_computed_in_float64() -> None:
    param = nn.Parameter(torch.randn(8, 6, dtype=torch.float64))
    optimizer = _optimizer(param, eps=1e-30, weight_decay=0.0)
    param.grad = torch.full_like(param, 1e-25)
    before = param.detach().clone()
    (direction,) = (update for *_, update in optimizer.updates_without_decay())
    optimizer.step()
    torch.testing.assert_close(before - 1e-2 * direction, param.detach(), rtol=1e-12, atol=1e-12)


def test_complex_parameters_are_refused_and_auto_keeps_them_in_full() -> None:
    param = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))
    with pytest.raises(PlanError, match="the parameter is complex"):
        _optimizer(param)
    optimizer = _optimizer(param, plan=AutoPlan(calibration_steps=2, cutoff=1e6))
    _steps(param, optimizer, [torch.randn(8, 6, dtype=torch.complex64) for _ in range(3)])
    assert optimizer.plan["w"].form == "full"
    assert "complex" in optimizer.plan["w"].reason


def test_auto_shrinks_its_moments_to_codes() -> None:
    param = nn.Parameter(torch.randn(33, 17))
    optimizer = _optimizer(param, plan=AutoPlan(calibration_steps=3, cutoff=1e6))
    grads = gradients((33, 17), 6)
    _steps(param, optimizer, grads[:2])
    full = optimizer.state[param]["exp_avg_sq"].clone()
    _steps(param, optimizer, grads[2:3])
    full = 0.95 * full + 0.05 * grads[2].float() ** 2
    ratio = float8.decode(optimizer.state[param]["exp_avg_sq_codes"]) / full
    assert ((ratio > 0.66) & (ratio < 1.51)).all()
    _steps(param, optimizer, grads[3:])
    assert optimizer.plan["w"].form == "float8"
    assert "one byte for each element" in optimizer.plan["w"].reason


def test_reset_and_resized_parameters_keep_the_codes_of_what_stays() -> None:
    param = nn.Parameter(torch.randn(10, 6))
    optimizer = _optimizer(param)
    _steps(param, optimizer, gradients((10, 6), 3))
    codes = optimizer.state[param]["exp_avg_sq_codes"].clone()
    optimizer.reset_state(param, index=[2], dim=0)
    assert not optimizer.state[param]["exp_avg_sq_codes"][2].any()
    assert torch.equal(optimizer.state[param]["exp_avg_sq_codes"][3:], codes[3:])
    new = nn.Parameter(torch.randn(7, 6))
    optimizer.replace_param(param, new, keep=[0, 4, 9], added=4)
    resized = optimizer.state[new]["exp_avg_sq_codes"]
    assert torch.equal(resized[:3], codes[[0, 4, 9]])
    assert resized.dtype == torch.uint8
    assert not resized[3:].any()


def test_the_pending_direction_is_the_step() -> None:
    param = nn.Parameter(torch.randn(33, 17))
    optimizer = _optimizer(param, weight_decay=0.0)
    grads = gradients((33, 17), 4)
    _steps(param, optimizer, grads[:3])
    param.grad = grads[3].float()
    before = param.detach().clone()
    (direction,) = (update for _, _, update in optimizer.updates_without_decay())
    optimizer.step()
    torch.testing.assert_close(before - 1e-2 * direction, param.detach(), rtol=1e-6, atol=1e-6)
