from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from slimadam import CriticalSharpness, SlimAdam
from slimadam.curvature.probe.directions import pending_directions
from slimadam.demo.data import load
from slimadam.demo.training import DemoSettings

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SlimAdam": lambda p: SlimAdam(p, lr=1e-3, plan="factored", weight_decay=0.1),
}


class Quadratic:
    """``0.5 x^T A x - b^T x`` in float64, with eigenvalues over four orders of magnitude."""

    def __init__(self, make: Callable[[Any], Optimizer], seed: int, size: int = 12) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        eigenvalues = 10 ** (4 * torch.rand(size, dtype=torch.float64, generator=generator) - 2)
        self.hessian = basis * eigenvalues @ basis.T
        self.b = torch.randn(size, dtype=torch.float64, generator=generator)
        start = torch.randn(3, size // 3, dtype=torch.float64, generator=generator)
        self.x = start.requires_grad_()
        self.optimizer = make([self.x])

    def loss(self) -> Tensor:
        x = self.x.flatten()
        return 0.5 * x @ self.hessian @ x - self.b @ x

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()

    def crossing(self) -> float:
        """``2 D^T g / D^T H D``, where the loss along the direction is back at its start."""
        ((_, direction),) = pending_directions(self.optimizer)
        d = direction.flatten()
        assert self.x.grad is not None
        return (2 * d @ self.x.grad.flatten() / (d @ self.hessian @ d)).item()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("tol", [1 / 4, 1 / 16, 1 / 256])
def test_quadratics(name: str, tol: float) -> None:
    for seed in range(12):
        job = Quadratic(OPTIMIZERS[name], seed)
        probe = CriticalSharpness(job.optimizer, tol, modules=[])
        for _ in range(4):
            job.backward()
            expected = job.crossing()
            found = probe.measure(job.loss)
            assert found.status == "found"
            assert found.bracket[0] <= expected * (1 + 1e-9)
            assert found.bracket[1] >= expected * (1 - 1e-9)
            assert 1 - found.bracket[0] / found.bracket[1] <= tol
            assert abs(found.sharpness * expected / 2 - 1) <= tol
            assert found.critical_lr == sum(found.bracket) / 2
            assert found.sharpness == 2 / found.critical_lr
            assert found.loss == pytest.approx(job.loss().item(), rel=1e-12)
            assert found.lr == 1e-3
            job.optimizer.step()


def test_seven_percent_at_the_default_tolerance() -> None:
    worst = 0.0
    for seed in range(200):
        job = Quadratic(OPTIMIZERS["AdamW"], seed)
        job.backward()
        found = CriticalSharpness(job.optimizer, modules=[]).measure(job.loss)
        worst = max(worst, abs(found.sharpness * job.crossing() / 2 - 1))
    assert worst < 0.07


def test_few_forward_passes_while_training() -> None:
    settings = DemoSettings(layers=2, width=32, steps=60, context=32)
    model = settings.new_model()
    optimizer = SlimAdam(model, lr=3e-3, plan="rules")
    probe = CriticalSharpness(optimizer)
    passes = []
    for batch in load(None, 32).batches(60, 8, 32, seed=0):
        optimizer.zero_grad()
        model.loss(*batch).backward()
        found = probe.measure(lambda batch=batch: model.loss(*batch))  # type: ignore[misc]
        assert found.status == "found"
        passes.append(found.forward_passes)
        optimizer.step()
    assert sum(passes[1:]) / len(passes[1:]) <= 6.5


def linear(lr: float = 0.1, **options: Any) -> tuple[nn.Linear, Optimizer, Tensor]:
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, **options)
    x = torch.randn(9, 4)
    F.mse_loss(layer(x), torch.zeros(9, 2)).backward()
    return layer, optimizer, x


def test_another_tasks_loss_has_its_own_start() -> None:
    layer, optimizer, x = linear()
    probe = CriticalSharpness(optimizer)
    own = probe.measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    weaker = probe.measure(lambda: 1e-3 * F.mse_loss(layer(x), torch.zeros(9, 2)), task="scaled")
    assert weaker.sharpness == pytest.approx(own.sharpness, rel=1 / 16)
    assert (own.task, weaker.task) == ("", "scaled")
    again = probe.measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    assert again.forward_passes <= 5


def test_the_task_that_the_update_harms_is_no_descent() -> None:
    layer, optimizer, x = linear()
    found = CriticalSharpness(optimizer).measure(lambda: -F.mse_loss(layer(x), torch.zeros(9, 2)))
    assert found.status == "no descent"
    assert math.isnan(found.sharpness)
    assert math.isnan(found.critical_lr)


def test_ascending_on_purpose() -> None:
    layer, optimizer, x = linear(maximize=True)
    optimizer.zero_grad()
    (-F.mse_loss(layer(x), torch.zeros(9, 2))).backward()
    up = CriticalSharpness(optimizer).measure(lambda: -F.mse_loss(layer(x), torch.zeros(9, 2)))
    layer.zero_grad()
    F.mse_loss(layer(x), torch.zeros(9, 2)).backward()
    down = CriticalSharpness(torch.optim.SGD(layer.parameters(), lr=0.1)).measure(
        lambda: F.mse_loss(layer(x), torch.zeros(9, 2))
    )
    assert up.sharpness == down.sharpness


def test_a_loss_that_never_rises() -> None:
    layer, optimizer, x = linear()
    found = CriticalSharpness(optimizer, max_lr=1e3).measure(lambda: (layer(x) * 0).sum())
    assert (found.status, found.sharpness, found.critical_lr) == ("no increase", 0.0, math.inf)
    assert found.bracket == (1e3, math.inf)


def test_overflow_counts_as_an_increase() -> None:
    layer, optimizer, x = linear(lr=1e30)
    found = CriticalSharpness(optimizer).measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    assert found.status == "found"
    assert 1e-3 < found.critical_lr < 1e3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_said(bad: float) -> None:
    _, optimizer, _ = linear()
    found = CriticalSharpness(optimizer).measure(lambda: bad)
    assert found.status == "not finite"
    assert math.isnan(found.sharpness)
    assert found.forward_passes == 2


def test_forward_passes_are_capped() -> None:
    layer, optimizer, x = linear(lr=1e-30)
    capped = CriticalSharpness(optimizer, max_forwards=8)
    found = capped.measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    assert found.status == "out of evaluations"
    assert found.forward_passes == 8
    assert found.bracket[0] == pytest.approx(32e-30)


@pytest.mark.parametrize("lr", [1e-30, 1e-9, 1e9, 1e30])
def test_a_start_that_is_far_off(lr: float) -> None:
    layer, optimizer, x = linear(lr=lr)
    found = CriticalSharpness(optimizer).measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    near = CriticalSharpness(optimizer, start=0.1).measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))
    assert found.status == near.status == "found"
    assert found.critical_lr == pytest.approx(near.critical_lr, rel=1 / 16)


def test_a_closure_that_does_not_repeat_itself_is_told_once() -> None:
    layer, optimizer, _ = linear()
    generator = torch.Generator().manual_seed(0)  # its own: the probe cannot put it back

    def closure() -> Tensor:
        x = torch.randn(9, 4, generator=generator)
        return F.mse_loss(layer(x), torch.zeros(9, 2))

    probe = CriticalSharpness(optimizer)
    with pytest.warns(UserWarning, match="does not repeat itself") as caught:
        first = probe.measure(closure)
    assert len(caught) == 1
    assert first.noise > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = probe.measure(closure)
    assert "found" not in (first.status, second.status) or first.bracket[1] > first.bracket[0]
    assert second.noise > 0.01


def test_noise_is_estimated() -> None:
    layer, optimizer, x = linear()
    generator = torch.Generator().manual_seed(0)
    sigma = 1e-3
    clean = CriticalSharpness(optimizer).measure(lambda: F.mse_loss(layer(x), torch.zeros(9, 2)))

    def closure() -> Tensor:
        return F.mse_loss(layer(x), torch.zeros(9, 2)) + sigma * torch.randn((), generator=generator)

    probe = CriticalSharpness(optimizer)
    with pytest.warns(UserWarning, match="does not repeat itself"):
        probe.measure(closure)
    for _ in range(20):
        found = probe.measure(closure)
        assert 0.05 * sigma < found.noise < 3 * sigma
        assert found.status in ("found", "noisy")
        assert found.bracket[0] * 0.9 <= clean.critical_lr <= found.bracket[1] * 1.1


def test_dropout_masks_agree() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 8)

    def closure() -> Tensor:
        return model(x).square().mean()

    mask = torch.get_rng_state()
    closure().backward()
    torch.set_rng_state(mask)
    found = CriticalSharpness(optimizer).measure(closure)
    assert (found.status, found.noise) == ("found", 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tol": 0.0}, r"tol=0\.0 must be a number from 1e-12 to 1"),
        ({"tol": math.nan}, "tol=nan must be a number"),
        ({"tol": "a"}, "tol='a' must be a number"),
        ({"rounding": -1.0}, r"rounding=-1\.0 must be a number from 0 to 1"),
        ({"memory": "full"}, "memory='full' must be"),
        ({"start": -1.0}, r"start=-1\.0 must be a positive, finite number"),
        ({"max_lr": math.inf}, "max_lr=inf must be a positive, finite number"),
        ({"max_forwards": 4}, "max_forwards=4 must be an integer >= 5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    _, optimizer, _ = linear()
    with pytest.raises(ValueError, match=match):
        CriticalSharpness(optimizer, **options)


def test_bad_use_is_refused() -> None:
    _, optimizer, _ = linear()
    with pytest.raises(TypeError, match=r"closure=0\.5 must be callable"):
        CriticalSharpness(optimizer).measure(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, not list"):
        CriticalSharpness([])  # type: ignore[arg-type]
    layer, optimizer, x = linear()

    def training() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"must only compute and return the loss: no backward\(\)"):
        CriticalSharpness(optimizer).measure(training)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no pending update"):
        CriticalSharpness(optimizer).measure(lambda: 0.0)
    mixed = torch.optim.SGD(
        [{"params": [torch.ones(1, requires_grad=True)], "maximize": flag} for flag in (True, False)]
    )
    for group in mixed.param_groups:
        group["params"][0].grad = torch.ones(1)
    with pytest.raises(ValueError, match="maximize differs"):
        CriticalSharpness(mixed).measure(lambda: 0.0)
