from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.curvature.probe.directions import pending_directions, reference_lr
from slimadam.optim.step import direction
from tests.reference import gradients

SHAPES = [(5, 3), (7,), (2, 3, 4), ()]
MEANS = CompressionPlan(
    {
        "0": Rule(shape=(5, 3), form="mean", dims=(1,)),
        "2": Rule(shape=(2, 3, 4), form="mean", dims=(0, 2)),
    }
)
Make = Callable[[Iterable[Any]], Optimizer]


def named(params: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(str(index), param) for index, param in enumerate(params)]


class Lion(Optimizer):
    """An optimizer that slimadam does not know: sign momentum, decoupled weight decay."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_((0.9 * momentum + 0.1 * param.grad).sign(), alpha=group["lr"])
                    momentum.lerp_(param.grad, 0.01)
                    param.grad.zero_()  # some do: the pending gradient must not see it


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "SGD nesterov with decay": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1),
    "SGD dampened, maximize": lambda p: torch.optim.SGD(
        p, lr=0.3, momentum=0.8, dampening=0.3, weight_decay=0.1, maximize=True
    ),
    "Adam with coupled decay": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, betas=(0.8, 0.97)),
    "Adam amsgrad, maximize": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True, maximize=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, betas=(0.8, 0.97)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, foreach=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.02, dtype=torch.float64), foreach=False),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "NAdam decoupled": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02, lr_decay=0.2, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.02, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "Lion": lambda p: Lion(p, lr=0.02),
    "SlimAdam means": lambda p: SlimAdam(named(p), lr=0.02, plan=MEANS, weight_decay=0.3),
    "SlimAdam factored": lambda p: SlimAdam(p, lr=0.02, plan="factored", variance_init="gradient"),
    "SlimAdam auto": lambda p: SlimAdam(p, lr=0.02, weight_decay=0.3, betas=(0.8, 0.97)),
}
# Step counts kept in float32, or arithmetic of their own in it, limit what torch's optimizers agree to in float64.
TOLERANCE = {"NAdam": 1e-6, "NAdam decoupled": 1e-6, "ASGD": 1e-6, "Adafactor": 1e-6}


def params_with_history(make: Make, dtype: torch.dtype, steps: int) -> tuple[Optimizer, list[Tensor]]:
    torch.manual_seed(1)
    params = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    optimizer = make(params)
    all_grads = [gradients(tuple(param.shape), steps + 1, seed) for seed, param in enumerate(params)]
    for step in range(steps + 1):
        for param, grads in zip(params, all_grads, strict=True):
            param.grad = grads[step].to(dtype)
        if step < steps:
            with torch.no_grad():
                optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize(("steps", "block"), [(0, 1 << 18), (7, 1 << 18), (7, 4)])
def test_direction_is_the_step_that_follows(name: str, steps: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direction, "BLOCK_ELEMENTS", block)
    optimizer, params = params_with_history(OPTIMIZERS[name], torch.float64, steps)
    directions = list(pending_directions(optimizer))
    assert [id(param) for param, _ in directions] == list(map(id, params))
    lr = reference_lr(optimizer)
    expected = [param.detach() - lr * pending for param, pending in directions]
    with torch.no_grad():
        optimizer.step()
    for param, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), wanted, rtol=TOLERANCE.get(name, 1e-12), atol=1e-13)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_nothing_changes(name: str) -> None:
    torch.set_printoptions(profile="full", precision=9)
    optimizer, params = params_with_history(OPTIMIZERS[name], torch.float32, 3)
    seen: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda *arguments: seen.append(arguments))
    optimizer.register_step_pre_hook(lambda *arguments: seen.append(arguments))
    before = str(optimizer.state_dict())
    values = [param.detach().clone() for param in params]
    grads = [(param.grad, param.grad.clone()) for param in params if param.grad is not None]
    versions = [param._version for param in params]
    for _, pending in pending_directions(optimizer):
        pending.zero_()  # the caller's own: a buffer of the optimizer's would be lost
    handle.remove()
    assert not seen
    assert str(optimizer.state_dict()) == before
    assert all(map(torch.equal, values, params))
    assert versions == [param._version for param in params]
    assert all(param.grad is grad for param, (grad, _) in zip(params, grads, strict=True))
    assert all(torch.equal(grad, kept) for grad, kept in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
@pytest.mark.parametrize("name", ["AdamW", "SGD nesterov with decay", "SlimAdam means"])
def test_direction_of_narrow_and_complex_parameters(name: str, dtype: torch.dtype) -> None:
    if name == "AdamW" and dtype == torch.float16:
        pytest.skip("AdamW's own second moments lose digits where squared gradients underflow in float16")
    optimizer, params = params_with_history(OPTIMIZERS[name], dtype, 3)
    directions = list(pending_directions(optimizer))
    lr = reference_lr(optimizer)
    wide = [param.detach().to(torch.complex128 if dtype.is_complex else torch.float64) for param in params]
    optimizer.step()
    unit = 6e-8 if dtype.is_complex else torch.finfo(dtype).eps
    for before, after, (_, pending) in zip(wide, params, directions, strict=True):
        assert pending.dtype == (dtype if dtype.is_complex else torch.float32)
        # The step rounds the parameter, and the first moment, each by up to a unit in the last place.
        slack = 2 * unit * (before.abs() + 2 * lr * pending.abs()).max().item()
        torch.testing.assert_close(after.detach().to(before.dtype), before - lr * pending, rtol=0, atol=slack)


def test_groups_keep_the_ratio_of_their_rates() -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.4}])
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    assert reference_lr(optimizer) == 0.4
    (_, of_a), (_, of_b) = pending_directions(optimizer)
    torch.testing.assert_close(of_a, torch.full((3,), 0.25))
    torch.testing.assert_close(of_b, torch.ones(3))


@pytest.mark.parametrize(("initial", "expected"), [((0.1, 0.4), 0.25), ((None, None), 1.0)])
def test_ratio_while_every_rate_is_zero(initial: tuple[float | None, float | None], expected: float) -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    groups = [{"params": [param], "lr": 0.0} for param in (a, b)]
    for group, rate in zip(groups, initial, strict=True):
        if rate is not None:
            group["initial_lr"] = rate  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(groups)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    (_, of_a), (_, of_b) = pending_directions(optimizer)
    torch.testing.assert_close(of_a, of_b * expected)
    assert of_b.abs().min() > 0.9


def test_parameters_without_a_gradient_are_left_out() -> None:
    a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([a, b])
    b.grad = torch.ones(3)
    ((param, _),) = pending_directions(optimizer)
    assert param is b


def test_a_scheduler_does_not_notice() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([param], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    param.grad = torch.ones(3)
    list(pending_directions(optimizer))
    assert not hasattr(optimizer, "_opt_called") or not optimizer._opt_called


def refused(make: Make, grad: Tensor | None) -> Callable[[], Any]:
    param = torch.ones(3, 2, requires_grad=True)
    optimizer = make([param])
    param.grad = grad
    return lambda: list(pending_directions(optimizer))


def test_bad_use_is_refused() -> None:
    ones = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match=r"no pending update; call this after backward\(\)"):
        refused(OPTIMIZERS["SGD"], None)()
    with pytest.raises(RuntimeError, match="sparse"):
        refused(OPTIMIZERS["SGD"], ones.to_sparse())()
    with pytest.raises(TypeError, match="LBFGS cannot be tried out by itself, without a closure"):
        refused(torch.optim.LBFGS, ones)()
    with pytest.raises(RuntimeError, match="learning rate of Lion is 0"):
        refused(lambda p: Lion(p, lr=0.0), ones)()
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, not Linear"):
        list(pending_directions(torch.nn.Linear(2, 2)))  # type: ignore[arg-type]
