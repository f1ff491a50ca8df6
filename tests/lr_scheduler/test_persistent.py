"""The warmup that follows the critical learning rate until it reaches its target."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from slimadam import PersistentCatapultWarmup, SlimAdam, critical_lr
from tests.lr_scheduler.test_warmup import TARGET, optimizer_of, rates_of, through_a_file


class Regression:
    """A small network on fixed batches; counts how often its loss is evaluated without gradients."""

    def __init__(self, lr: float, kind: Callable[..., Optimizer] = SGD, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
        self.optimizer = kind(self.model.parameters(), lr=lr, **options)
        self.inputs = torch.randn(500, 8, 4, generator=generator, dtype=torch.float64)
        self.at = 0
        self.evaluations = 0

    def loss(self) -> Tensor:
        self.evaluations += not torch.is_grad_enabled()
        batch = self.inputs[self.at]
        return (self.model(batch).squeeze(1) - batch.sum(1)).square().mean()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()

    def train(self, warmup: LRScheduler, steps: int) -> Iterator[float]:
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
            yield rates_of(self.optimizer)[0]
            warmup.step()
            self.at += 1


@pytest.mark.parametrize("kind", [SGD, AdamW, SlimAdam])
def test_each_step_is_taken_with_the_critical_rate_of_its_batch(kind: Callable[..., Optimizer]) -> None:
    task = Regression(100.0, kind)
    task.backward()
    first = critical_lr(task.optimizer, task.loss, start=1e-6)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss, max_growth=math.inf)
    assert rates_of(task.optimizer) == [1e-6]
    rates = list(task.train(warmup, 1))
    assert rates == [pytest.approx(first, rel=1 / 15)]
    for _ in range(5):
        task.backward()
        critical = critical_lr(task.optimizer, task.loss, start=rates[-1])
        task.optimizer.step()
        assert rates_of(task.optimizer)[0] == pytest.approx(max(rates[-1], critical), rel=1 / 15)
        assert warmup.get_last_lr() == rates_of(task.optimizer) == [warmup.rate]
        rates += rates_of(task.optimizer)
        warmup.step()
        task.at += 1
    assert rates == sorted(rates)


def test_the_target_ends_it_for_good() -> None:
    task = Regression(0.25)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss, start=1e-9, max_growth=1.1)
    rates = list(task.train(warmup, 40))
    assert rates[10] < 0.25 == rates[-1]
    assert warmup.finished
    assert not any(task.optimizer._optimizer_step_pre_hooks)
    evaluations = task.evaluations
    assert list(task.train(warmup, 5)) == [0.25] * 5
    assert task.evaluations == evaluations
    task.optimizer.param_groups[0]["lr"] = 0.1  # whatever follows has the rate to itself
    assert list(task.train(warmup, 2)) == [0.1] * 2


def test_growth_between_measurements_is_limited() -> None:
    task = Regression(1e6, AdamW)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss, max_growth=1.01)
    rates = list(task.train(warmup, 12))
    growth = [after / before for before, after in itertools.pairwise(rates)]
    assert max(growth) == pytest.approx(1.01, rel=1e-12)
    assert min(growth) >= 1


def test_measures_at_intervals() -> None:
    task = Regression(1e6)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss, interval=3)
    measured = []
    for _ in task.train(warmup, 8):
        measured.append(task.evaluations)
    changes = [index for index in range(8) if measured[index] != (measured[index - 1] if index else 0)]
    assert changes == [0, 3, 6]


def test_a_batch_whose_loss_cannot_fall_leaves_the_rate() -> None:
    param = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([param], lr=1.0)
    falls = True
    warmup = PersistentCatapultWarmup(optimizer, lambda: 2 * param.square().sum() if falls else -param.sum())
    param.grad = 4 * param.detach()
    optimizer.step()
    warmup.step()
    rate = warmup.rate
    assert rate == pytest.approx(0.5, rel=1 / 31)
    falls = False
    param.detach().fill_(1.0)
    param.grad = 4 * param.detach()
    optimizer.step()
    assert (warmup.rate, warmup.finished) == (rate, False)


def test_groups_keep_their_ratios_and_tensor_rates_their_identity() -> None:
    params = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lr = torch.tensor(10.0, dtype=torch.float64)
    optimizer = AdamW([{"params": [params[0]], "lr": lr}, {"params": [params[1]], "lr": 1.0}], weight_decay=0.0)

    def loss() -> Tensor:
        return params[0].square().sum() + params[1].square().sum()

    warmup = PersistentCatapultWarmup(optimizer, loss)
    loss().backward()
    optimizer.step()
    # D = (1, 0.1): the loss 2 ((1 - eta)**2 + (1 - eta / 10)**2) is back at 4 where eta = 2 * 1.1 / 1.01.
    assert warmup.rate == pytest.approx(2.2 / 1.01, rel=1 / 31)
    assert optimizer.param_groups[0]["lr"] is lr
    assert rates_of(optimizer) == pytest.approx([warmup.rate, warmup.rate / 10], rel=1e-12)


@pytest.mark.parametrize("stop", [1, 4, 45])
def test_persistent_warmup_resumes(stop: int) -> None:
    def build() -> tuple[Regression, PersistentCatapultWarmup]:
        task = Regression(0.25)
        return task, PersistentCatapultWarmup(task.optimizer, task.loss, max_growth=1.1, interval=2)

    task, warmup = build()
    expected = list(task.train(warmup, 50))
    assert warmup.finished
    task, warmup = build()
    assert list(task.train(warmup, stop)) == expected[:stop]
    saved = through_a_file(
        {"model": task.model.state_dict(), "optimizer": task.optimizer.state_dict(), "warmup": warmup.state_dict()}
    )
    task, warmup = build()
    task.model.load_state_dict(saved["model"])
    task.optimizer.load_state_dict(saved["optimizer"])
    warmup.load_state_dict(saved["warmup"])
    task.at = stop
    assert list(task.train(warmup, 50 - stop)) == expected[stop:]


def test_the_next_schedule_takes_over_when_finished() -> None:
    task = Regression(0.2)
    decay = CosineAnnealingLR(task.optimizer, 10)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss)
    rates = []
    for _ in range(60):
        task.backward()
        task.optimizer.step()
        rates.append(rates_of(task.optimizer)[0])
        (decay if warmup.finished else warmup).step()
        if decay.last_epoch == 10:
            break
    assert rates[-10:] == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 10)) for k in range(10)], rel=1e-9)


class Wrapped(SGD):
    """As Accelerate wraps an optimizer: what steps is the one inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([torch.ones(1)], lr=1.0)
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


def test_a_wrapped_optimizer_is_measured_where_it_steps() -> None:
    task = Regression(1e6)
    task.backward()
    expected = critical_lr(task.optimizer, task.loss)
    wrapped = Wrapped(task.optimizer)
    PersistentCatapultWarmup(wrapped, task.loss)
    wrapped.step()
    assert rates_of(task.optimizer)[0] == pytest.approx(expected, rel=1 / 15)


def test_misuse_is_said() -> None:
    param = torch.ones(2, requires_grad=True)
    optimizer = SGD([param], lr=0.1)
    PersistentCatapultWarmup(optimizer, lambda: param.square().sum())
    with pytest.warns(UserWarning, match="called without gradients"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with pytest.raises(RuntimeError, match="makes the gradient inside the step"):
        optimizer.step(lambda: param.square().sum())
    param.grad = torch.ones(2)
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match=r"call scaler\.unscale_\(optimizer\)"):
        optimizer.step()


def test_a_scaled_loss_is_measured_after_unscaling() -> None:
    task = Regression(1e6, AdamW, fused=True)
    task.backward()
    expected = critical_lr(task.optimizer, task.loss)
    warmup = PersistentCatapultWarmup(task.optimizer, task.loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    task.optimizer.zero_grad()
    scaler.scale(task.loss()).backward()
    scaler.unscale_(task.optimizer)
    scaler.step(task.optimizer)
    assert warmup.rate == pytest.approx(expected, rel=1 / 15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"closure": 3.0}, TypeError, "closure=3.0 must be a function"),
        ({"start": 0.0}, ValueError, "start=0.0"),
        ({"interval": 0}, ValueError, "interval=0"),
        ({"interval": 1.5}, TypeError, "interval=1.5"),
        ({"max_growth": 1.0}, ValueError, "max_growth=1.0 must be a number above 1"),
        ({"max_growth": math.nan}, ValueError, "max_growth=nan"),
    ],
)
def test_bad_options_of_the_persistent_warmup(options: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = optimizer_of(TARGET)
    with pytest.raises(error, match=message):
        PersistentCatapultWarmup(optimizer, **{"closure": lambda: 0.0, **options})
    assert not any(optimizer._optimizer_step_pre_hooks)
    assert rates_of(copy.copy(optimizer)) == [TARGET]
