"""``variance_init="gradient"`` (GI-Adam) in every implementation, form and precision of first moments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.correctness.gradient_initialised import FORMS, IMPLEMENTATIONS, running
from slimadam import CompressionPlan, Rule, SlimAdam
from tests.reference import Array, gradients, slim_adamw_float64

STEPS = 5
HYPER: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "variance_init": "gradient",
}


def optimizer_of(implementation: str, rules: tuple[Rule, ...], param: torch.Tensor, **options: Any) -> SlimAdam:
    plan = CompressionPlan({f"w[{rule.part.label}]" if rule.part else "w": rule for rule in rules})
    optimizer = SlimAdam([("w", param)], plan=plan, **HYPER, **IMPLEMENTATIONS[implementation], **options)
    if "momentum_dtype" not in options:
        assert optimizer.backend("w") == implementation
    return optimizer


def by_formula(start: Array, grads: list[Array], rules: tuple[Rule, ...]) -> Array:
    expected = start.copy()
    for rule in rules:

        def piece(whole: Array, rule: Rule = rule) -> Array:
            return rule.take(torch.from_numpy(whole)).numpy()

        dims = "factored" if rule.form == "factored" else rule.dims
        piece(expected)[...] = slim_adamw_float64(piece(start).copy(), [piece(grad) for grad in grads], dims, **HYPER)
    return expected


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> Any:
    if request.param == "triton":
        request.getfixturevalue("on_triton")
    with running(request.param):
        yield request.param


@pytest.fixture
def where(request: pytest.FixtureRequest, device: str) -> str:
    """The device of its tensors."""
    return device if request.node.callspec.params["implementation"] == "triton" else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", list(FORMS))
def test_the_first_five_steps_are_the_formulas(implementation: str, where: str, form: str, dtype: torch.dtype) -> None:
    shape, rules = FORMS[form]
    start = (1e-3 * torch.randn(shape)).to(dtype)
    grads = [grad.to(dtype) for grad in gradients(shape, STEPS)]
    param = start.clone().to(where).requires_grad_()
    optimizer = optimizer_of(implementation, rules, param)
    for step, grad in enumerate(grads, start=1):
        param.grad = grad.clone().to(where)
        optimizer.step()
        doubles = [grad.double().numpy() for grad in grads[:step]]
        expected = by_formula(start.double().numpy(), doubles, rules)
        moved = np.abs(expected - start.double().numpy()).max()
        # 1e-6 of the way in float32, where it is 16 roundings; nine digits fewer than float64 has.
        allowed = (1e-6 if dtype == torch.float32 else 1e-14) * (moved + np.abs(expected).max())
        assert np.abs(param.detach().double().cpu().numpy() - expected).max() <= allowed, step


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16, "int8"])
@pytest.mark.parametrize("form", ["full", "mean over columns", "factored", "parts"])
def test_first_moments_in_any_precision(implementation: str, where: str, form: str, momentum_dtype: Any) -> None:
    shape, rules = FORMS[form]
    start = 1e-3 * torch.randn(shape)
    grads = [grad.float() for grad in gradients(shape, STEPS)]
    param = start.clone().to(where).requires_grad_()
    optimizer = optimizer_of(implementation, rules, param, momentum_dtype=momentum_dtype)
    for grad in grads:
        param.grad = grad.clone().to(where)
        optimizer.step()
    expected = by_formula(start.double().numpy(), [grad.double().numpy() for grad in grads], rules)
    error = np.abs(param.detach().double().cpu().numpy() - expected)
    path = np.abs(expected - start.double().numpy()).max() + STEPS * HYPER["lr"] * math.sqrt(1 - HYPER["betas"][1])
    # bfloat16 keeps 8 bits, which Triton's interpreter cuts off; int8 codes are 1/127 apart on a square-root scale.
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, "int8": 2 / 127}[momentum_dtype]
    assert error.max() <= rounding * STEPS * path


def test_the_first_update_is_the_root_of_1_minus_beta2_of_adams(implementation: str, where: str) -> None:
    shape, rules = FORMS["full"]
    (grad,) = gradients(shape, 1)
    moved = {}
    for variance_init in ("zeros", "gradient"):
        param = torch.zeros(shape, dtype=torch.float64, device=where, requires_grad=True)
        optimizer = optimizer_of(implementation, rules, param)
        optimizer.param_groups[0].update(variance_init=variance_init, eps=1e-30, weight_decay=0.0)
        param.grad = grad.clone().to(where)
        optimizer.step()
        moved[variance_init] = param.detach().cpu()
    torch.testing.assert_close(moved["zeros"], -HYPER["lr"] * grad.sign(), rtol=1e-12, atol=0)
    torch.testing.assert_close(moved["gradient"], math.sqrt(1 - 0.999) * moved["zeros"], rtol=1e-12, atol=0)


def test_critical_learning_rate_grows_as_much() -> None:
    """Along the same direction the step may be ``1 / sqrt(1 - beta2)`` times as large."""
    from slimadam import critical_lr

    rates = []
    for variance_init in ("zeros", "gradient"):
        param = torch.linspace(-1, 2, 8, dtype=torch.float64).requires_grad_()
        optimizer = SlimAdam([param], plan=None, eps=0.0, weight_decay=0.0, variance_init=variance_init)

        def loss(param: torch.Tensor = param) -> torch.Tensor:
            return (param**2).sum()

        loss().backward()
        rates.append(critical_lr(optimizer, loss))
    assert rates[1] / rates[0] == pytest.approx(1000**0.5, rel=1 / 15)
