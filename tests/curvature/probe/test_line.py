from __future__ import annotations

import gc
import random
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from slimadam import SlimAdam
from slimadam.curvature.probe.displacement import Memory, _Correction
from slimadam.curvature.probe.line import LineProbe
from tests.reference import gradients

SHAPES = [(5, 3), (64, 33), (7,), (2, 3, 4), (0, 4), (1,)]
MODES: list[Memory] = list(get_args(Memory))
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SlimAdam": lambda p: SlimAdam(p, lr=0.01, plan="factored", weight_decay=0.3),
    "SlimAdam int8": lambda p: SlimAdam(p, lr=0.01, plan="factored", momentum_dtype="int8"),
}


class Net(nn.Module):
    """Dropout, batch norm, an unused parameter, buffers that the forward pass exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 3)
        self.norm = nn.BatchNorm1d(9)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.second(F.dropout(torch.tanh(self.norm(self.first(x))), 0.3))


class Job:
    def __init__(self, name: str = "AdamW") -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.x, self.y = torch.randn(17, 6), torch.randint(3, (17,))
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        for _ in range(3):
            self.optimizer.zero_grad()
            self.closure().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.closure().backward()

    def closure(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def everything(self) -> list[Tensor]:
        """Copies of all that must stay as it is."""
        params = list(self.model.parameters())
        kept = [*self.model.state_dict().values(), *(param.grad for param in params if param.grad is not None)]
        state = [moment for own in self.optimizer.state.values() for moment in own.values()]
        drawn = [torch.get_rng_state(), torch.tensor(np.random.get_state()[1].astype(np.int64))]
        return [tensor.detach().clone() for tensor in (*kept, *state, *drawn, torch.tensor(random.getstate()[1]))]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_losses_are_those_of_the_step_and_nothing_changes(name: str, memory: Memory) -> None:
    job = Job(name)
    before = job.everything()
    grads = [param.grad for param in job.model.parameters()]
    versions = [param._version for param in job.model.parameters()]
    with LineProbe(job.optimizer, memory) as line:
        lr = job.optimizer.param_groups[0]["lr"]
        losses = {eta: line.loss(job.closure, eta) for eta in (0.0, lr, 1e3, 1e-7, 30.0, lr)}
        assert line.loss(job.closure, 0.0) == losses[0.0]
    assert same(before, job.everything())
    assert [param.grad for param in job.model.parameters()] == grads
    assert [param._version for param in job.model.parameters()] == versions
    assert job.closure().item() == losses[0.0]  # the next forward pass draws the mask that the probe drew
    expected = Job(name)
    mask = torch.get_rng_state()
    expected.optimizer.step()
    torch.set_rng_state(mask)
    assert expected.closure().item() == pytest.approx(losses[lr], rel=2e-6)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_parameters_come_back_bit_for_bit(memory: Memory, dtype: torch.dtype) -> None:
    values = [torch.randn(shape, dtype=dtype) * 10.0 ** (3 * index - 6) for index, shape in enumerate(SHAPES)]
    real = [torch.view_as_real(value) if value.is_complex() else value for value in values]
    for value in real:
        special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-30, -1e4], dtype=value.dtype)
        value.flatten()[: len(special)].copy_(special[: value.numel()])
        value.view(-1)[: min(6, value.numel())] = special[: value.numel()]
    params = [value.clone().requires_grad_() for value in values]
    params[1] = values[1].t().clone().t().requires_grad_()  # strides of its own
    optimizer = SlimAdam(params, lr=1e-3, plan="factored", weight_decay=0.1)
    for index, param in enumerate(params):
        param.grad = gradients(tuple(param.shape), 1, index)[0].to(dtype)
    addresses = [param.data_ptr() for param in params]
    with LineProbe(optimizer, memory, modules=[]) as line:
        for eta in (1e-12, 1e-3, 7.0, 1e8, float(np.float32(1e-38)), 0.3):
            line.loss(lambda: 0.0, eta)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for param, value in zip(params, values, strict=True):
        now, then = (torch.view_as_real(t) if t.is_complex() else t for t in (param.detach(), value))
        assert torch.equal(now.contiguous().view(bits[now.itemsize]), then.contiguous().view(bits[then.itemsize]))
    assert addresses == [param.data_ptr() for param in params]


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_closure_leaves_no_trace(memory: Memory, error: type[BaseException]) -> None:
    job = Job()
    before = job.everything()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand()
        loss = job.closure()
        if calls == 3:
            raise error
        return loss

    with pytest.raises(error), LineProbe(job.optimizer, memory) as line:
        _ = [line.loss(closure, eta) for eta in (0.0, 0.5, 0.25)]
    assert calls == 3
    assert same(before, job.everything())


@pytest.fixture
def no_collections() -> Iterator[None]:
    """What others do when the collector runs, Hypothesis for one, is called at no fixed place and loses interrupts."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.usefixtures("no_collections")
def test_interrupted_at_any_call(memory: Memory) -> None:
    """Ctrl-C wherever Python may deliver it: at each function called while probing."""
    job = Job()
    before = job.everything()
    moments = 0

    def count_or_interrupt(at: int) -> Callable[..., Any]:
        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal moments
            moments += 1
            if moments == at:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

        return profile

    def probe(at: int) -> None:
        nonlocal moments
        moments = 0
        try:
            with LineProbe(job.optimizer, memory, modules=[job.model]) as line:
                sys.setprofile(count_or_interrupt(at))
                for eta in (0.5, 0.0, 1.0):
                    line.loss(job.closure, eta)
        finally:
            sys.setprofile(None)

    probe(-1)
    total = moments
    assert total > 200
    for at in range(1, total, 37):
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            probe(at)
        assert signal.getsignal(signal.SIGINT) is handler
        assert same(before, job.everything()), at


def test_gradients_are_out_of_the_closures_reach() -> None:
    job = Job()
    before = job.everything()

    def closure() -> Tensor:
        job.optimizer.zero_grad(set_to_none=False)
        nn.utils.clip_grad_norm_(job.model.parameters(), 1e-6)
        with torch.enable_grad():
            loss = job.closure()
            loss.backward()
        return loss

    with LineProbe(job.optimizer, "lean") as line:
        line.loss(closure, 0.1)
        line.loss(closure, 0.2)
    assert same(before, job.everything())


def test_an_autocast_around_it_does_not_freeze_the_weights() -> None:
    job = Job()
    with torch.autocast("cpu", torch.bfloat16), LineProbe(job.optimizer) as line:
        job.closure()
        losses = {line.loss(job.closure, eta) for eta in (0.0, 0.1, 0.5)}
    assert len(losses) == 3


def test_a_retained_graph_stays_usable() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    loss = (weight @ torch.randn(3, 5)).tanh().pow(2).sum()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    weight.grad = grad.detach()
    with LineProbe(optimizer) as line:
        line.loss(lambda: weight.sum(), 0.1)
    assert torch.autograd.grad(grad.sum(), weight)[0].isfinite().all()


def test_the_mode_is_checked() -> None:
    decayed = torch.optim.SGD([torch.ones(2, requires_grad=True)], weight_decay=0.1)
    decayed.param_groups[0]["params"][0].grad = torch.ones(2)
    with pytest.raises(ValueError, match="memory='fast' must be 'copy', 'lean' or 'offload'"):
        LineProbe(decayed, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"that of SGD depends on its parameters' values .* use memory='copy'"):
        LineProbe(decayed, "lean").__enter__()
    with pytest.raises(RuntimeError, match="inside the with block"):
        LineProbe(decayed).loss(lambda: 0.0)


@pytest.mark.parametrize("returned", [torch.ones(2), torch.ones((), dtype=torch.complex64), None, "0.3", [0.3]])
def test_what_is_no_loss_is_refused(returned: Any) -> None:
    job = Job()
    before = job.everything()
    with pytest.raises(TypeError, match="the closure returned"), LineProbe(job.optimizer) as line:
        line.loss(lambda: returned, 0.1)
    assert same(before, job.everything())


def test_lean_keeps_about_a_byte_for_each_element() -> None:
    layer = nn.Linear(200, 300)
    optimizer = SlimAdam(layer, plan="factored")
    for param in layer.parameters():
        param.grad = torch.randn_like(param)
    elements = sum(param.numel() for param in layer.parameters())
    kept = {}
    for memory in MODES:
        with LineProbe(optimizer, memory) as line:
            line.loss(lambda: 0.0, 1e-3)
            kept[memory] = line.extra_bytes / elements
    assert kept["copy"] == 8
    assert kept["offload"] == 4  # on a CPU; none on the GPU
    assert 1 <= kept["lean"] <= 1.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_corrections_are_exact_for_every_pair_of_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for shift in (0, 1, 3, 100, 5000, 40000):
        estimate = every.roll(shift)
        found = _Correction.of(every, estimate).apply(estimate)
        assert torch.equal(found.view(torch.int16), every.view(torch.int16))
