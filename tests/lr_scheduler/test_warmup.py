"""The critical learning rate, and the schedulers that start from it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    SequentialLR,
)

from slimadam import CatapultWarmup, PersistentCatapultWarmup, SlimAdam, critical_lr
from tests.versions import TORCH, needs_torch

TARGET = 1e-2
SEQUENTIAL = [False, pytest.param(True, marks=needs_torch((2, 7), "SequentialLR loses the last rate of tensor rates"))]


def optimizer_of(*rates: float | Tensor, kind: Callable[..., Optimizer] = SGD) -> Optimizer:
    groups = [{"params": [torch.ones(2, requires_grad=True)], "lr": lr} for lr in rates]
    return kind(groups)


def rates_of(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def follow(optimizer: Optimizer, scheduler: Any, steps: int) -> list[list[float]]:
    """The rates of the groups at each of so many optimizer steps."""
    found = []
    for _ in range(steps):
        found.append(rates_of(optimizer))
        optimizer.step()
        scheduler.step()
    return found


# -- critical_lr -------------------------------------------------------------------------------------------------------


def quadratic(curvatures: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Callable[[], Tensor]]:
    param = torch.linspace(1, 2, len(curvatures), dtype=dtype).requires_grad_()
    weights = torch.tensor(curvatures, dtype=dtype)
    return param, lambda: (weights * param**2).sum() / 2


def test_on_a_quadratic_it_is_two_over_the_directional_sharpness() -> None:
    param, loss = quadratic([0.1, 3.0, 50.0])
    optimizer = SGD([param], lr=1e-3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss().backward()
    direction = 0.9 * optimizer.state[param]["momentum_buffer"] + param.grad
    curvature = direction @ (torch.tensor([0.1, 3.0, 50.0], dtype=torch.float64) * direction)
    expected = 2 * (direction @ param.grad / curvature).item()
    before = param.detach().clone()
    for start in (1e-6, 1.0, 1e3):
        assert critical_lr(optimizer, loss, start=start) == pytest.approx(expected, rel=1 / 31)
    assert torch.equal(param, before)
    assert critical_lr(optimizer, loss, max_lr=expected / 2) == expected / 2
    assert critical_lr(optimizer, loss, max_lr=expected * 8) == pytest.approx(expected, rel=1 / 31)


def test_other_groups_keep_their_ratio_to_the_largest_rate() -> None:
    params = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = SGD([{"params": [params[0]], "lr": 0.01}, {"params": [params[1]], "lr": 0.001}])

    def loss() -> Tensor:
        return (params[0] ** 2 + 100 * params[1] ** 2) / 2

    loss().backward()
    # Along D = (1, 0.1 * 100): slope 1 + 10 * 100, curvature 1 + 100 * 100.
    assert critical_lr(optimizer, loss) == pytest.approx(2 * 1001 / 10001, rel=1 / 31)


def test_a_loss_that_never_rises() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = SGD([param], lr=0.1)
    param.sum().backward()
    assert critical_lr(optimizer, lambda: param.sum(), max_lr=0.5) == 0.5
    assert critical_lr(optimizer, lambda: param.sum().clamp_min(-1e30)) == math.inf


@pytest.mark.parametrize(
    ("loss", "message"),
    [(lambda p: -p.sum(), "does not fall at any rate"), (lambda p: p.sum() * math.nan, "the loss is nan")],
)
def test_where_there_is_none_it_says_why(loss: Callable[[Tensor], Tensor], message: str) -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = SGD([param], lr=0.1)
    param.sum().backward()
    with pytest.raises(RuntimeError, match=message):
        critical_lr(optimizer, lambda: loss(param))


# -- CatapultWarmup ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0001, 0.07, 0.1, 0.25, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("warmup_steps", [1, 7, 10, 300])
def test_plain_warmups_slope_from_the_critical_rate(warmup_steps: int, share: float) -> None:
    optimizer = optimizer_of(TARGET)
    warmup = CatapultWarmup(optimizer, warmup_steps, critical_lr=TARGET * share)
    rates = [rate for (rate,) in follow(optimizer, warmup, warmup_steps + 3)]
    # Exactly: share and warmup_steps are decimals, so the whole steps saved are known without rounding.
    saved = round(share * 10_000) * warmup_steps // 10_000
    assert warmup.steps == warmup_steps - saved
    expected = [TARGET * (share + step / warmup_steps) for step in range(warmup.steps)]
    assert rates[: warmup.steps] == pytest.approx(expected, rel=1e-14)
    assert all(rate < TARGET for rate in rates[: warmup.steps])
    assert rates[warmup.steps :] == [TARGET] * (saved + 3)
    plain = optimizer_of(TARGET)
    linear = LambdaLR(plain, lambda step: min(1, step / warmup_steps))
    reached = [rate for (rate,) in follow(plain, linear, warmup_steps + 3)].index(TARGET)
    assert reached - rates.index(TARGET) == saved


@pytest.mark.parametrize("critical", [TARGET, 1.0, 1e30])
def test_no_warmup_where_the_target_is_not_critical(critical: float) -> None:
    optimizer = optimizer_of(TARGET)
    warmup = CatapultWarmup(optimizer, 10, critical_lr=critical)
    assert warmup.steps == 0
    assert follow(optimizer, warmup, 3) == [[TARGET]] * 3


def test_groups_keep_their_ratio_to_the_largest_target() -> None:
    optimizer = optimizer_of(1e-3, TARGET, 0.0)
    found = follow(optimizer, CatapultWarmup(optimizer, 10, critical_lr=2e-3), 10)
    for step, rates in enumerate(found):
        factor = min(1, 0.2 + step / 10)
        assert rates == pytest.approx([1e-3 * factor, TARGET * factor, 0], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_rates_are_changed_in_place(dtype: torch.dtype) -> None:
    lr = torch.tensor(TARGET, dtype=dtype)
    optimizer = SlimAdam([torch.ones(2, requires_grad=True)], lr=lr, plan=None)
    warmup = CatapultWarmup(optimizer, 10, critical_lr=TARGET / 4)
    assert optimizer.param_groups[0]["lr"] is lr
    found = follow(optimizer, warmup, 20)
    assert optimizer.param_groups[0]["lr"] is lr
    eps = torch.finfo(dtype).eps
    assert [rate for (rate,) in found] == pytest.approx(
        [TARGET * min(1, 0.25 + k / 10) for k in range(20)], rel=2 * eps
    )
    assert found[8:] == [[torch.tensor(TARGET, dtype=dtype).item()]] * 12


def cosine(step: int, steps: int) -> float:
    return TARGET * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


@pytest.mark.parametrize("tensor_lr", SEQUENTIAL)
def test_followed_by_a_cosine(tensor_lr: bool) -> None:
    optimizer = optimizer_of(torch.tensor(TARGET, dtype=torch.float64) if tensor_lr else TARGET)
    warmup = CatapultWarmup(optimizer, 20, critical_lr=TARGET / 4)
    scheduler = SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 30)], [warmup.steps])
    found = [rate for (rate,) in follow(optimizer, scheduler, 40)]
    expected = [TARGET * (0.25 + k / 20) for k in range(15)] + [cosine(k, 30) for k in range(25)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_nothing_to_warm_up_before_the_next_schedule() -> None:
    def follow_cosine(make: Callable[[Optimizer], LRScheduler]) -> list[float]:
        optimizer = optimizer_of(TARGET)
        scheduler = SequentialLR(optimizer, [make(optimizer), CosineAnnealingLR(optimizer, 30)], [0])
        return [rate for (rate,) in follow(optimizer, scheduler, 10)]

    warmup = CatapultWarmup(optimizer_of(TARGET), 20, critical_lr=TARGET)
    assert warmup.steps == 0
    found = follow_cosine(lambda optimizer: CatapultWarmup(optimizer, 20, critical_lr=TARGET))
    assert found == follow_cosine(lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))
    if TORCH >= (2, 13):  # before, SequentialLR is a step late, or off, after a schedule of no steps
        assert found == pytest.approx([cosine(k, 30) for k in range(10)], rel=1e-12)


def test_follows_another_schedule() -> None:
    optimizer = optimizer_of(TARGET)
    frozen = LambdaLR(optimizer, lambda step: 1e-3)
    warmup = CatapultWarmup(optimizer, 10, critical_lr=TARGET / 2)
    found = follow(optimizer, SequentialLR(optimizer, [frozen, warmup], [3]), 12)
    expected = [TARGET * 1e-3] * 3 + [TARGET * min(1, 0.5 + k / 10) for k in range(9)]
    assert [rate for (rate,) in found] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup_first", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_chained_with_a_decay_the_rates_are_the_product(warmup_first: bool, tensor_lr: bool) -> None:
    optimizer = optimizer_of(torch.tensor(TARGET, dtype=torch.float64) if tensor_lr else TARGET)

    def warm() -> LRScheduler:
        return CatapultWarmup(optimizer, 10, critical_lr=TARGET / 5)

    def decay() -> LRScheduler:
        return ExponentialLR(optimizer, 0.9)

    order = [warm, decay] if warmup_first else [decay, warm]
    found = follow(optimizer, ChainedScheduler([make() for make in order]), 20)
    expected = [TARGET * 0.9**k * min(1, 0.2 + k / 10) for k in range(20)]
    assert [rate for (rate,) in found] == pytest.approx(expected, rel=1e-12)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 3, 8, 30])
@pytest.mark.parametrize("tensor_lr", SEQUENTIAL)
def test_resumes_mid_warmup(stop: int, tensor_lr: bool) -> None:
    def build() -> tuple[Optimizer, LRScheduler]:
        optimizer = optimizer_of(torch.tensor(TARGET) if tensor_lr else TARGET, 1e-3)
        warmup = CatapultWarmup(optimizer, 10, critical_lr=TARGET / 5)
        return optimizer, SequentialLR(optimizer, [warmup, CosineAnnealingLR(optimizer, 30)], [warmup.steps])

    expected = follow(*build(), 40)
    optimizer, scheduler = build()
    assert follow(optimizer, scheduler, stop) == expected[:stop]
    saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    optimizer, scheduler = build()
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    assert follow(optimizer, scheduler, 40 - stop) == expected[stop:]


def test_resumes_with_other_arguments_as_it_was_saved() -> None:
    optimizer = optimizer_of(TARGET)
    saved = CatapultWarmup(optimizer, 10, critical_lr=TARGET / 5).state_dict()
    assert "optimizer" not in saved
    resumed = CatapultWarmup(optimizer, 99, critical_lr=TARGET / 9)
    resumed.load_state_dict(saved)
    assert (resumed.steps, resumed.warmup_steps, resumed.critical_lr) == (8, 10, TARGET / 5)


def test_built_to_go_on_after_the_last_step() -> None:
    optimizer = optimizer_of(TARGET)
    follow(optimizer, CatapultWarmup(optimizer, 10, critical_lr=TARGET / 5), 4)
    later = CatapultWarmup(optimizer, 10, critical_lr=TARGET / 5, last_epoch=3)
    assert later.last_epoch == 4
    assert rates_of(optimizer) == [pytest.approx(TARGET * 0.6, rel=1e-14)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 1e-3), ValueError, "warmup_steps=0 must be at least 1"),
        ((-3, 1e-3), ValueError, "warmup_steps=-3"),
        ((2.5, 1e-3), TypeError, "warmup_steps=2.5 must be a whole number"),
        ((True, 1e-3), TypeError, "warmup_steps=True"),
        ((10, 0.0), ValueError, "critical_lr=0.0 must be a finite number above 0"),
        ((10, -1e-3), ValueError, "critical_lr=-0.001"),
        ((10, math.nan), ValueError, "critical_lr=nan"),
        ((10, math.inf), ValueError, "critical_lr=inf"),
        ((10, "1e-3"), TypeError, "critical_lr='1e-3' must be a number"),
        ((10, None), TypeError, "critical_lr=None"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(
    arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    optimizer = optimizer_of(TARGET)
    with pytest.raises(error, match=message):
        CatapultWarmup(optimizer, *arguments)
    assert rates_of(optimizer) == [TARGET]
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("kind", [CatapultWarmup, PersistentCatapultWarmup])
def test_what_cannot_be_warmed_up_is_refused(kind: type[LRScheduler]) -> None:
    arguments: Any = {"warmup_steps": 10, "critical_lr": 1.0} if kind is CatapultWarmup else {"closure": lambda: 0.0}
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, not list"):
        kind([], **arguments)
    with pytest.raises(ValueError, match="every group's lr is 0"):
        kind(optimizer_of(0.0), **arguments)
