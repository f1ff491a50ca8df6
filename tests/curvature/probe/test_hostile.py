"""What closures, parameters and signals may do to a measurement without harm."""

from __future__ import annotations

import gc
import math
import signal
import weakref
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from slimadam import CriticalSharpness
from slimadam.curvature.probe import signals
from slimadam.curvature.probe.directions import pending_directions
from slimadam.curvature.probe.displacement import Memory
from slimadam.curvature.probe.line import LineProbe

MODES: list[Memory] = list(get_args(Memory))


def linear(make: Callable[[Any], Optimizer] = AdamW) -> tuple[nn.Linear, Optimizer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)

    def closure() -> Tensor:
        return layer(x).square().mean()

    closure().backward()
    return layer, make(layer.parameters()), closure


def probe_or_refuse(optimizer: Optimizer, memory: Memory, closure: Callable[[], Any]) -> None:
    """Bit-exact, or one clear error before anything has moved: both keep the promise."""
    try:
        with LineProbe(optimizer, memory, modules=[]) as line:
            for eta in (0.0, 0.5, 0.25):
                line.loss(closure, eta)
    except (ValueError, RuntimeError) as error:
        assert memory == "lean" and "memory=" in str(error)  # noqa: PT017, PT018


@pytest.mark.parametrize("memory", MODES)
def test_a_closure_that_writes_to_parameters(memory: Memory) -> None:
    embedding = nn.Embedding(10, 8, max_norm=1.0)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.arange(6)).sum().backward()
    before = embedding.weight.detach().clone()
    probe_or_refuse(optimizer, memory, lambda: embedding(torch.arange(6)).sum())
    assert torch.equal(embedding.weight.detach(), before)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("second", [slice(0, 12), slice(4, 16)])
def test_parameters_that_share_memory(memory: Memory, second: slice) -> None:
    flat = torch.randn(20)
    params = [nn.Parameter(flat[:12]), nn.Parameter(flat[second])]
    for param in params:
        param.grad = torch.randn(12)
    before = flat.clone()
    probe_or_refuse(AdamW(params), memory, lambda: 0.0)
    assert torch.equal(flat, before)


@pytest.mark.parametrize("memory", MODES)
def test_a_buffer_that_is_a_view_of_a_parameter(memory: Memory) -> None:
    layer, optimizer, closure = linear()
    layer.register_buffer("view", layer.weight.data[:2])
    before = layer.weight.detach().clone()
    try:
        with LineProbe(optimizer, memory) as line:
            line.loss(closure, 0.5)
    except ValueError as error:
        assert "memory=" in str(error)  # noqa: PT017
    assert torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize("memory", MODES)
def test_a_closure_that_moves_parameters_to_other_memory(memory: Memory) -> None:
    """As ``rnn.flatten_parameters()`` in a forward pass does on CUDA: ``param.set_(...)``."""
    layer, optimizer, closure = linear()
    before = layer.weight.detach().clone()
    with LineProbe(optimizer, memory) as line:
        expected = [line.loss(closure, eta) for eta in (0.5, 0.0, 0.25, 0.5)]

    def swapping() -> Tensor:
        for param in layer.parameters():
            param.set_(param.detach().clone())  # type: ignore[call-overload]
        return closure()

    with LineProbe(optimizer, memory) as line:
        found = [line.loss(swapping, eta) for eta in (0.5, 0.0, 0.25, 0.5)]
    assert torch.equal(layer.weight.detach(), before)
    assert found == expected


class Cached(nn.Module):
    def __init__(self, declared: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if declared:
            self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "cache", None) is None:
            self.register_buffer("cache", self.layer.weight.detach().clone())
        return self.layer(x) + x @ self.cache


@pytest.mark.parametrize("declared", [False, True])
def test_a_buffer_that_the_closure_creates_is_gone(declared: bool) -> None:
    model, x = Cached(declared), torch.randn(4, 3)
    model.layer(x).sum().backward()
    before = dict(model._buffers)
    with LineProbe(AdamW(model.parameters())) as line:
        line.loss(lambda: model(x).square().mean(), 1.0)
    assert dict(model._buffers) == before


def test_an_expanded_buffer() -> None:
    layer, optimizer, closure = linear()
    layer.register_buffer("mask", torch.ones(1, 3).expand(4, 3))
    assert CriticalSharpness(optimizer).measure(closure).status == "found"


def test_a_buffer_that_grows() -> None:
    layer, optimizer, closure = linear()
    layer.register_buffer("grown", torch.zeros(1))
    layer.register_buffer("count", torch.zeros(()))

    def growing() -> Tensor:
        layer.grown.data = torch.cat([layer.grown, torch.ones(1)])
        layer.count += 1
        return closure()

    CriticalSharpness(optimizer).measure(growing)
    assert layer.grown.tolist() == [0.0]
    assert layer.count == 0


@pytest.mark.parametrize("memory", MODES)
def test_nothing_is_held_between_measurements(memory: Memory) -> None:
    layer, optimizer, closure = linear()
    probe = CriticalSharpness(optimizer, memory=memory)
    probe.measure(closure)
    assert layer.weight.grad is not None
    grad = weakref.ref(layer.weight.grad)
    optimizer.zero_grad()
    gc.collect()
    assert grad() is None


@pytest.mark.parametrize("memory", MODES)
def test_rates_that_float32_cannot_hold(memory: Memory) -> None:
    _, optimizer, _ = linear()
    found = CriticalSharpness(optimizer, memory=memory, max_forwards=2000).measure(lambda: 1.0)
    assert (found.status, found.sharpness) == ("no increase", 0.0)


@pytest.mark.parametrize(("scale", "status"), [(0.0, "no increase"), (math.nan, "no descent")])
def test_a_direction_of_zeros_or_nan_is_told(scale: float, status: str) -> None:
    layer, optimizer, closure = linear(lambda p: torch.optim.SGD(p, lr=0.1))
    for param in layer.parameters():
        assert param.grad is not None
        param.grad.mul_(scale)
    found = CriticalSharpness(optimizer).measure(closure)
    assert found.status == status
    assert found.forward_passes < 40


def classifier(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(128, 32), torch.randint(0, 10, (128,))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(x), y)

    return model, closure


@pytest.mark.parametrize("lr", [1e-7, 1e-9])
def test_rounding_of_bfloat16_is_no_crossing(lr: float) -> None:
    for seed in range(8):
        model, closure = classifier(seed)
        closure().backward()
        expected = CriticalSharpness(AdamW(model.parameters(), 1e-2)).measure(closure).critical_lr
        found = CriticalSharpness(AdamW(model.parameters(), lr), max_forwards=80).measure(closure)
        assert found.critical_lr == pytest.approx(expected, rel=1 / 8)


def test_rounding_of_bfloat16_is_no_descent() -> None:
    for seed in range(8):
        model, closure = classifier(seed)
        closure().backward()
        found = CriticalSharpness(AdamW(model.parameters()), max_forwards=80).measure(lambda: -closure())  # noqa: B023
        assert found.status == "no descent"


class Sign(Optimizer):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.sign(), alpha=group["lr"])


@pytest.mark.parametrize(("dtype", "lr"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 1e-5), (torch.float32, 1e-7)])
def test_a_step_tried_out_is_not_lost_in_rounding(dtype: torch.dtype, lr: float) -> None:
    param = nn.Parameter(torch.randn(1000, dtype=dtype))
    param.grad = torch.randn(1000, dtype=dtype)
    ((_, direction),) = pending_directions(Sign([param], lr))
    torch.testing.assert_close(direction.float(), param.grad.sign().float(), rtol=1e-4, atol=0)


class OwnStep(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_no_hook_of_the_process_runs_for_a_subclass() -> None:
    _, optimizer, _ = linear(OwnStep)
    seen: list[Any] = []
    handle = register_optimizer_step_post_hook(lambda *arguments: seen.append(arguments))
    list(pending_directions(optimizer))
    handle.remove()
    assert not seen


def test_forward_passes_never_exceed_the_limit() -> None:
    _, optimizer, _ = linear()
    losses = iter(np.random.default_rng(0).random(100).tolist())
    with pytest.warns(UserWarning, match="does not repeat itself"):
        found = CriticalSharpness(optimizer, max_forwards=5).measure(lambda: next(losses))
    assert found.forward_passes <= 5


@pytest.mark.parametrize("loss", [np.float32(1), np.int64(1), np.array(1.0)])
def test_numpy_numbers_are_numbers(loss: Any) -> None:
    _, optimizer, _ = linear()
    with LineProbe(optimizer) as line:
        assert line.loss(lambda: loss) == 1.0


@pytest.fixture
def received() -> Any:
    """What handlers of SIGHUP and SIGUSR1 receive; handlers are put back afterwards."""
    got: list[int] = []
    kept = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)}
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: got.append(number))
    yield got
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_one_signal_does_not_lose_the_next(received: list[int]) -> None:
    _, optimizer, _ = linear()
    with pytest.raises(KeyboardInterrupt), LineProbe(optimizer):
        list(map(signal.raise_signal, (signal.SIGINT, signal.SIGUSR1)))
    assert received == [signal.SIGUSR1]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("moment", ["hold", "release"])
def test_interrupted_while_handlers_change(
    moment: str, at: int, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after the first, second or third handler has been exchanged."""
    _, optimizer, closure = linear()
    probe, change, changes = LineProbe(optimizer), signal.signal, 0

    def changing(number: int, handler: Any) -> Any:
        nonlocal changes
        old = change(number, handler)
        changes += 1
        if changes == at:
            signal.raise_signal(signal.SIGINT)
        return old

    def go() -> None:
        if moment == "hold":
            monkeypatch.setattr(signals.signal, "signal", changing)
        with probe as line:
            line.loss(closure, 0.5)
            if moment == "release":
                monkeypatch.setattr(signals.signal, "signal", changing)

    with pytest.raises(KeyboardInterrupt):
        go()
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGUSR1, signal.SIGHUP]


def test_a_handler_kept_by_somebody_else_still_delivers(received: list[int]) -> None:
    """As DataLoader does for SIGCHLD: a handler installed inside the closure calls the one before it."""
    _, optimizer, closure = linear()

    def installing() -> Tensor:
        before: Any = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *arguments: before(*arguments))
        return closure()

    with LineProbe(optimizer) as line:
        line.loss(installing)
    signal.raise_signal(signal.SIGUSR1)
    assert received == [signal.SIGUSR1]


def test_two_probes_left_in_the_order_they_were_entered(received: list[int]) -> None:
    _, optimizer, _ = linear()
    first, second = LineProbe(optimizer), LineProbe(optimizer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    signal.raise_signal(signal.SIGUSR1)
    assert received == [signal.SIGUSR1]
