"""Compressed second moments against float64 numpy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimadam import CompressionPlan, PlanError, Rule, SlimAdam
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.kernels.reference import reference_update
from slimadam.state.rule import dimension_subsets
from tests.reference import gradients, second_moments, slim_adamw_float64, train

STEPS = 12
SHAPES = [(9,), (7, 5), (1, 6), (33, 1), (3, 5, 4), (2, 3, 4, 5)]
CASES = [(shape, dims) for shape in SHAPES for dims in dimension_subsets(len(shape))]
FACTORED = [(shape, "factored") for shape in SHAPES if len(shape) > 1]
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}, {"capturable": True}, {}]
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def _rule(dims: tuple[int, ...] | str) -> Rule:
    return Rule(form="factored") if dims == "factored" else Rule(dims, "mean")


def _agree(
    shape: tuple[int, ...], dims: tuple[int, ...] | str, implementation: dict[str, Any], options: dict[str, Any]
) -> SlimAdam:
    """12 float32 steps agree with float64 to 2e-5; the state holds what the rule says and no more."""
    start = torch.randn(shape)
    grads = gradients(shape, STEPS)
    plan = CompressionPlan({"w": _rule(dims)})
    (ours,), optimizer = train(
        [start], lambda p: SlimAdam([("w", p[0])], plan=plan, **options, **implementation), [[g] for g in grads]
    )
    assert isinstance(optimizer, SlimAdam)
    singles = [grad.float().double().numpy() for grad in grads]
    expected = slim_adamw_float64(start.double().numpy(), singles, dims, **options)
    np.testing.assert_allclose(ours.detach().double().numpy(), expected, rtol=2e-5, atol=2e-5)
    parts = second_moments(optimizer.state[ours])
    assert [tuple(part.shape) for part in parts] == list(_rule(dims).state_shapes(shape))
    assert all(part.dtype == torch.float32 for part in parts)
    return optimizer


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(("shape", "dims"), CASES + FACTORED, ids=str)
def test_agrees_with_float64(shape: tuple[int, ...], dims: Any, implementation: dict[str, Any]) -> None:
    optimizer = _agree(shape, dims, implementation, OPTIONS)
    assert optimizer.memory().exp_avg_sq == 4 * _rule(dims).stored_elements(shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize(
    "extra",
    [{"amsgrad": True}, {"maximize": True}, {"variance_init": "gradient"}, {"amsgrad": True, "maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), "factored"], ids=str)
def test_options_agree_with_float64(dims: Any, extra: dict[str, Any], implementation: dict[str, Any]) -> None:
    if dims == "factored":
        extra = {**extra, "amsgrad": False}
    _agree((7, 5), dims, implementation, {**OPTIONS, **extra})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=5), data=st.data())
def test_any_shape_agrees_with_float64(shape: list[int], data: st.DataObject) -> None:
    candidates = [*dimension_subsets(len(shape)), *(["factored"] if len(shape) > 1 else [])]
    dims = data.draw(st.sampled_from(candidates))
    _agree(tuple(shape), dims, {}, OPTIONS)


@pytest.mark.parametrize("dims", [(), (0,), (1, 2, 3), (0, 2, 3), (1,), "factored"], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_channels_last_equals_contiguous(dims: Any, amsgrad: bool) -> None:
    amsgrad = amsgrad and dims != "factored"
    start, grads = torch.randn(4, 3, 5, 2), gradients((4, 3, 5, 2), 4)
    plan = CompressionPlan({"w": _rule(dims) if dims else Rule()})
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = start.clone().contiguous(memory_format=memory_format).requires_grad_()
        optimizer = SlimAdam([("w", param)], plan=plan, amsgrad=amsgrad, **OPTIONS)
        for grad in grads:
            param.grad = grad.float().contiguous(memory_format=memory_format)
            optimizer.step()
        results.append(param.detach().contiguous())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_gradient_laid_out_differently_still_agrees() -> None:
    start, grad = torch.randn(6, 4), torch.randn(4, 6).t()
    param = start.clone().requires_grad_()
    param.grad = grad
    SlimAdam([("w", param)], plan=CompressionPlan({"w": Rule((1,), "mean")}), **OPTIONS).step()
    expected = slim_adamw_float64(start.double().numpy(), [grad.double().numpy()], (1,), **OPTIONS)
    np.testing.assert_allclose(param.detach().numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), "factored"], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_default_equals_reference_in_every_dtype(
    dims: Any, dtype: torch.dtype, momentum_dtype: torch.dtype | None
) -> None:
    start, grads = torch.randn(9, 6).to(dtype), [[grad] for grad in gradients((9, 6), 6)]
    plan = CompressionPlan({"w": _rule(dims)})
    both = [
        train(
            [start],
            lambda p, extra=extra: SlimAdam(
                [("w", p[0])], plan=plan, momentum_dtype=momentum_dtype, **OPTIONS, **extra
            ),
            grads,
        )
        for extra in ({}, {"foreach": False})
    ]
    for values, optimizer in both:
        assert optimizer.state[values[0]]["exp_avg"].dtype == (momentum_dtype or dtype)
    # Each step may round differently by one ulp of the values involved (up to 4).
    atol = 6 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(both[0][0][0], both[1][0][0], rtol=0, atol=atol)


def test_factored_amsgrad_is_refused() -> None:
    param = torch.randn(4, 3).requires_grad_()
    with pytest.raises(PlanError, match="amsgrad=True has no factored form"):
        SlimAdam([param], plan="factored", amsgrad=True)


def test_gradient_initialised_variance_warms_up_by_itself() -> None:
    """First update is ``sqrt(1 - beta2)`` of Adam's (arXiv 2406.09405: the bias correction is kept)."""
    start, grad = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for beta2, dims in itertools.product((0.95, 0.999), ((), (1,))):
        rule = Rule(dims, "mean") if dims else Rule()
        updates = []
        for variance_init in ("zeros", "gradient"):
            param = start.clone().requires_grad_()
            param.grad = grad.clone()
            options = {"betas": (0.9, beta2), "eps": 0.0, "weight_decay": 0.0, "variance_init": variance_init}
            SlimAdam([("w", param)], plan=CompressionPlan({"w": rule}), **options).step()
            updates.append(param.detach())
        torch.testing.assert_close(updates[1], updates[0] * (1 - beta2) ** 0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dims", [(), (0,), (1, 2, 3), "factored"], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_laid_out_differently_is_still_updated(dims: Any, amsgrad: bool) -> None:
    """A checkpoint may hold moments with other strides than the parameter has."""
    amsgrad = amsgrad and dims != "factored"
    start, grads = torch.randn(4, 3, 5, 2), gradients((4, 3, 5, 2), 3)
    plan = CompressionPlan({"w": _rule(dims) if dims else Rule()})
    results = []
    for strange in (False, True):
        param = start.clone().requires_grad_()
        optimizer = SlimAdam([("w", param)], plan=plan, amsgrad=amsgrad, **OPTIONS)
        for step, grad in enumerate(grads):
            param.grad = grad.float()
            optimizer.step()
            if strange and step == 0:
                state = optimizer.state[param]
                for key in set(state) - {"step"}:
                    state[key] = state[key].transpose(0, 3).contiguous().transpose(0, 3)
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dims", [(), (0,), (1,), "factored"], ids=str)
def test_functional_form_agrees_with_float64(dims: Any, amsgrad: bool) -> None:
    amsgrad = amsgrad and dims != "factored"
    rule = _rule(dims) if dims else Rule()
    start, grads = torch.randn(7, 5, dtype=torch.float64), gradients((7, 5), 4)
    param, moment, step = start.clone(), torch.zeros(7, 5, dtype=torch.float64), torch.zeros(())
    second = [torch.zeros(shape, dtype=torch.float64) for shape in rule.state_shapes((7, 5))]
    largest = [torch.zeros_like(part) for part in second]
    for grad in grads:
        step += 1
        entry = Entry(param, grad, moment, second, largest if amsgrad else (), step, rule.averaged_dims(2))
        reference_update([entry], Hyperparameters(3e-3, 0.8, 0.95, 1e-6, 0.1, amsgrad=amsgrad, maximize=True))
    options = {**OPTIONS, "amsgrad": amsgrad, "maximize": True}
    expected = slim_adamw_float64(start.numpy(), [grad.numpy() for grad in grads], dims, **options)
    np.testing.assert_allclose(param.numpy(), expected, rtol=1e-13, atol=1e-13)
    assert step == 4
