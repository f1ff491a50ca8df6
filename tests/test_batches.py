"""Blocks of several parameters through PyTorch's fused kernel, which is given averages in place of second moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from slimadam.kernels import batches, blocked, columns
from slimadam.kernels.factored import stacks
from slimadam.kernels.numbers import Numbers
from slimadam.kernels.torch_fused import takes_averages, update_beside

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.functional import Entry, Hyperparameters
from tests.reference import slim_adamw_float64, train

SHAPES = [(7, 5), (5, 7), (1, 9), (9, 1), (12,), (3, 4, 5), (2, 3, 4, 5), (64, 3), (3, 64), (40, 40), (1, 1)]
DIMS: list[tuple[int, ...]] = [(0,), (1,), (0, 1), (1, 2), (0, 1, 2), (2, 3), (1, 2, 3)]
EACH = [(shape, dims) for shape in SHAPES for dims in DIMS if dims[-1] < len(shape)]
PLAN = CompressionPlan({f"w{number}": Rule(dims, "mean") for number, (_, dims) in enumerate(EACH)})


def _several(steps: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Parameters, and gradients which one in five of them lacks in each step."""
    generator = torch.Generator().manual_seed(1)
    starts = {f"w{number}": torch.randn(shape, generator=generator) for number, (shape, _) in enumerate(EACH)}
    grads = [
        {name: torch.randn(start.shape, generator=generator) for name, start in starts.items()} for _ in range(steps)
    ]
    for step, some in enumerate(grads):
        for at, name in enumerate(starts):
            if (at + step) % 5 == 0:
                del some[name]
    return starts, grads


def _train(
    starts: dict[str, torch.Tensor], grads: list[dict[str, torch.Tensor]], options: dict[str, Any]
) -> dict[str, list[torch.Tensor]]:
    params = {name: torch.nn.Parameter(start.clone()) for name, start in starts.items()}
    plan = CompressionPlan({name: rule for name, rule in PLAN.items() if name in params})
    optimizer = SlimAdam(list(params.items()), plan=plan, monitor=False, **options)
    for some in grads:
        for name, param in params.items():
            param.grad = some[name].clone() if name in some else None
        optimizer.step()
    return {
        name: [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]
        for name, param in params.items()
    }


@pytest.mark.parametrize("block", [1, 30, 200, 1 << 19])
@pytest.mark.parametrize(
    "options",
    [{"betas": (0.8, 0.95), "weight_decay": 0.1}, {"maximize": True, "amsgrad": True}, {"lr": torch.tensor(0.01)}],
    ids=["plain", "maximize, amsgrad", "tensor lr"],
)
def test_each_parameter_gets_what_it_gets_alone(
    options: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    starts, grads = _several(6)
    together = _train(starts, grads, options)
    for name in starts:
        alone = _train({name: starts[name]}, [{name: some[name]} if name in some else {} for some in grads], options)
        for ours, expected in zip(together[name], alone[name], strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("block", [4, 20, 1 << 19])
@pytest.mark.parametrize(
    "extreme", [1e15, 1.5e19, 1e20, float("inf"), float("nan"), 1e-21, 1e-30, 0.0], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("lr", [1e-2, 0.0])
def test_extreme_gradients_are_what_they_are_for_the_reference(
    dims: tuple[int, ...], block: int, extreme: float, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 10, generator=generator)
    grads = [torch.randn(6, 10, generator=generator) for _ in range(4)]
    grads[1][2, 3] = extreme
    grads[2][:, 4] = extreme
    plan = CompressionPlan({"w": Rule(dims, "mean")})
    results = []
    for implementation in ({}, {"foreach": False}):
        (param,), optimizer = train(
            [start],
            lambda p, implementation=implementation: SlimAdam([("w", p[0])], plan=plan, lr=lr, **implementation),
            [[grad] for grad in grads],
        )
        state = optimizer.state[param]
        results.append([param.detach(), state["exp_avg"], state["exp_avg_sq"]])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=4e-6, atol=1e-6, equal_nan=True)


def _entry(grad: torch.Tensor, exp_avg_sq: torch.Tensor, **changes: Any) -> Entry:
    param, exp_avg = torch.ones_like(grad), torch.zeros_like(grad)
    return Entry(param, grad, exp_avg, [exp_avg_sq], [], torch.tensor(1.0), [(1,)])._replace(**changes)


def test_second_moments_stay_what_they_are_up_to_the_limit() -> None:
    """At ``averaged = 2**27 (1 - beta2)`` a squared gradient may be ``2**27`` times the second moment."""
    generator = torch.Generator().manual_seed(0)
    second_moment = 10 ** (torch.rand(1 << 16, generator=generator) * 40 - 25)
    numbers = Numbers.of(Hyperparameters(), torch.tensor(3.0))
    for factor, kept in ((2**27, True), (2**30, False)):
        grad = (second_moment.double() * factor).sqrt().float().nan_to_num(posinf=1e19).clamp_max(1e19)
        given = second_moment.clone()
        update_beside([torch.ones_like(grad)], [grad], [torch.zeros_like(grad)], [given], numbers)
        assert torch.equal(given, second_moment) == kept


def test_it_takes_no_more_than_it_can() -> None:
    moment, grad = torch.ones(4, 1), torch.ones(4, 8)
    assert takes_averages(_entry(grad, moment), 8, 0.999)
    assert takes_averages(_entry(grad, moment), int(2**27 * 0.5) - 1, 0.5)
    assert not takes_averages(_entry(grad, moment), 2**26, 0.5)
    assert not takes_averages(_entry(grad, moment, is_given=True), 8, 0.999)
    assert not takes_averages(_entry(grad, moment.double()), 8, 0.999)
    assert not takes_averages(_entry(grad.bfloat16(), moment), 8, 0.999)
    assert not takes_averages(_entry(grad, moment, exp_avg=grad.bfloat16()), 8, 0.999)
    assert not takes_averages(_entry(grad, moment)._replace(exp_avg_sq=[moment, moment]), 8, 0.999)


@pytest.mark.parametrize("dims", [(0,), (1,)], ids=str)
def test_what_it_cannot_take_goes_through_passes(dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly no decay: squared gradients may be a billion times the second moment."""
    for module in (batches, columns):
        monkeypatch.setattr(module, "update_beside", lambda *_: pytest.fail("the second moment would change"))
    options = {"lr": 1e-2, "betas": (0.9, 1 - 1e-8), "weight_decay": 0.1}
    start = torch.randn(30, 20)
    grads = [10 ** (torch.rand(30, 20, dtype=torch.float64) * 8 - 6) for _ in range(5)]
    plan = CompressionPlan({"w": Rule(dims, "mean")})
    (ours,), _ = train([start], lambda p: SlimAdam([("w", p[0])], plan=plan, **options), [[grad] for grad in grads])
    singles = [grad.float().double().numpy() for grad in grads]
    expected = slim_adamw_float64(start.double().numpy(), singles, dims, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours.detach().double().numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", [Rule((1,), "mean"), Rule((0,), "mean"), Rule(form="factored")], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-44, 1e-38, 1e-31, 1e-29, 1e3], ids=lambda value: f"{value:g}")
def test_any_eps(rule: Rule, eps: float) -> None:
    """Zero gradients leave nothing but ``eps`` to divide by; with none, 0 / 0 is NaN as it is for AdamW."""
    results = []
    for implementation in ({}, {"foreach": False}):
        param = torch.nn.Parameter(torch.ones(4, 6))
        options = {"lr": 0.1, "eps": eps, "weight_decay": 0.01}
        optimizer = SlimAdam([("w", param)], plan=CompressionPlan({"w": rule}), **options, **implementation)
        for value in (0.0, 1.0, 0.0):
            param.grad = torch.full((4, 6), value)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(("most", "together"), [(1, 1), (45, 2), (100, 5), (1000, 6)])
def test_stacks_of_factored_matrices_come_apart(most: int, together: int) -> None:
    param = torch.ones(6, 4, 5)
    averages = [torch.ones(6, 4, 1), torch.ones(6, 1, 5)]
    entry = Entry(param, param, param, averages, [], torch.tensor(1.0), [(2,), (1,)])
    found = list(stacks(entry, most))
    assert max(len(matrices.param) for matrices in found) == together
    assert sum(len(matrices.param) for matrices in found) == 6
    assert all(len({len(tensor) for tensor in matrices}) == 1 for matrices in found)
