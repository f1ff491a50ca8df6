"""The optimizer on the Triton kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is only installed on Linux")

from benchmarks.harness import stopwatch
from benchmarks.workloads.skeleton import skeleton
from slimadam import CompressionPlan, Rule, SlimAdam, Split
from slimadam.kernels.triton import kernels
from slimadam.utils.formatting import format_bytes
from tests.reference import gradients, slim_adamw_float64
from tests.versions import triton_device

DEVICE = triton_device()


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"variance_init": "gradient"}, {"maximize": True}], ids=str)
def test_the_optimizer_on_triton(options: dict[str, Any]) -> None:
    shapes = {"a": (7, 5), "b": (7, 5), "c": (5, 7), "d": (9,), "e": (3, 4, 5)}
    rules: dict[str, Any] = {"a": (1,), "b": (0,), "c": "factored", "d": (), "e": (1, 2)}
    if "amsgrad" in options:
        rules["c"] = (0, 1)
    plan = CompressionPlan(
        {name: Rule(form="factored") if dims == "factored" else Rule(dims, "mean" if dims else "full")
         for name, dims in rules.items()}
    )  # fmt: skip
    hyper: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **options}
    start = {name: torch.randn(shape).to(DEVICE) for name, shape in shapes.items()}
    grads = {name: gradients(shape, 5) for name, shape in shapes.items()}
    params = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = SlimAdam(list(params.items()), plan=plan, **hyper)
    assert {optimizer.backend(param) for param in params.values()} == {"triton"}
    for step in range(5):
        for name, param in params.items():
            param.grad = grads[name][step].float().to(DEVICE)
        optimizer.step()
    for name, param in params.items():
        singles = [grad.float().double().numpy() for grad in grads[name]]
        expected = slim_adamw_float64(start[name].double().cpu().numpy(), singles, rules[name], **hyper)
        np.testing.assert_allclose(param.detach().double().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
        assert optimizer.state[param]["step"] == 5


@pytest.mark.usefixtures("on_triton")
def test_what_the_kernels_do_not_take_is_visible_and_right() -> None:
    """Averages over dimensions that are not adjacent."""
    shape, dims = (3, 4, 5), (0, 2)
    param = torch.randn(shape).to(DEVICE).requires_grad_()
    start = param.detach().double().cpu().numpy().copy()
    optimizer = SlimAdam([("w", param)], plan=CompressionPlan({"w": Rule(dims, "mean")}), lr=1e-2, weight_decay=0.1)
    assert optimizer.backend("w") != "triton"
    grads = gradients(shape, 3)
    for grad in grads:
        param.grad = grad.float().to(DEVICE)
        optimizer.step()
    singles = [grad.float().double().numpy() for grad in grads]
    expected = slim_adamw_float64(start, singles, dims, lr=1e-2, weight_decay=0.1)
    np.testing.assert_allclose(param.detach().double().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "int8"], ids=str)
def test_resumes_to_the_last_bit_and_follows_new_gradients(momentum_dtype: Any) -> None:
    def build(params: dict[str, Tensor]) -> SlimAdam:
        return SlimAdam(
            list(params.items()), plan="factored", momentum_dtype=momentum_dtype, bf16_stochastic_round=True, lr=1e-2
        )

    def step(params: dict[str, Tensor], optimizer: SlimAdam, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()

    shapes = {"a": (16, 48), "b": (300,), "c": (7, 5)}
    params = {name: torch.randn(shape).to(DEVICE, torch.bfloat16).requires_grad_() for name, shape in shapes.items()}
    optimizer = build(params)
    for index in range(3):
        step(params, optimizer, index)
    copies = {name: param.detach().clone().requires_grad_() for name, param in params.items()}
    resumed = build(copies)
    resumed.load_state_dict(optimizer.state_dict())
    for index in range(3, 5):
        step(params, optimizer, index)
        step(copies, resumed, index)
    for name, param in params.items():
        assert torch.equal(param, copies[name])
        held, again = optimizer.state[param], resumed.state[copies[name]]
        assert list(held) == list(again)
        assert all(torch.equal(held[key], again[key]) for key in held)
    assert {optimizer.backend(param) for param in params.values()} == {"triton"}


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("moved", ["exp_avg", "exp_avg_sq_row", "step", "param", "grad"])
def test_tensors_that_have_moved_between_steps_are_followed(moved: str) -> None:
    """What they leave behind is overwritten, as other tensors would."""
    param = torch.randn(7, 5).to(DEVICE).requires_grad_()
    start = param.detach().double().cpu().numpy().copy()
    optimizer = SlimAdam([("w", param)], plan="factored", lr=1e-2, weight_decay=0.1)
    grads = gradients((7, 5), 4)
    left = []
    for grad in grads:
        param.grad = grad.float().to(DEVICE) if param.grad is None or moved == "grad" else param.grad.copy_(grad)
        optimizer.step()
        state = optimizer.state[param]
        if moved == "param":
            left.append(param.data)
            param.data = param.data.clone()
        elif moved != "grad":
            left.append(state[moved])
            state[moved] = state[moved].clone()
        for tensor in left:
            tensor.fill_(math.nan)
    singles = [grad.float().double().numpy() for grad in grads]
    expected = slim_adamw_float64(start, singles, "factored", lr=1e-2, weight_decay=0.1)
    np.testing.assert_allclose(param.detach().double().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert optimizer.state[param]["step"] == 4


@pytest.mark.usefixtures("on_triton")
def test_parts_of_a_fused_weight() -> None:
    """Query by rows, key by columns, value in full: one parameter, one step count."""
    weight = torch.randn(12, 8).to(DEVICE).requires_grad_()
    start = weight.detach().double().cpu().numpy().copy()
    sizes = {"query": 4, "key": 4, "value": 4}
    parts = Split(sizes).divide("w", (12, 8))
    dims: list[tuple[int, ...]] = [(1,), (0,), ()]
    plan = CompressionPlan(
        {f"w[{part.label}]": Rule(each, "mean" if each else "full", part.shape, part=part)
         for part, each in zip(parts, dims, strict=True)}
    )  # fmt: skip
    optimizer = SlimAdam([("w", weight)], plan=plan, lr=1e-2, weight_decay=0.1)
    assert optimizer.backend("w") == "triton"
    grads = gradients((12, 8), 4)
    for grad in grads:
        weight.grad = grad.float().to(DEVICE)
        optimizer.step()
    assert optimizer.state[weight]["step"] == 4
    for part, each in zip(parts, dims, strict=True):
        rows = slice(part.start, part.start + part.size)
        singles = [grad.float().double().numpy()[rows] for grad in grads]
        expected = slim_adamw_float64(start[rows], singles, each, lr=1e-2, weight_decay=0.1)
        np.testing.assert_allclose(weight.detach().double().cpu().numpy()[rows], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (None, {}),
        ("rules", {"amsgrad": True}),
        ("rules", {"momentum_dtype": "int8"}),
        ("factored", {}),
        ("factored", {"momentum_dtype": "int8"}),
    ],
    ids=str,
)
def test_memory_counts_what_the_kernels_keep(plan: Any, options: dict[str, Any]) -> None:
    shapes = {"a.weight": (40, 512), "b.weight": (1500, 32), "c.weight": (256,), "d.weight": (0, 4)}
    _assert_workspace_is_held(skeleton(shapes, DEVICE), 3, plan=plan, **options)


@pytest.mark.usefixtures("on_triton")
def test_memory_counts_tables_of_parts() -> None:
    """Parts share a step count, and each has its row of the table."""
    shape = (96, 256)
    parts = Split({"query": 32, "key": 32, "value": 32}).divide("a.weight", shape)
    forms: list[dict[str, Any]] = [{"dims": (1,), "form": "mean"}, {}, {"form": "factored"}]
    rules = {
        f"a.weight[{part.label}]": Rule(shape=part.shape, part=part, **form)
        for part, form in zip(parts, forms, strict=True)
    }
    _assert_workspace_is_held(skeleton({"a.weight": shape}, DEVICE), 3, plan=CompressionPlan(rules))


def _assert_workspace_is_held(model: nn.Module, rows: int, **options: Any) -> None:
    optimizer = SlimAdam(model, **options)
    memory = optimizer.memory()
    params = list(model.parameters())
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(2):
        optimizer.step()
    assert {optimizer.backend(param) for param in params} == {"triton"}
    assert optimizer.memory() == memory
    held = stopwatch.tensor_bytes(vars(optimizer)) - stopwatch.tensor_bytes(params)
    on_host = 8 * kernels.FIELDS.value * rows  # the table's copy, in which gradients are followed
    assert memory.workspace == held - memory.total - memory.monitor - on_host > 0
    assert f"; workspace beside it {format_bytes(memory.workspace)}" in str(memory)


def test_without_triton_there_is_no_workspace() -> None:
    memory = SlimAdam([("w", torch.randn(64, 32).requires_grad_())], plan="factored").memory()
    assert memory.workspace == 0
    assert "workspace" not in str(memory)


@pytest.mark.usefixtures("on_triton")
def test_grad_scaler_leaves_scaling_to_the_step() -> None:
    param = torch.ones(4, 8, device=DEVICE).requires_grad_()
    optimizer = SlimAdam([("w", param)], plan="factored", monitor=False)
    assert optimizer._step_supports_amp_scaling
    assert not SlimAdam([("w", param)], plan="factored")._step_supports_amp_scaling
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaler.scale((param * torch.tensor(math.inf, device=DEVICE)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.ones(4, 8, device=DEVICE))
    assert optimizer.state[param]["step"] == 0
    optimizer.zero_grad()
    weight = torch.arange(32.0, device=DEVICE).view(4, 8)
    scaler.scale((param * weight).sum()).backward()
    scaler.step(optimizer)
    expected = torch.ones(4, 8, device=DEVICE).requires_grad_()
    unscaled = SlimAdam([("w", expected)], plan="factored", monitor=False)
    expected.grad = weight.clone()
    unscaled.step()
    torch.testing.assert_close(param, expected, rtol=0, atol=1e-7)
    assert optimizer.state[param]["step"] == 1


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("shapes", [[(4, 8)], [(4, 8), (0, 8)], [(4, 8), (2, 3, 4)]], ids=str)
def test_grad_scaler_prepares_nothing_that_has_not_changed(
    shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, beside a parameter without elements, and beside one that Triton does not update."""
    dims = {2: (1,), 3: (0, 2)}
    params = [torch.randn(shape).to(DEVICE).requires_grad_() for shape in shapes]
    start = [param.detach().double().cpu().numpy().copy() for param in params]
    names = [f"w{number}" for number in range(len(params))]
    plan = CompressionPlan({name: Rule(dims[param.dim()], "mean") for name, param in zip(names, params, strict=True)})
    optimizer = SlimAdam(list(zip(names, params, strict=True)), plan=plan, monitor=False, lr=1e-2, weight_decay=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    grads = [gradients(shape, 4) for shape in shapes]
    for step in range(4):
        for param, each in zip(params, grads, strict=True):
            param.grad = scaler.scale(each[step].float().to(DEVICE))
        if step == 2:
            monkeypatch.setattr(type(optimizer._stepper), "_prepare", None)
        scaler.step(optimizer)
        scaler.update()
    for param, before, each in zip(params, start, grads, strict=True):
        if param.numel():
            singles = [grad.float().double().numpy() for grad in each]
            expected = slim_adamw_float64(before, singles, dims[param.dim()], lr=1e-2, weight_decay=0.1)
            np.testing.assert_allclose(param.detach().double().cpu().numpy(), expected, rtol=1e-5, atol=1e-5)
        assert optimizer.state[param]["step"] == 4
