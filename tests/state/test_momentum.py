"""Optimizers whose first moments are stored in 8 bits or in bfloat16: their steps, and what they hold."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, Split
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.kernels.reference import reference_update
from slimadam.optim.step import dispatch
from slimadam.state import int8
from tests.reference import Array, gradients, train
from tests.state.test_int8 import encoded, oracle_decoded

FLOAT32 = np.finfo(np.float32)
NARROW: list[Any] = [torch.bfloat16, "int8"]


# -- trajectories ----------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {"full": (), "mean": (1,), "factored": "factored"}


def _plan(form: Any) -> CompressionPlan:
    rule = Rule(form="factored") if form == "factored" else Rule(form, "mean") if form else Rule()
    return CompressionPlan({"w": rule})


def _trajectory_float64(param: Array, grads: list[Array], form: Any, options: dict[str, Any]) -> Array:
    """The update as in :mod:`tests.reference`, its first moment through the oracle after each step."""
    beta1, beta2 = options["betas"]
    axes = [(1,), (0,)] if form == "factored" else [form]
    moments = [np.zeros_like(_mean(param, over)) for over in axes]
    m, largest = np.zeros_like(param), np.zeros_like(moments[0])
    for t, given in enumerate(grads, start=1):
        g = -given if options.get("maximize") else given
        m = beta1 * m + (1 - beta1) * g
        moments = [beta2 * v + (1 - beta2) * _mean(g**2, over) for v, over in zip(moments, axes, strict=True)]
        v = moments[0] if len(moments) == 1 else moments[0] * moments[1] / moments[0].mean()
        if options.get("amsgrad"):
            largest = v = np.maximum(largest, v)
        step = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + options["eps"])
        param = param * (1 - options["lr"] * options["weight_decay"]) - options["lr"] * step
        m = oracle_decoded(m, g)
    return param


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return x.mean(axis=axes, keepdims=True) if axes else x


@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": False}])
@pytest.mark.parametrize("form", FORMS)
def test_trajectory_is_that_of_a_float64_reference_with_the_oracles_code(form: str, extra: dict[str, Any]) -> None:
    if form == "factored" and "amsgrad" in extra:
        extra = {"maximize": True, "fused": False}
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **extra}
    param = torch.randn(19, 23, dtype=torch.float64).float()
    grads = [grad.float().double() for grad in gradients((19, 23), 10)]
    for grad in grads:
        grad[3:5] = 0
    copies, _ = train(
        [param],
        lambda params: SlimAdam([("w", params[0])], plan=_plan(FORMS[form]), momentum_dtype="int8", **options),
        [[grad] for grad in grads],
    )
    expected = _trajectory_float64(param.double().numpy(), [grad.numpy() for grad in grads], FORMS[form], options)
    # Ten steps of at most lr, each with some float32 roundings.
    tolerance = 10 * 16 * FLOAT32.eps * (np.abs(expected).max() + 1e-2)
    np.testing.assert_allclose(copies[0].detach().double().numpy(), expected, rtol=0, atol=tolerance)


def _parts_plan(model: nn.Module) -> CompressionPlan:
    """Two parts of the weight; with 32 columns 16 rows are two blocks, with 5 columns they are not."""
    rows = model.weight.shape[0]
    parts = Split({"query": 16, "key": rows - 16}).divide("weight", tuple(model.weight.shape))
    forms: Any = [{"dims": (1,), "form": "mean"}, {"form": "factored"}]
    rules = {
        f"weight[{part.label}]": Rule(shape=part.shape, part=part, **form)
        for part, form in zip(parts, forms, strict=True)
    }
    return CompressionPlan(rules)


MODELS: dict[str, Any] = {
    "matrix": lambda: nn.Linear(33, 17),
    "image": lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
    "parts": lambda: nn.Linear(5, 40, bias=False),
    "parts of whole blocks": lambda: nn.Linear(32, 40, bias=False),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"plan": None},
    "auto": {"plan": AutoPlan(calibration_steps=3, measurements=1, cutoff=0.1)},
    "rules": {"plan": "rules"},
    "factored, reference": {"plan": "factored", "fused": False},
    "foreach": {"plan": "factored", "foreach": True},
    "capturable": {"plan": None, "capturable": True},
    "amsgrad": {"plan": None, "amsgrad": True, "maximize": True},
    "gradient-initialised": {"plan": "factored", "variance_init": "gradient"},
    "tensor lr": {"plan": None, "lr": torch.tensor(1e-2)},
}


def run(model: nn.Module, optimizer: SlimAdam, steps: range, requantised: bool = False) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.grad[0] = 0
        optimizer.step()
        if requantised:
            for param, state in optimizer.state.items():
                real = torch.view_as_real if param.is_complex() else torch.Tensor.detach
                exp_avg = real(state["exp_avg"])
                exp_avg.copy_(int8.decode(*encoded(exp_avg, real(param.grad))))


def same_state(one: SlimAdam, other: SlimAdam) -> bool:
    ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
    flat = [[entry for state in states.values() for entry in state.items()] for states in (ours, theirs)]
    return all(
        one == other and a.dtype == b.dtype and torch.equal(a, b) for (one, a), (other, b) in zip(*flat, strict=True)
    )


def with_plan(model: nn.Module, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"lr": 1e-2, **options, **({"plan": _parts_plan(model)} if "parts" in kind else {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_path_is_float32_momentum_encoded_and_decoded_after_each_step(
    option: str, kind: str, dtype: torch.dtype
) -> None:
    runs = []
    for momentum_dtype in ("int8", torch.float32):
        torch.manual_seed(5)
        model = MODELS[kind]().to(dtype)
        options = with_plan(model, kind, OPTIONS[option])
        if "parts" in kind and options.get("amsgrad"):
            options["amsgrad"] = False
        options["bf16_stochastic_round"] = dtype == torch.bfloat16 and option == "default"
        optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **options)
        run(model, optimizer, range(6), requantised=momentum_dtype != "int8")
        runs.append((model, optimizer))
    (coded, first), (plain, second) = runs
    assert first.plan == second.plan
    for one, other in zip(coded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        state = first.state[one]
        assert "exp_avg" not in state
        codes, scales = state["exp_avg_codes"], state["exp_avg_scale"]
        assert torch.equal(int8.decode(codes, scales), second.state[other]["exp_avg"])


def test_complex_parameters_are_two_real_ones() -> None:
    values = torch.randn(9, 17, dtype=torch.complex64)
    grads = [torch.randn(9, 17, dtype=torch.complex64) for _ in range(5)]

    def make(params: list[Tensor]) -> SlimAdam:
        return SlimAdam(params, lr=1e-2, plan=None, fused=False, momentum_dtype="int8")

    (whole,), optimizer = train([values], make, [[grad] for grad in grads])
    (apart,), other = train([torch.view_as_real(values)], make, [[torch.view_as_real(grad)] for grad in grads])
    assert torch.equal(torch.view_as_real(whole), apart)
    assert torch.equal(optimizer.state[whole]["exp_avg_codes"], other.state[apart]["exp_avg_codes"])
    assert optimizer.state[whole]["exp_avg_scale"].shape == (2,)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_update_direction_is_the_step_and_changes_nothing(kind: str, momentum_dtype: Any) -> None:
    model = MODELS[kind]()
    optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **with_plan(model, kind, {"plan": "factored"}))
    run(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    directions = [(param.detach().clone(), direction) for param, direction in optimizer.update_direction()]
    assert all(
        list(old) == list(new) and all(torch.equal(old[key], new[key]) for key in old)
        for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
    )
    optimizer.step()
    # The step rounds a bfloat16 moment before it is used, the direction does not have to: half a unit of 8 bits.
    tolerance = 2.0**-8 if momentum_dtype == torch.bfloat16 else 8 * FLOAT32.eps
    for (old, direction), param in zip(directions, model.parameters(), strict=True):
        torch.testing.assert_close(param, old - 1e-2 * direction, rtol=1e-6, atol=1e-2 * 10 * tolerance)


def decoded(state: Any) -> Tensor:
    if "exp_avg_scale" in state:
        return int8.decode(state["exp_avg_codes"], state["exp_avg_scale"])
    return state["exp_avg"]


# -- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [None, *NARROW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_memory_is_what_the_state_holds(amsgrad: bool, dtype: torch.dtype, momentum_dtype: Any) -> None:
    params = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in [(), (0, 3), (257,), (13, 64), (5, 3)]]
    optimizer = SlimAdam(params, plan=None, amsgrad=amsgrad, momentum_dtype=momentum_dtype)
    report = optimizer.memory()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    held = {
        key: sum(state[key].nbytes for state in optimizer.state.values() if key in state)
        for key in ("step", "exp_avg", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq", "max_exp_avg_sq")
    }
    assert report.exp_avg == held["exp_avg"] + held["exp_avg_codes"] + held["exp_avg_scale"]
    assert (held["exp_avg"] == 0) == (momentum_dtype == "int8")
    assert report.total == sum(held.values())
    assert optimizer.memory() == report
    if momentum_dtype == "int8":
        elements = [param.numel() * (2 if dtype.is_complex else 1) for param in params]
        assert report.exp_avg == sum(count + -(-count // 256) for count in elements)


# -- around it -------------------------------------------------------------------------------------------


class _Subclass(Tensor):
    pass


def test_tensor_subclasses_are_refused_before_anything_moves() -> None:
    plain = torch.ones(3, requires_grad=True)
    strange = nn.Parameter(torch.ones(3).as_subclass(_Subclass))
    optimizer = SlimAdam([("plain", plain), ("strange", strange)], plan=None, momentum_dtype="int8")
    plain.grad, strange.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="'strange': momentum_dtype='int8' does not support _Subclass"):
        optimizer.step()
    assert torch.equal(plain, torch.ones(3))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
def test_a_compiled_step_is_the_eager_one(momentum_dtype: Any, backend: str) -> None:
    runs = []
    for compiled in (False, True):
        torch.manual_seed(5)
        model = MODELS["matrix"]()
        optimizer = SlimAdam(model, plan="factored", fused=False, momentum_dtype=momentum_dtype, monitor=False)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend=backend)  # type: ignore[method-assign]
        run(model, optimizer, range(4))
        runs.append((model, optimizer))
    (eager, first), (traced, second) = runs
    for one, other in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=4 * FLOAT32.eps, atol=4 * FLOAT32.eps)
        torch.testing.assert_close(decoded(first.state[one]), decoded(second.state[other]))


def _takes_codes(entries: list[Entry], hyper: Hyperparameters) -> None:
    for entry in entries:
        assert entry.exp_avg_scale is not None
        value = int8.decode(entry.exp_avg, entry.exp_avg_scale)
        reference_update([entry._replace(exp_avg=value, exp_avg_scale=None)], hyper)
        int8.encode(value, entry.grad, entry.exp_avg, entry.exp_avg_scale)


def test_an_implementation_that_takes_codes_gets_whole_blocks_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, native in (("matrix", True), ("parts of whole blocks", True), ("parts", False)):
        runs = []
        for replaced in (False, True):
            torch.manual_seed(5)
            model = MODELS[kind]()
            optimizer = SlimAdam(
                model, momentum_dtype="int8", fused=False, **with_plan(model, kind, {"plan": "factored"})
            )
            seen: list[Entry] = []
            with monkeypatch.context() as patch:
                if replaced:

                    def update(entries: Any, hyper: Any, seen: list[Entry] = seen, native: bool = native) -> None:
                        seen += entries
                        (_takes_codes if native else reference_update)(entries, hyper)

                    patch.setattr(dispatch.REFERENCE, "reads_codes", True)
                    patch.setattr(dispatch.REFERENCE, "update", update)
                run(model, optimizer, range(3))
            assert all((entry.exp_avg.dtype == torch.int8) == native for entry in seen)
            assert bool(seen) == replaced
            runs.append((model, optimizer))
        (one, first), (other, second) = runs
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert same_state(first, second)
