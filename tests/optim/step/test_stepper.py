"""What a prepared step rests on may change between steps; each change is noticed, by every implementation."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.layers.splits import Part
from slimadam.optim.step.stepper import Stepper
from tests.versions import gradient_dtype

FUSED = ["reference", "compiled", "triton"]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> bool | None:
    """The option that picks the implementation; Triton's kernels run on a GPU or in their interpreter."""
    if request.param == "triton":
        request.getfixturevalue("on_triton")
    return {"reference": False, "compiled": None, "triton": None}[request.param]


@pytest.fixture
def where(request: pytest.FixtureRequest, device: str) -> str:
    """The device of its tensors."""
    return device if request.node.callspec.params["fused"] == "triton" else "cpu"


def _optimizer(param: Tensor, dims: Any = (1,), **options: Any) -> SlimAdam:
    rule = Rule(form="factored") if dims == "factored" else Rule(dims, "mean" if dims else "full")
    plan = CompressionPlan({"w": rule})
    return SlimAdam([("w", param)], lr=1e-2, weight_decay=0.1, monitor=False, plan=plan, **options)


def _step(param: Tensor, optimizer: SlimAdam, seed: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    param.grad = torch.randn(param.shape, generator=generator).to(param.device, dtype or param.dtype)
    optimizer.step()


def _change(param: Tensor, data: Tensor) -> None:
    param.grad = None
    param.data = data


def _both(
    change: Callable[[Tensor, SlimAdam], None], fused: bool | None, where: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """The parameter after a step, a change and a step; by the reference and by an implementation."""
    found = []
    for which in (False, fused):
        torch.manual_seed(1)
        param = torch.randn(8, 8).to(where, options.get("dtype", torch.float32)).requires_grad_()
        optimizer = _optimizer(param, fused=which, **{key: value for key, value in options.items() if key != "dtype"})
        _step(param, optimizer, 0)
        change(param, optimizer)
        _step(param, optimizer, 1)
        found.append(param.detach().double())
    return found[0], found[1]


@pytest.mark.parametrize("dims", [(), (1,), "factored"], ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
def test_a_parameter_may_change_its_precision(
    dims: Any, before: torch.dtype, after: torch.dtype, fused: bool | None, where: str
) -> None:
    expected, found = _both(
        lambda param, _: _change(param, param.data.to(after)), fused, where, dims=dims, dtype=before
    )
    coarsest = max(torch.finfo(before).eps, 16 * torch.finfo(torch.float32).eps)  # a first step may round either way
    torch.testing.assert_close(found, expected, rtol=1.01 * coarsest, atol=coarsest)


@pytest.mark.parametrize("dims", [(), (0,), (1,), "factored"], ids=str)
def test_a_parameter_may_change_its_strides(dims: Any, fused: bool | None, where: str) -> None:
    expected, found = _both(lambda param, _: _change(param, param.data.t()), fused, where, dims=dims)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_parameter_that_changes_its_shape_is_refused(fused: bool | None, where: str) -> None:
    param = torch.randn(8, 16).to(where).requires_grad_()
    optimizer = _optimizer(param, fused=fused)
    _step(param, optimizer, 0)
    _change(param, torch.randn(8, 32).to(where))
    with pytest.raises(RuntimeError, match=r"'w': its exp_avg has shape \(8, 16\), the parameter \(8, 32\)"):
        _step(param, optimizer, 1)


@gradient_dtype
def test_gradients_of_another_precision(fused: bool | None, where: str) -> None:
    found = []
    for which in (False, fused):
        torch.manual_seed(1)
        param = torch.randn(8, 16).to(where, torch.bfloat16).requires_grad_()
        param.grad_dtype = torch.float32
        optimizer = _optimizer(param, fused=which)
        _step(param, optimizer, 0, torch.float32)
        found.append(param.detach().double())
    torch.testing.assert_close(found[1], found[0], rtol=2**-7, atol=0)


def test_exchanged_state_is_used(fused: bool | None, where: str) -> None:
    def exchange(param: Tensor, optimizer: SlimAdam) -> None:
        state = optimizer.state[param]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = copy.deepcopy(state[key]) * 3

    expected, found = _both(exchange, fused, where)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_exchanged_averages_of_rows_are_used(fused: bool | None, where: str) -> None:
    def exchange(param: Tensor, optimizer: SlimAdam) -> None:
        assert optimizer.state[param]["exp_avg_sq_row"].shape == (8, 1)
        optimizer.state[param]["exp_avg_sq_row"] = torch.full((8, 1), 7.0, device=where)

    expected, found = _both(exchange, fused, where, dims="factored")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_exchanged_scales_of_codes_are_used(fused: bool | None, where: str) -> None:
    def exchange(param: Tensor, optimizer: SlimAdam) -> None:
        scales = optimizer.state[param]["exp_avg_scale"]
        optimizer.state[param]["exp_avg_scale"] = scales + 1
        scales.fill_(255)

    expected, found = _both(exchange, fused, where, momentum_dtype="int8")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_moments_that_lie_in_another_order(fused: bool | None, where: str) -> None:
    found = []
    for which in (False, fused):
        torch.manual_seed(1)
        param = torch.randn(4, 5, 6).to(where).requires_grad_()
        optimizer = _optimizer(param, fused=which)
        _step(param, optimizer, 0)
        saved = optimizer.state_dict()
        moment = saved["state"][0]["exp_avg_sq"]
        saved["state"][0]["exp_avg_sq"] = moment.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        optimizer.load_state_dict(saved)
        _step(param, optimizer, 1)
        found.append(param.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_codes_of_parts_that_are_no_whole_blocks(fused: bool | None, where: str) -> None:
    found = []
    for which in (False, fused):
        torch.manual_seed(1)
        param = torch.randn(30, 10).to(where).requires_grad_()
        rules = {
            f"w[{label}]": Rule((1,), "mean", (10, 10), part=Part(label, (30, 10), (30, 10), 0, 10 * index, 10))
            for index, label in enumerate("abc")
        }
        optimizer = SlimAdam(
            [("w", param)], plan=CompressionPlan(rules), momentum_dtype="int8", monitor=False, fused=which
        )
        for seed in range(3):
            _step(param, optimizer, seed)
        assert optimizer.state[param]["step"] == 3
        found.append(param.detach().clone())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_a_part_one_column_wide_is_not_averaged(fused: bool | None, where: str) -> None:
    param = torch.ones(4, 3).to(where).requires_grad_()
    rules = {
        f"w[{label}]": Rule((1,), "mean", (4, size), part=Part(label, (4, 3), (4, 3), 1, start, size))
        for label, start, size in (("a", 0, 1), ("b", 1, 2))
    }
    optimizer = SlimAdam(
        [("w", param)], lr=1e-2, weight_decay=0.0, monitor=False, plan=CompressionPlan(rules), fused=fused
    )
    param.grad = torch.tensor([[1.0, 1, 1], [10, 1, 1], [100, 1, 1], [1000, 1, 1]]).to(where)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4, 3), 0.99, device=where), rtol=0, atol=1e-6)


def test_parameters_that_left_are_let_go() -> None:
    param, other = torch.randn(4, 4).requires_grad_(), torch.randn(4, 4).requires_grad_()
    optimizer = _optimizer(param)
    _step(param, optimizer, 0)
    moment = weakref.ref(optimizer.state[param]["exp_avg"])
    optimizer.param_groups[0]["params"][0] = other
    optimizer.state.pop(param)
    _step(other, optimizer, 1)
    gc.collect()
    assert moment() is None


def test_grad_scaler_where_triton_falls_back(on_triton: str) -> None:
    """Gradients of another layout, which the kernels do not take: unscaled, and an infinite step left out."""
    for variance_init in ("zeros", "gradient"):
        param = torch.ones(6, 8, device=on_triton).requires_grad_()
        optimizer = _optimizer(param, variance_init=variance_init)
        scaler = torch.amp.GradScaler(on_triton, init_scale=64.0)
        scaler.scale(torch.zeros((), device=on_triton))
        param.grad = torch.full((8, 6), torch.inf, device=on_triton).t()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, torch.ones(6, 8, device=on_triton))
        scale = scaler.get_scale()
        param.grad = (torch.arange(48.0, device=on_triton).view(8, 6) * scale).t()
        scaler.step(optimizer)
        expected = torch.ones(6, 8, device=on_triton).requires_grad_()
        plain = _optimizer(expected, variance_init=variance_init, fused=False)
        expected.grad = torch.arange(48.0, device=on_triton).view(8, 6).t()
        plain.step()
        torch.testing.assert_close(param, expected, rtol=0, atol=1e-6)


def test_state_that_moves_is_followed(fused: bool | None, where: str) -> None:
    def move(_: Tensor, optimizer: SlimAdam) -> None:
        (state,) = optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].data = state[key] * 2

    first, second = _both(move, fused, where)
    torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-6)


def test_gradients_laid_out_differently(fused: bool | None, where: str) -> None:
    results = []
    for which in (False, fused):
        param = torch.arange(24.0).view(4, 6).to(where).requires_grad_()
        optimizer = _optimizer(param, fused=which)
        for step in range(4):
            param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step)).to(where).t()
            if step % 2:
                param.grad = param.grad.contiguous()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


class _Doubled(torch.Tensor):
    """A gradient of its own kind."""


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_steps(fused: bool | None, where: str, dtype: torch.dtype, momentum_dtype: Any) -> None:
    """Groups repeat their last step; gradients are missing, options change and rules too: each is as without it."""
    rules = {"a": Rule((1,), "mean"), "b": Rule((0,), "mean"), "c": Rule(form="factored"), "d": Rule()}

    def train(forgetful: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        params = {name: torch.randn(8, 32, generator=generator).to(where, dtype).requires_grad_() for name in rules}
        groups = [{"params": [(name, params[name]) for name in names]} for names in ("ab", "cd")]
        options = {"bf16_stochastic_round": dtype == torch.bfloat16, "momentum_dtype": momentum_dtype, "fused": fused}
        optimizer = SlimAdam(groups, plan=CompressionPlan(rules), lr=0.1, max_grad_norm=30.0, **options)
        for step in range(14):
            for number, param in enumerate(params.values()):
                param.grad = torch.randn(8, 32, generator=generator).to(where, dtype)
                if step in (3, 4) and number == step - 3:
                    param.grad = None
                if step == 6:
                    param.grad = param.grad.as_subclass(_Doubled)
            if step == 8:
                optimizer.param_groups[0]["maximize"] = True
            if step == 10:
                optimizer.param_groups[1]["lr"] = 0.3
            if step == 11:
                optimizer.expand("a")
            if forgetful:
                optimizer._stepper.forget()
            optimizer.step()
        return [param.detach() for param in params.values()]

    for ours, expected in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_what_has_not_changed_is_not_looked_at_again(
    fused: bool | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    param = torch.ones(4, 6).to(where).requires_grad_()
    optimizer = _optimizer(param, fused=fused)
    for step in range(2):
        _step(param, optimizer, step)
    monkeypatch.setattr(Stepper, "_prepare", lambda *_: pytest.fail("the group's last step was to be repeated"))
    before = param.detach().clone()
    _step(param, optimizer, 2)
    assert not torch.equal(param.detach(), before)


def test_no_gradient_is_kept_alive(fused: bool | None, where: str) -> None:
    param = torch.ones(4, 6).to(where).requires_grad_()
    optimizer = _optimizer(param, fused=fused)
    for step in range(3):
        _step(param, optimizer, step)
    assert param.grad is not None
    grad = weakref.ref(param.grad)
    param.grad = None
    gc.collect()
    assert grad() is None


def test_a_group_without_parameters_takes_its_step(fused: bool | None, where: str) -> None:
    param = torch.ones(4, 6).to(where).requires_grad_()
    groups = [{"params": [param]}, {"params": [], "weight_decay": 0.1}]
    optimizer = SlimAdam(groups, lr=0.1, weight_decay=0.0, plan="factored", fused=fused)
    for step in range(1, 4):
        param.grad = torch.ones(4, 6, device=where)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full((4, 6), 1 - 0.1 * step, device=where))


def test_a_moment_may_become_narrower_where_it_lies(fused: bool | None, where: str) -> None:
    def narrow(param: Tensor, optimizer: SlimAdam) -> None:
        _step(param, optimizer, 7)
        exp_avg = optimizer.state[param]["exp_avg"]
        before = exp_avg.clone()
        exp_avg.data = exp_avg.data.flatten().view(torch.bfloat16)[:64].view(8, 8)
        exp_avg.copy_(before)

    expected, found = _both(narrow, fused, where)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dims", [(), (0,), (1,), "factored"], ids=str)
@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_gradients_that_memory_does_not_hold(fused: bool | None, where: str, dims: Any, kind: str) -> None:
    results = []
    for which in (False, fused):
        param = torch.arange(24.0).view(4, 6).to(where).requires_grad_()
        optimizer = _optimizer(param, dims, fused=which)
        for step in range(5):
            grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(where)
            if step in (1, 2):
                grad = torch._neg_view(grad) if kind == "negated" else torch._efficientzerotensor((4, 6), device=where)
            param.grad = grad
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_groups_that_were_replaced_are_let_go(fused: bool | None, where: str) -> None:
    param = torch.ones(4, 6).to(where).requires_grad_()
    optimizer = _optimizer(param, fused=fused)
    replaced = []
    for step in range(5):
        replaced.append(optimizer.param_groups[0])
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.1 / (step + 1)}
        _step(param, optimizer, step)
    assert len(optimizer._stepper._caches) == 1


def test_states_that_were_exchanged_are_the_ones_that_move(fused: bool | None, where: str) -> None:
    """As checkpoint tools and offloading do: other dicts, or the same ones under other tensors."""
    param, other = (torch.arange(24.0).view(4, 6).to(where).requires_grad_() for _ in range(2))
    optimizer, plain = _optimizer(param, fused=fused), _optimizer(other, fused=False)
    for step in range(6):
        if step == 2:
            optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
        if step == 3:
            optimizer.state = defaultdict(dict, {param: dict(optimizer.state[param])})
        if step == 4:
            optimizer.state.pop(param)
            plain.state.pop(other)
        if step == 5:
            optimizer.state[param]["exp_avg"] = torch.ones(4, 6, device=where)
            plain.state[other]["exp_avg"] = torch.ones(4, 6, device=where)
        _step(param, optimizer, step)
        _step(other, plain, step)
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
        assert optimizer.state[param]["step"] == plain.state[other]["step"]


def test_what_a_user_keeps_in_a_state_is_no_matter_of_the_step(fused: bool | None, where: str) -> None:
    param, other = (torch.arange(24.0).view(4, 6).to(where).requires_grad_() for _ in range(2))
    optimizer, plain = _optimizer(param, fused=fused), _optimizer(other, fused=fused)
    for step in range(4):
        _step(param, optimizer, step)
        _step(other, plain, step)
        optimizer.state[param]["mask"] = torch.eye(4).to_sparse()
        optimizer.state[param]["seen"] = step
    torch.testing.assert_close(param, other, rtol=0, atol=0)


def test_a_sparse_gradient_after_dense_ones_is_refused_before_anything_moves(fused: bool | None, where: str) -> None:
    param = torch.ones(4, 6).to(where).requires_grad_()
    optimizer = _optimizer(param, fused=fused)
    for step in range(2):
        _step(param, optimizer, step)
    before, param.grad = param.detach().clone(), torch.eye(4, 6).to(where).to_sparse()
    with pytest.raises(RuntimeError, match="SlimAdam does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 2


def test_a_step_like_the_last_one_calls_little_python() -> None:
    params = [torch.randn(3, 4).requires_grad_() for _ in range(100)]
    optimizer = SlimAdam([(f"w{number}", param) for number, param in enumerate(params)], plan="factored")
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    optimizer.step()
    sys.setprofile(None)
    assert calls.count("call") <= 200


@pytest.mark.parametrize("frozen", ["some", "a group", "in turn"])
def test_parameters_without_a_gradient_leave_the_others_their_short_way(frozen: str) -> None:
    results, calls = [], 0
    for fused in (None, False):
        params = [torch.arange(12.0).view(3, 4).add(number).requires_grad_() for number in range(100)]
        groups = [{"params": [(f"{half}{at}", param) for at, param in enumerate(params[half::2])]} for half in (0, 1)]
        optimizer = SlimAdam(groups, plan="factored", lr=1e-2, fused=fused, monitor=False)
        for step in range(5):
            for number, param in enumerate(params):
                moves = {"some": number % 3 > 0, "a group": number % 2 > 0, "in turn": (number + step) % 2 > 0}[frozen]
                param.grad = torch.full((3, 4), 0.1 * step + number) if moves else None
            calls = 0

            def count(frame: Any, event: str, argument: Any) -> None:
                nonlocal calls
                calls += event == "call"

            sys.setprofile(count if fused is None else None)
            optimizer.step()
            sys.setprofile(None)
        results.append(
            [
                *(param.detach() for param in params),
                *(optimizer.state[one]["step"] for one in params if one in optimizer.state),
            ]
        )
        if fused is None and frozen != "in turn":
            assert calls <= 200
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_negated_when_read_is_an_exception() -> None:
    param = torch.randn(64, 64).requires_grad_()
    optimizer = SlimAdam([param], plan=None)
    used = []
    for step in range(4):
        grad = torch.randn(64, 64)
        param.grad = torch._neg_view(grad) if step == 1 else grad
        optimizer.step()
        used.append(optimizer._stepper._prepared[id(param)].tasks[0].backend.name)
    assert used == ["compiled", "reference", "compiled", "compiled"]


def test_a_shared_count_is_counted_for_each_parameter_also_after_steps_of_one() -> None:
    first, second = torch.randn(8, 8).requires_grad_(), torch.randn(4, dtype=torch.complex64).requires_grad_()
    optimizer = SlimAdam([first, second], plan=None, monitor=False)
    for moves, stays in ((first, second), (second, first)):
        moves.grad, stays.grad = torch.ones_like(moves), None
        optimizer.step()
    optimizer.state[second]["step"] = optimizer.state[first]["step"]
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert float(optimizer.state[first]["step"]) == 3


def test_state_that_was_removed_is_freed_when_another_implementation_takes_over() -> None:
    param = torch.randn(8, 8).requires_grad_()
    optimizer = SlimAdam([param], plan=None, monitor=False)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = weakref.ref(optimizer.state[param]["exp_avg_sq"])
    optimizer.param_groups[0]["foreach"] = True
    optimizer.state.pop(param)
    optimizer.step()
    gc.collect()
    assert held() is None


def test_options_of_a_wrong_type_put_there_by_hand(fused: bool | None) -> None:
    param = torch.randn(8, 8).requires_grad_()
    optimizer = SlimAdam([param], plan=None, fused=fused)
    param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["eps"] = "1e-3"
    with pytest.raises(TypeError):
        optimizer.step()
