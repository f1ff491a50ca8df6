"""The advised mix of domains: sharpness along mixed updates against quadratics in float64, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimadam import MixAdvice, SlimAdam, advise_mix

TOL = 1 / 256
RATIOS = [0.0, 0.25, 0.5, 0.75, 1.0]
SIZE = 5

Losses = dict[str, Callable[[int], Tensor]]


class Quadratic:
    """``1/2 (x - center)^T H (x - center)``; ``H`` grows by a twentieth from batch to batch."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
        self.hessian = root @ root.T + torch.eye(SIZE, dtype=torch.float64)
        self.center = torch.randn(SIZE, dtype=torch.float64, generator=generator)

    def of_batch(self, batch: int) -> Tensor:
        return self.hessian * (1 + batch / 20)

    def loss(self, x: Tensor, batch: int) -> Tensor:
        off = x - self.center
        return off @ self.of_batch(batch) @ off / 2

    def gradient(self, x: Tensor, batch: int) -> Tensor:
        return self.of_batch(batch) @ (x - self.center)

    def sharpness(self, x: Tensor, direction: Tensor, batch: int) -> float:
        descent = direction @ self.gradient(x, batch)
        return float(direction @ self.of_batch(batch) @ direction / descent) if descent > 0 else math.inf


def _quadratics(count: int = 2) -> tuple[nn.Parameter, dict[str, Quadratic], Losses]:
    x = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    tasks = {f"task{index}": Quadratic(index + 2) for index in range(count)}
    return x, tasks, {name: lambda batch, task=task: task.loss(x, batch) for name, task in tasks.items()}


def _expected(x: Tensor, tasks: dict[str, Quadratic], mix: tuple[float, ...], pair: int) -> list[float]:
    direction = sum(
        weight * task.gradient(x.detach(), 2 * pair) for weight, task in zip(mix, tasks.values(), strict=True)
    )
    assert isinstance(direction, Tensor)
    return [task.sharpness(x.detach(), direction, 2 * pair + 1) for task in tasks.values()]


# -- against the arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_curves_are_the_directional_sharpness_of_quadratics(count: int) -> None:
    x, tasks, losses = _quadratics(count)
    advice = advise_mix(torch.optim.SGD([x], lr=0.1), losses, batches=3, tol=TOL)
    assert len(advice.mixes) == {2: 11, 3: 15}[count]
    seen_infinite = False
    for index, mix in enumerate(advice.mixes):
        for pair in range(3):
            expected = _expected(x, tasks, mix, pair)
            measured = [curve.batches[index][pair] for curve in advice.curves]
            assert measured == pytest.approx(expected, rel=TOL)
            seen_infinite = seen_infinite or math.inf in expected
    assert seen_infinite
    medians = [[sorted(batches)[1] for batches in curve.batches] for curve in advice.curves]
    assert [curve.sharpness for curve in advice.curves] == medians
    largest = [max(values) for values in zip(*medians, strict=True)]
    assert tuple(advice.weights.values()) == advice.mixes[largest.index(min(largest))]
    assert advice.critical_lr == 2 / min(largest)


def test_the_update_is_the_optimizers_own_with_its_state() -> None:
    x, tasks, losses = _quadratics()
    optimizer = torch.optim.SGD([x], lr=1e-3, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        losses["task0"](0).backward()
        optimizer.step()
    velocity = optimizer.state[x]["momentum_buffer"].clone()
    advice = advise_mix(optimizer, losses, ratios=RATIOS, batches=1, tol=TOL, momentum="kept")
    for index, (share, _) in enumerate(advice.mixes):
        mixed = share * tasks["task0"].gradient(x.detach(), 0) + (1 - share) * tasks["task1"].gradient(x.detach(), 0)
        for curve, task in zip(advice.curves, tasks.values(), strict=True):
            expected = task.sharpness(x.detach(), 0.5 * velocity + mixed, 1)
            assert curve.sharpness[index] == pytest.approx(expected, rel=TOL)


def test_settled_momentum_is_where_the_mix_takes_it() -> None:
    """A hundred steps at rate 0 on the same mixed gradient settle SGD's momentum, weight decay in it, for real."""
    x, tasks, losses = _quadratics()
    x.data += 0.1
    options: dict[str, Any] = {"momentum": 0.5, "weight_decay": 0.3, "dampening": 0.2}
    optimizer = torch.optim.SGD([x], lr=1e-3, **options)
    losses["task0"](0).backward()
    optimizer.step()
    buffer = optimizer.state[x]["momentum_buffer"].clone()
    advice = advise_mix(optimizer, losses, ratios=RATIOS, batches=1, tol=TOL)
    assert torch.equal(optimizer.state[x]["momentum_buffer"], buffer)
    for index, mix in enumerate(advice.mixes):
        mixed = sum(w * task.gradient(x.detach(), 0) for w, task in zip(mix, tasks.values(), strict=True))
        still = nn.Parameter(x.detach().clone())
        settling = torch.optim.SGD([still], lr=0.0, **options)
        for _ in range(100):
            still.grad = mixed.clone()  # type: ignore[union-attr]
            settling.step()
        settling.param_groups[0]["lr"] = 1.0
        settling.step()
        for curve, task in zip(advice.curves, tasks.values(), strict=True):
            expected = task.sharpness(x.detach(), x.detach() - still.detach(), 1)
            assert curve.sharpness[index] == pytest.approx(expected, rel=TOL)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, SlimAdam])
def test_settled_momentum_of_adams_by_hand(make: Any) -> None:
    x, tasks, losses = _quadratics()
    x.data += 0.3
    decay, beta2 = 0.5, 0.9
    plan = {"plan": None} if make is SlimAdam else {}
    optimizer = make([x], lr=1e-3, betas=(0.8, beta2), eps=1e-8, weight_decay=decay, **plan)
    for _ in range(60):  # bias corrections are over
        optimizer.zero_grad()
        losses["task0"](0).backward()
        optimizer.step()
    second = optimizer.state[x]["exp_avg_sq"].clone()
    here = x.detach()
    advice = advise_mix(optimizer, losses, ratios=RATIOS, batches=1, tol=TOL)
    for index, mix in enumerate(advice.mixes):
        grad = sum(w * task.gradient(here, 0) for w, task in zip(mix, tasks.values(), strict=True))
        is_coupled = make is torch.optim.Adam
        grad = grad + decay * here if is_coupled else grad
        root = ((beta2 * second + (1 - beta2) * grad**2) / (1 - beta2**61)).sqrt()
        direction = grad / (1 - 0.8**61) / (root + 1e-8) + (0 if is_coupled else decay * here)
        for curve, task in zip(advice.curves, tasks.values(), strict=True):
            assert curve.sharpness[index] == pytest.approx(task.sharpness(here, direction, 1), rel=TOL)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam, SlimAdam])
def test_settled_momentum_of_adams(make: Any) -> None:
    """The update that remains is the same whatever was remembered before."""
    found = []
    for remembered in (0.0, 5.0):
        x, _, losses = _quadratics()
        optimizer = make([x], lr=1e-3, weight_decay=0.1, **({"plan": None} if make is SlimAdam else {}))
        losses["task0"](0).backward()
        optimizer.step()
        x.data.zero_()
        optimizer.state[x]["exp_avg"].fill_(remembered)
        found.append(advise_mix(optimizer, losses, ratios=RATIOS, batches=2, tol=TOL))
        assert torch.equal(optimizer.state[x]["exp_avg"], torch.full_like(x, remembered))
    assert found[0] == found[1]


@pytest.mark.parametrize("make", ["int8", "RMSprop"])
def test_momentum_of_another_kind_is_refused(make: str) -> None:
    x = nn.Parameter(torch.zeros(SIZE))
    tasks = {"task0": Quadratic(2), "task1": Quadratic(3)}
    losses: Losses = {name: lambda batch, task=task: task.loss(x.double(), batch) for name, task in tasks.items()}
    optimizer: torch.optim.Optimizer = (
        SlimAdam([x], plan=None, momentum_dtype="int8")
        if make == "int8"
        else torch.optim.RMSprop([x], lr=1e-3, momentum=0.9)
    )
    losses["task0"](0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"momentum='settled' knows exp_avg in floating point.*use momentum='kept'"):
        advise_mix(optimizer, losses)
    assert len(advise_mix(optimizer, losses, ratios=RATIOS, batches=1, momentum="kept").mixes) == len(RATIOS)


def test_clipped_gradients() -> None:
    x, tasks, losses = _quadratics()
    norm = float(tasks["task0"].gradient(x.detach(), 0).norm())
    free = advise_mix(torch.optim.SGD([x], lr=0.1), losses, ratios=[0.5, 1.0], batches=1, tol=TOL)
    clipped = advise_mix(
        torch.optim.SGD([x], lr=0.1), losses, ratios=[0.5, 1.0], batches=1, tol=TOL, max_grad_norm=norm / 10
    )
    # A direction ten times shorter reaches ten times as far.
    assert clipped.curves[0].sharpness[1] == pytest.approx(free.curves[0].sharpness[1] / 10, rel=2 * TOL)


def test_other_tasks_than_the_domains() -> None:
    x, tasks, losses = _quadratics()
    judge = Quadratic(20)
    advice = advise_mix(
        torch.optim.SGD([x], lr=0.1), losses, tasks={"judge": lambda batch: judge.loss(x, batch)}, batches=1, tol=TOL
    )
    assert [curve.task for curve in advice.curves] == ["judge"]
    for index, mix in enumerate(advice.mixes):
        direction = sum(w * t.gradient(x.detach(), 0) for w, t in zip(mix, tasks.values(), strict=True))
        assert isinstance(direction, Tensor)
        expected = judge.sharpness(x.detach(), direction, 1)
        assert advice.curves[0].sharpness[index] == pytest.approx(expected, rel=TOL)


def test_opposite_tasks_have_no_advice() -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    losses: Losses = {"up": lambda _: (x - 1).square().sum(), "down": lambda _: (x + 1).square().sum()}
    advice = advise_mix(torch.optim.SGD([x], lr=0.1), losses, ratios=[0.0, 0.3, 0.8, 1.0], batches=2)
    assert math.isnan(advice.ratio)
    assert all(map(math.isnan, (*advice.interval, advice.critical_lr)))
    assert advice.undecided == 1
    assert str(advice) == "no mix is advised: at each, some task has no safe step"
    assert advice.to_dict()["weights"] == {"up": None, "down": None}


# -- what is left alone -------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Dropout, batch norm, a head that only one domain uses, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Dropout(0.2))
        self.heads = nn.ModuleList([nn.Linear(7, 3), nn.Linear(7, 3)])

    def loss(self, domain: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * batch + domain)
        x = torch.randn(8, 6, generator=generator).to(self.frozen.weight.dtype)
        target = torch.randint(3, (8,), generator=generator)
        return nn.functional.cross_entropy(self.heads[domain](self.body(self.frozen(x))).float(), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [SlimAdam, torch.optim.AdamW])
def test_nothing_is_changed(make: Any, dtype: torch.dtype) -> None:
    model = Noisy().to(dtype)
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses: Losses = {"a": lambda batch: model.loss(0, batch), "b": lambda batch: model.loss(1, batch)}
    for step in range(3):
        optimizer.zero_grad()
        (losses["a"](step) + losses["b"](step)).backward()
        optimizer.step()
    grads = [param.grad for param in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    advise_mix(optimizer, losses, ratios=RATIOS, batches=2)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    for param, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert param.grad is grad
        assert value is None or torch.equal(value, param.grad)


def test_the_same_again() -> None:
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: Losses = {"a": lambda batch: model.loss(0, batch), "b": lambda batch: model.loss(1, batch)}
    calls: list[tuple[int, int]] = []
    first = advise_mix(optimizer, losses, ratios=RATIOS, batches=2, seed=3, progress=lambda *done: calls.append(done))
    again = advise_mix(optimizer, losses, ratios=RATIOS, batches=2, seed=3)
    assert repr(first) == repr(again)  # NaN equals nothing
    assert calls == [(done, 2 * len(RATIOS)) for done in range(1, 2 * len(RATIOS) + 1)]


def test_all_comes_back_when_a_loss_raises() -> None:
    x, _, losses = _quadratics()
    optimizer = torch.optim.SGD([x], lr=0.1)

    def broken(batch: int) -> Tensor:
        if batch % 2:
            raise KeyError("no such batch")
        return losses["task1"](batch)

    with pytest.raises(KeyError, match="no such batch"):
        advise_mix(optimizer, {"task0": losses["task0"], "broken": broken})
    assert torch.equal(x, torch.zeros_like(x))
    assert x.grad is None


# -- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches": 0}, ValueError, r"batches=0 must be an integer >= 1"),
        ({"level": 1.0}, ValueError, r"level=1\.0 must lie between 0 and 1"),
        ({"ratios": [0.5]}, ValueError, r"ratios=\[0\.5\] must hold at least two different mixes"),
        ({"ratios": [0.5, 1.5]}, ValueError, r"ratios: 1\.5 must be 2 weights in 0\.\.1 that sum to 1"),
        ({"ratios": [0.5, (0.5, 0.4)]}, ValueError, r"ratios: \(0\.5, 0\.4\) must be 2 weights"),
        ({"tasks": {}}, TypeError, r"tasks must be a dict of at least 1"),
        ({"tasks": {"a": 1.0}}, TypeError, r"tasks\['a'\] must be a function of the batch's number"),
        ({"momentum": "none"}, ValueError, r"momentum='none' must be 'settled' or 'kept'"),
        ({"tol": 2.0}, ValueError, r"tol=2\.0 must be a number"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x, _, losses = _quadratics()
    with pytest.raises(error, match=message):
        advise_mix(torch.optim.SGD([x], lr=0.1), losses, **options)


def test_one_number_for_three_domains() -> None:
    x, _, losses = _quadratics(3)
    with pytest.raises(ValueError, match=r"0\.5 is one number, but 3 domains are mixed; give their weights"):
        advise_mix(torch.optim.SGD([x], lr=0.1), losses, ratios=[0.5, (1, 0, 0)])


def test_wrong_losses() -> None:
    x, _, losses = _quadratics()
    optimizer = torch.optim.SGD([x], lr=0.1)
    with pytest.raises(TypeError, match="losses must be a dict of at least 2"):
        advise_mix(optimizer, {"task0": losses["task0"]})
    with pytest.raises(TypeError, match=r"losses\['number'\] returned 1\.0, not a tensor of one element with a graph"):
        advise_mix(optimizer, {"number": lambda _: 1.0, **losses})  # type: ignore[dict-item,return-value]
    with pytest.raises(ValueError, match=r"losses\['nan'\] returned nan at the checkpoint"):
        advise_mix(optimizer, {"nan": lambda _: x.sum() * math.nan, **losses})
    with pytest.raises(ValueError, match=r"the gradient of losses\['root'\] on batch 0 is not finite"):
        advise_mix(optimizer, {"root": lambda _: x.abs().sqrt().sum(), **losses})
    with pytest.raises(ValueError, match="the loss of task 'nan' is not finite at the checkpoint"):
        advise_mix(optimizer, losses, tasks={"nan": lambda _: x.sum() * math.nan})


# -- the statistics -----------------------------------------------------------------------------------------


def _advice(sharpness: list[Any], **options: Any) -> MixAdvice:
    mixes = [(share, 1 - share) for share in np.linspace(0, 1, len(sharpness[0])).tolist()]
    tasks = [f"t{index}" for index in range(len(sharpness))]
    return MixAdvice.from_sharpness(["a", "b"], tasks, mixes, np.array(sharpness, dtype=float), **options)


def test_batches_that_agree_leave_no_doubt() -> None:
    advice = _advice([[[8, 8], [4, 4], [2, 2]], [[1, 1], [3, 3], [math.inf, math.inf]]])
    assert (advice.ratio, advice.interval, advice.undecided, advice.critical_lr) == (0.5, (0.5, 0.5), 0.0, 0.5)
    assert advice.curves[1].sharpness == [1, 3, math.inf]
    assert advice.curves[1].interval == [(1, 1), (3, 3), (math.inf, math.inf)]
    assert str(advice) == "advised mix: 0.5 a (0.5 to 0.5), 0.5 b (0.5 to 0.5); no task is hurt up to learning rate 0.5"


def test_batches_that_differ_widen_the_interval() -> None:
    # Each batch by itself has its lowest point at another mix.
    advice = _advice([[[1, 5, 9], [5, 1, 5], [9, 5, 1]]], level=0.99)
    assert advice.interval == (0.0, 1.0)
    assert advice.ratio == 0.5


def test_an_unsafe_batch_counts() -> None:
    # Of three batches one is infinite; the median is when at least two of three drawn are: 7 in 27.
    advice = _advice([[[1, 1, math.inf], [2, math.inf, math.inf]]])
    assert advice.ratio == 0.0
    both = (1 / 3) ** 3 + 3 * (1 / 3) ** 2 * (2 / 3)
    assert advice.undecided == pytest.approx(both, abs=4 * math.sqrt(both * (1 - both) / 2000))
    assert str(advice).endswith(f"; in {advice.undecided:.0%} of the resamples no mix was safe")


def test_the_middle_of_equal_mixes() -> None:
    assert _advice([[[2], [1], [1], [1], [2]]]).ratio == 0.5


def test_what_is_shown(tmp_path: Path) -> None:
    advice = _advice([[[8], [4], [2]], [[1], [3], [math.inf]]])
    assert advice.table().splitlines() == [
        "  a    b  sharpness of t0  sharpness of t1  largest",
        "  0    1                8                1        8",
        "0.5  0.5                4                3        4  advised",
        "  1    0                2              inf      inf",
    ]
    assert advice.rows()[5] == {
        "a": 1.0, "b": 0.0, "task": "t1", "sharpness": math.inf, "lower": math.inf, "upper": math.inf
    }  # fmt: skip
    written = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert written["curves"][1]["sharpness"] == [1, 3, None]
    assert written["intervals"] == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    advice.plot(tmp_path / "mix.png")
    assert (tmp_path / "mix.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "slimadam.curvature.plots", raising=False)
    with pytest.raises(ImportError, match=r"plots of sharpness need matplotlib: pip install 'slimadam\[cli\]'$"):
        _advice([[[2], [1]]]).plot(tmp_path / "mix.png")
