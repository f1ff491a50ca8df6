"""Autograd sees every step: a graph recorded before it is refused afterwards, as with torch's own optimizers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, Split
from slimadam.optim.step import dispatch
from tests.ranks import on_ranks
from tests.versions import needs_torch

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "reference": {"fused": False},
    "foreach": {"foreach": True},
    "compiled": {},
    "triton": {},
}
MOMENTA = (None, torch.bfloat16, "int8")
PLANS: dict[str, Any] = {
    "none": None,
    "factored": "factored",
    "rows": CompressionPlan({"w": Rule((1,), "mean"), "b": Rule()}),
    "columns": CompressionPlan({"w": Rule((0,), "mean"), "b": Rule()}),
}
REFUSED = "modified (by an )?in-?place"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    """One way to take a step."""
    if request.param == "triton":
        request.getfixturevalue("on_triton")
    return request.param


@pytest.fixture
def where(implementation: str, device: str) -> str:
    """The device of its tensors."""
    return device if implementation == "triton" else "cpu"


class Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (8, 6), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.b = nn.Parameter(torch.randn(shape[0], dtype=dtype))


def record(params: list[Tensor]) -> list[Tensor]:
    """Losses whose graphs need the parameters' values."""
    return [param.square().sum() for param in params]


def assert_refused(params: list[Tensor], losses: list[Tensor]) -> None:
    for param, loss in zip(params, losses, strict=True):
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(loss, param)


def step_and_check(optimizer: SlimAdam, params: list[Tensor], steps: int = 3) -> None:
    """Several steps: the first makes state, later ones repeat what was prepared."""
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        losses = record(params)
        versions = state_versions(optimizer)
        optimizer.step()
        assert_refused(params, losses)
        assert not [key for key, tensor, before in versions if tensor._version == before]


def state_versions(optimizer: SlimAdam) -> list[tuple[str, Tensor, int]]:
    """Of every tensor in the state."""
    return [(key, tensor, tensor._version) for state in optimizer.state.values() for key, tensor in state.items()]


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_from_before_the_step_is_refused(
    implementation: str, where: str, plan: str, momentum_dtype: Any
) -> None:
    layer = Layer().to(where)
    options = IMPLEMENTATIONS[implementation]
    optimizer = SlimAdam(layer, plan=PLANS[plan], momentum_dtype=momentum_dtype, **options)
    assert optimizer.backend("w") in (implementation, "reference")
    step_and_check(optimizer, [layer.w, layer.b])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_in_every_precision(implementation: str, where: str, dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype).to(where)
    optimizer = SlimAdam(layer, plan="factored", bf16_stochastic_round=True, **IMPLEMENTATIONS[implementation])
    step_and_check(optimizer, [layer.w, layer.b])


def test_complex_amsgrad_and_large_parameters(implementation: str, where: str) -> None:
    options = IMPLEMENTATIONS[implementation]
    rows = 11 if implementation == "triton" else 1100  # the interpreter is slow
    large, small = (
        nn.Parameter(torch.randn(rows, 1000).to(where)),
        nn.Parameter(torch.randn(5, 4, dtype=torch.complex64).to(where)),
    )
    optimizer = SlimAdam([("large", large)], plan=None, amsgrad=True, **options)
    step_and_check(optimizer, [large], steps=2)
    optimizer = SlimAdam([("small", small)], plan=None, **options)
    for _ in range(2):
        small.grad = torch.randn_like(small)
        loss = small.abs().square().sum()
        optimizer.step()
        assert_refused([small], [loss])


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
def test_parts_of_a_fused_weight(implementation: str, where: str, momentum_dtype: Any) -> None:
    weight = nn.Parameter(torch.randn(24, 16).to(where))
    parts = Split({"query": 8, "key": 8, "value": 8}).divide("w", (24, 16))
    forms = (Rule((1,), "mean"), Rule((0,), "mean"), Rule(form="factored"))
    rules = [replace(form, part=part, shape=part.shape) for part, form in zip(parts, forms, strict=True)]
    plan = CompressionPlan({f"w[{rule.part.label}]": rule for rule in rules if rule.part is not None})
    options = IMPLEMENTATIONS[implementation]
    optimizer = SlimAdam([("w", weight)], plan=plan, momentum_dtype=momentum_dtype, **options)
    step_and_check(optimizer, [weight])


def test_measuring_deciding_and_compressed(implementation: str, where: str) -> None:
    layer = Layer((64, 32)).to(where)
    plan = AutoPlan(calibration_steps=4, measurements=2, cutoff=0.0)
    optimizer = SlimAdam(layer, plan=plan, **IMPLEMENTATIONS[implementation])
    step_and_check(optimizer, [layer.w], steps=4)
    optimizer.zero_grad()
    step_and_check(optimizer, [layer.w, layer.b], steps=4)
    assert optimizer.plan is not None
    assert optimizer.plan.second_moments_saved > 0


def test_accumulated_gradients(implementation: str, where: str) -> None:
    layer = Layer().to(where)
    optimizer = SlimAdam(layer, plan="factored", **IMPLEMENTATIONS[implementation])
    params = [layer.w, layer.b]
    for _ in range(2):
        for loss in [*record(params), *record(params)]:
            loss.backward()
        late = record(params)
        optimizer.step()
        assert_refused(params, late)
        optimizer.zero_grad()
        sum(record(params)).backward()  # a graph of now is fine, twice too
        sum(record(params)).backward()


def test_the_classic_mistake_of_a_gan_loop(implementation: str, where: str) -> None:
    """The discriminator steps between the generator's forward and backward pass."""
    generator, discriminator = nn.Linear(4, 3).to(where), nn.Linear(3, 1).to(where)
    options = IMPLEMENTATIONS[implementation]
    of_generator, of_discriminator = (SlimAdam(one, plan="factored", **options) for one in (generator, discriminator))
    for _ in range(2):
        made = generator(torch.randn(5, 4).to(where))
        verdict = discriminator(made)
        discriminator(made.detach()).mean().backward()
        of_discriminator.step()
        with pytest.raises(RuntimeError, match=REFUSED):
            verdict.mean().backward()
        of_generator.zero_grad()
        discriminator(made).mean().backward()  # judged anew, as it should be
        of_generator.step()
        of_discriminator.zero_grad()


def test_what_has_no_gradient_keeps_its_graph(implementation: str, where: str) -> None:
    layer = Layer().to(where)
    optimizer = SlimAdam(layer, plan="factored", **IMPLEMENTATIONS[implementation])
    for _ in range(3):
        layer.w.grad = torch.randn_like(layer.w)
        kept = record([layer.b])[0]
        optimizer.step()
        torch.autograd.grad(kept, layer.b)


def test_a_step_that_is_left_out_leaves_graphs_alone() -> None:
    """A GradScaler that found an infinite gradient."""
    layer = Layer()
    optimizer = SlimAdam(layer, plan="factored")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    params = [layer.w, layer.b]
    scaler.scale(sum(record(params))).backward()
    layer.w.grad.fill_(torch.inf)
    losses = record(params)
    scaler.step(optimizer)
    scaler.update()
    for param, loss in zip(params, losses, strict=True):
        torch.autograd.grad(loss, param)


def test_a_step_that_fails_half_way_is_seen(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    optimizer = SlimAdam(layer, plan=None, fused=False)
    layer.w.grad, layer.b.grad = torch.randn_like(layer.w), torch.randn_like(layer.b)

    def interrupted(*_: Any) -> None:
        layer.w.data.add_(1)
        raise KeyboardInterrupt

    losses = record([layer.w, layer.b])
    monkeypatch.setattr(dispatch.REFERENCE, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert_refused([layer.w, layer.b], losses)


def test_inference_mode_has_no_versions() -> None:
    with torch.inference_mode():
        layer = Layer()
        optimizer = SlimAdam(layer, plan="factored")
        for _ in range(3):
            layer.w.grad, layer.b.grad = torch.randn_like(layer.w), torch.randn_like(layer.b)
            before = layer.w.clone()
            optimizer.step()
            assert not torch.equal(before, layer.w)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile
@pytest.mark.parametrize("plan", [None, "factored"])
def test_a_compiled_step(plan: Any) -> None:
    layer = Layer()
    optimizer = SlimAdam(layer, plan=plan)
    step = torch.compile(optimizer.step, backend="aot_eager")
    params = [layer.w, layer.b]
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        losses = record(params)
        step()
        assert_refused(params, losses)


def _on_shards(plan: Any, options: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)]))
    optimizer = SlimAdam([("w", weight)], plan=plan, **options)
    for _ in range(3):
        weight.grad = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])
        whole, shard = weight.square().sum(), weight.to_local().square().sum()
        optimizer.step()
        for loss in (whole, shard):
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": False}], ids=str)
def test_sharded_parameters(options: dict[str, Any], tmp_path: Path) -> None:
    on_ranks(2, tmp_path, _on_shards, "factored", options)


@needs_torch((2, 7), "the mode fails on lists of tensors, with AdamW(foreach=True) too")
def test_a_mode_that_keeps_what_is_overwritten_sees_the_step(implementation: str, where: str) -> None:
    layer = Layer().to(where)
    optimizer = SlimAdam(layer, plan="factored", **IMPLEMENTATIONS[implementation])
    for _ in range(3):
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            for param in (layer.w, layer.b):
                param.grad = torch.randn_like(param)
            expected = 2 * layer.w.detach().clone()
            loss = layer.w.square().sum()
            optimizer.step()
            assert torch.equal(torch.autograd.grad(loss, layer.w)[0], expected)
            assert not torch.equal(2 * layer.w, expected)


def test_what_a_user_keeps_in_the_state_is_not_said_to_change(implementation: str, where: str) -> None:
    layer = Layer().to(where)
    optimizer = SlimAdam(layer, plan="factored", **IMPLEMENTATIONS[implementation])
    for _ in range(3):
        layer.w.grad, layer.b.grad = torch.randn_like(layer.w), torch.randn_like(layer.b)
        weight = torch.ones(8, 6, requires_grad=True)
        loss = (weight * optimizer.state[layer.w].get("average", torch.ones(8, 6))).sum()
        optimizer.step()
        torch.autograd.grad(loss, weight)
        optimizer.state[layer.w].setdefault("average", layer.w.detach().clone())
