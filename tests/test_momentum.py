"""First moments in 8 bits: the code against a float64 oracle, and the optimizer that uses it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import slimadam.stepping
from slimadam import AutoPlan, CompressionPlan, Parts, Rule, SlimAdam, convert_state_dict, momentum
from slimadam.functional import Entry, Hyperparameters, reference_update
from tests.reference import Array, gradients, train

FLOAT32 = np.finfo(np.float32)
SIZES = [0, 1, 2, 255, 256, 257, 600, 256 * 1025 + 3]
NARROW: list[Any] = [torch.bfloat16, "int8"]


# -- the oracle ------------------------------------------------------------------------------------------


def _oracle_exponent(block: Array) -> int:
    """What is added to -127 in the power of two that the absolute maximum is rounded up to; 0 is zero, 255 infinity."""
    largest = float(np.abs(block).max())
    if largest == 0:
        return 0
    if not np.isfinite(largest):
        return 255
    mantissa, exponent = np.frexp(largest)  # a mantissa in [0.5, 1)
    power = int(exponent) - (mantissa == 0.5)
    return min(max(power, -126) + 127, 255)


def _per_element(exponents: Array, size: int) -> Array:
    """Each block's scale, for each of its elements."""
    scales = np.array([0.0 if e == 0 else np.inf if e == 255 else 2.0 ** (int(e) - 127) for e in exponents])
    return np.repeat(scales, 256)[:size]


def _oracle(value: Array, grad: Array) -> tuple[Array, Array, Array]:
    """Codes before rounding, codes, and exponents of flat arrays."""
    starts = range(0, value.size, 256)
    exponents = np.array([_oracle_exponent(value[start : start + 256]) for start in starts])
    with np.errstate(all="ignore"):
        exact = 127 * np.sqrt(np.abs(value) / _per_element(exponents, value.size))
    exact[~np.isfinite(exact)] = 0
    codes = np.sign(value) * np.where(grad == 0, np.floor(exact), np.rint(exact))
    return exact, np.nan_to_num(codes), exponents


def _oracle_decoded(value: Array, grad: Array) -> Array:
    _, codes, exponents = _oracle(value.ravel(), grad.ravel())
    decoded: Array = np.sign(codes) * (codes / 127) ** 2 * _per_element(exponents, value.size)
    return decoded.reshape(value.shape)


def _encoded(value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    codes = momentum.new_codes(value)
    scales = momentum.new_scales(codes)
    momentum.encode(value, grad, codes, scales)
    return codes, scales


def _values(size: int) -> Tensor:
    """Twelve decades, so that blocks differ."""
    return torch.randn(size) * 10.0 ** torch.linspace(-6, 6, size)


# -- encode and decode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share_without_gradient", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_scales_are_the_oracles(size: int, share_without_gradient: float) -> None:
    value = _values(size)
    grad = torch.where(torch.rand(size) < share_without_gradient, 0.0, 1.0)
    codes, scales = _encoded(value, grad)
    exact, wanted, exponents = _oracle(value.double().numpy(), grad.double().numpy())
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.uint8
    assert np.array_equal(scales.numpy(), exponents)
    # Only where the exact code lies within float32's error of where rounding goes the other way may it be the other.
    turn = np.where(grad.numpy() == 0, np.rint(exact), np.floor(exact) + 0.5)
    # That is half a unit for the root and half for the product: dividing by a power of two rounds nothing.
    undecided = np.abs(exact - turn) <= 1.001 * FLOAT32.eps * exact
    off = np.abs(codes.double().numpy() - wanted)
    assert (off[~undecided] == 0).all()
    assert (off <= 1).all()
    decoded = momentum.decode(codes, scales).double().numpy()
    kept = codes.double().numpy()
    expected = np.sign(kept) * (kept / 127) ** 2 * _per_element(exponents, size)
    # Half a unit for the quotient, which counts twice, and half for the square.
    np.testing.assert_allclose(decoded, expected, rtol=1.501 * FLOAT32.eps)


@pytest.mark.parametrize("rounded_down", [False, True])
def test_the_error_is_bounded_by_half_a_code_or_a_whole_one(rounded_down: bool) -> None:
    value = _values(10_000)
    codes, scales = _encoded(value, torch.zeros_like(value) if rounded_down else value)
    scale = torch.from_numpy(_per_element(scales.numpy(), 10_000))
    error = (momentum.decode(codes, scales).double() - value.double()).abs()
    exact = 127 * (value.double().abs() / scale).sqrt()
    # q = t + d with |d| <= w changes (t / 127)**2 by (2 t d + d**2) / 127**2.
    width = 1.0 if rounded_down else 0.5
    bound = scale * (2 * width * exact + width**2) / 127**2
    assert (error <= bound * (1 + 1e-5) + 4 * FLOAT32.eps * value.double().abs()).all()
    # The scale is less than twice the largest: a hundredth of the largest is 127 / 200**0.5 or more before rounding.
    largest = torch.stack([block.abs().max() for block in value.split(256)]).double()
    hundredth = largest.repeat_interleave(256)[:10_000] / 100
    least = 127 / 200**0.5
    relative = (2 * width * least + width**2) / least**2
    assert (error <= relative * (1 + 1e-5) * torch.maximum(value.double().abs(), hundredth)).all()


@pytest.mark.parametrize("largest", [1e30, 1.2e38, 2.0**127, 1e-30, 1e-37, 2.0**-126, 1e-38, 1e-40, 1e-45])
def test_blocks_of_every_magnitude(largest: float) -> None:
    value = torch.linspace(-1, 1, 300) * largest
    value[0] = largest
    codes, scales = _encoded(value, value)
    exact, wanted, exponents = _oracle(value.double().numpy(), np.ones(300))
    assert np.array_equal(scales.numpy(), exponents)
    assert 0 < scales.min() <= scales.max() < 255
    assert np.abs(codes.double().numpy() - wanted).max() <= (np.abs(exact - np.floor(exact) - 0.5) < 1e-4).any()
    decoded, kept = momentum.decode(codes, scales).double().numpy(), codes.double().numpy()
    expected = np.sign(kept) * (kept / 127) ** 2 * _per_element(exponents, 300)
    # Below 2**-126 floats are 2**-149 apart.
    np.testing.assert_allclose(decoded, expected, rtol=1.501 * FLOAT32.eps, atol=2.0**-150)


def test_a_block_of_zeros_is_zero_and_one_that_is_not_finite_reads_as_nan() -> None:
    value = torch.ones(6 * 256)
    value[:256] = 0
    value[256] = float("nan")
    value[512] = float("inf")
    value[768] = -float("inf")
    value[1024] = -(2.0**127 + 2.0**104)  # the next above 2**127: rounded up it is infinity
    codes, scales = _encoded(value, value)
    assert scales.tolist() == [0, 255, 255, 255, 255, 127]
    assert not codes[: 5 * 256].any()
    decoded = momentum.decode(codes, scales).view(6, 256)
    assert not decoded[0].any()
    assert decoded[1:5].isnan().all()
    assert torch.equal(decoded[5], torch.ones(256))


def test_scales_are_powers_of_two_not_below_the_largest() -> None:
    powers = 2.0 ** np.arange(-126, 128)
    above = np.nextafter(powers.astype(np.float32), np.float32(np.inf))
    below = np.nextafter(powers.astype(np.float32), np.float32(0))
    for offset, largest in ((1, powers), (2, above), (1, below)):
        value = torch.from_numpy(largest.astype(np.float32)).repeat_interleave(256)
        codes, scales = _encoded(value, value)
        assert scales.tolist() == list(range(offset, offset + 254))
        finite = scales < 255
        assert (codes.view(254, 256)[finite, 0] == (90 if offset == 2 else 127)).all()


def test_a_gpus_nan_does_not_overflow_when_rounded_up() -> None:
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert momentum._exponent_above(all_ones).tolist() == [255, 255]


def test_blocks_follow_the_memory_and_not_the_dimensions() -> None:
    value = _values(3 * 5 * 7 * 4).view(3, 5, 7, 4).to(memory_format=torch.channels_last)
    codes, scales = _encoded(value, value.contiguous())
    assert codes.stride() == value.stride()
    flat = value.permute(0, 2, 3, 1).reshape(-1)
    expected, expected_scales = _encoded(flat, flat)
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(-1), expected)
    assert torch.equal(scales, expected_scales)
    decoded = momentum.decode(codes, scales)
    assert decoded.stride() == value.stride()
    assert torch.equal(decoded.permute(0, 2, 3, 1).reshape(-1), momentum.decode(expected, expected_scales))


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_momentum_without_gradient_decays_to_zero(beta1: float) -> None:
    torch.manual_seed(3)
    embedding = nn.Embedding(40, 8)
    optimizer = SlimAdam(embedding, plan=None, betas=(beta1, 0.999), weight_decay=0.0, momentum_dtype="int8")
    for step in range(160):
        optimizer.zero_grad()
        tokens = torch.arange(40) if step == 0 else torch.arange(20, 40)
        (embedding(tokens) * torch.randn(len(tokens), 8)).sum().backward()
        before = embedding.weight.detach().clone()
        optimizer.step()
    first = optimizer.adamw_state_dict()["state"][0]["exp_avg"]
    # The root of beta1 takes every code down by at least one: 127 steps are enough.
    assert not first[:20].any()
    assert first[20:].all(1).any()
    assert torch.equal(embedding.weight[:20], before[:20])
    assert not torch.equal(embedding.weight[20:], before[20:])


def test_a_block_without_gradient_decays_as_fast_as_its_factor_says_and_reaches_zero() -> None:
    value = _values(256)
    none = torch.zeros(256)
    for _ in range(1000):  # 0.9**1000 of anything is less than 2**-149
        codes, scales = _encoded(value, none)
        decoded = momentum.decode(codes, scales)
        assert (decoded.abs() <= value.abs() * (1 + 4 * FLOAT32.eps)).all()
        value = 0.9 * decoded
    assert not codes.any()
    assert not scales.any()


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
        m = _oracle_decoded(m, g)
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
    parts = Parts({"query": 16, "key": rows - 16}).divide("weight", tuple(model.weight.shape))
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


def _run(model: nn.Module, optimizer: SlimAdam, steps: range, requantised: bool = False) -> None:
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
                exp_avg.copy_(momentum.decode(*_encoded(exp_avg, real(param.grad))))


def _same_state(one: SlimAdam, other: SlimAdam) -> bool:
    ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
    flat = [
        [tensor for state in states.values() for value in state.values() for tensor in _as_list(value)]
        for states in (ours, theirs)
    ]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*flat, strict=True))


def _as_list(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _with_plan(model: nn.Module, kind: str, options: dict[str, Any]) -> dict[str, Any]:
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
        options = _with_plan(model, kind, OPTIONS[option])
        if "parts" in kind and options.get("amsgrad"):
            options["amsgrad"] = False
        options["bf16_stochastic_round"] = dtype == torch.bfloat16 and option == "default"
        optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **options)
        _run(model, optimizer, range(6), requantised=momentum_dtype != "int8")
        runs.append((model, optimizer))
    (coded, first), (plain, second) = runs
    assert first.plan == second.plan
    for one, other in zip(coded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        state = first.state[one]
        assert torch.equal(momentum.decode(state["exp_avg"], state["exp_avg_scale"]), second.state[other]["exp_avg"])


def test_complex_parameters_are_two_real_ones() -> None:
    values = torch.randn(9, 17, dtype=torch.complex64)
    grads = [torch.randn(9, 17, dtype=torch.complex64) for _ in range(5)]

    def make(params: list[Tensor]) -> SlimAdam:
        return SlimAdam(params, lr=1e-2, plan=None, fused=False, momentum_dtype="int8")

    (whole,), optimizer = train([values], make, [[grad] for grad in grads])
    (apart,), other = train([torch.view_as_real(values)], make, [[torch.view_as_real(grad)] for grad in grads])
    assert torch.equal(torch.view_as_real(whole), apart)
    assert torch.equal(optimizer.state[whole]["exp_avg"], other.state[apart]["exp_avg"])
    assert optimizer.state[whole]["exp_avg_scale"].shape == (2,)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_update_direction_is_the_step_and_changes_nothing(kind: str, momentum_dtype: Any) -> None:
    model = MODELS[kind]()
    optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **_with_plan(model, kind, {"plan": "factored"}))
    _run(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    directions = [(param.detach().clone(), direction) for param, direction in optimizer.update_direction()]
    assert all(
        torch.equal(a, b)
        for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True)
        for key in old
        for a, b in zip(_as_list(old[key]), _as_list(new[key]), strict=True)
    )
    optimizer.step()
    # The step rounds a bfloat16 moment before it is used, the direction does not have to: half a unit of 8 bits.
    tolerance = 2.0**-8 if momentum_dtype == torch.bfloat16 else 8 * FLOAT32.eps
    for (old, direction), param in zip(directions, model.parameters(), strict=True):
        torch.testing.assert_close(param, old - 1e-2 * direction, rtol=1e-6, atol=1e-2 * 10 * tolerance)


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
        for key in ("step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "max_exp_avg_sq")
    }
    assert report.exp_avg == held["exp_avg"] + held["exp_avg_scale"]
    assert report.total == sum(held.values())
    assert optimizer.memory() == report
    if momentum_dtype == "int8":
        elements = [param.numel() * (2 if dtype.is_complex else 1) for param in params]
        assert report.exp_avg == sum(count + -(-count // 256) for count in elements)


# -- checkpoints -----------------------------------------------------------------------------------------


def _saved(optimizer: SlimAdam) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("option", ["auto", "factored, reference", "foreach"])
@pytest.mark.parametrize("stopped_at", [0, 2, 4])
def test_resumed_training_is_bitwise_the_same(option: str, kind: str, momentum_dtype: Any, stopped_at: int) -> None:
    model = MODELS[kind]()
    options = _with_plan(model, kind, OPTIONS[option])
    optimizer = SlimAdam(model, momentum_dtype=momentum_dtype, **options)
    _run(model, optimizer, range(stopped_at))
    resumed, saved = copy.deepcopy(model), _saved(optimizer)
    other = SlimAdam(resumed, momentum_dtype=momentum_dtype, **options)
    other.load_state_dict(saved)
    _run(model, optimizer, range(stopped_at, 7))
    _run(resumed, other, range(stopped_at, 7))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert _same_state(optimizer, other)


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_train_on_as_the_original(copied: Any, momentum_dtype: Any) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan="factored", momentum_dtype=momentum_dtype)
    _run(model, optimizer, range(2))
    other, its_optimizer = copied((model, optimizer))
    _run(model, optimizer, range(2, 5))
    _run(other, its_optimizer, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert _same_state(optimizer, its_optimizer)


def _decoded(state: Any) -> Tensor:
    if "exp_avg_scale" in state:
        return momentum.decode(state["exp_avg"], state["exp_avg_scale"])
    return state["exp_avg"]


@pytest.mark.parametrize("before", [None, *NARROW], ids=str)
@pytest.mark.parametrize("after", [None, *NARROW], ids=str)
def test_checkpoints_load_whatever_their_momentum_was_stored_in(before: Any, after: Any) -> None:
    model = MODELS["matrix"]()
    source = SlimAdam(model, plan="factored", momentum_dtype=before)
    _run(model, source, range(3))
    target = SlimAdam(model, plan="factored", momentum_dtype=after)
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["momentum_dtype"] == after
    for param in model.parameters():
        kept, loaded = _decoded(source.state[param]), target.state[param]
        if after == "int8" and before != "int8":
            assert torch.equal(loaded["exp_avg"], _encoded(kept.float(), kept.float())[0])
        elif after != "int8":
            assert "exp_avg_scale" not in loaded
            assert torch.equal(loaded["exp_avg"], kept.to(after or torch.float32))
        else:
            assert torch.equal(_decoded(loaded), kept)
    assert target.memory().total == sum(
        tensor.nbytes for state in target.state.values() for value in state.values() for tensor in _as_list(value)
    )
    _run(model, target, range(3, 4))


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_to_adamw_and_back(dtype: torch.dtype, momentum_dtype: Any) -> None:
    params = [torch.randn(7, 50, dtype=dtype).requires_grad_()]
    optimizer = SlimAdam(params, plan=None, momentum_dtype=momentum_dtype)
    for _ in range(3):
        params[0].grad = torch.randn_like(params[0])
        optimizer.step()
    adamw = torch.optim.AdamW(params)
    adamw.load_state_dict(optimizer.adamw_state_dict())
    adamw.step()
    adamw_state = adamw.state[params[0]]
    assert adamw_state["exp_avg"].dtype == dtype
    assert "exp_avg_scale" not in adamw_state
    optimizer.load_state_dict(adamw.state_dict())
    real = torch.view_as_real if dtype.is_complex else torch.Tensor.detach
    exact, loaded = real(adamw_state["exp_avg"]), _decoded(optimizer.state[params[0]])
    if momentum_dtype == "int8":
        expected = momentum.decode(*_encoded(exact.float(), exact.float()))
        assert torch.equal(loaded, expected)
    else:
        assert torch.equal(real(loaded), exact.to(real(loaded).dtype))
    optimizer.step()


def test_codes_in_another_layout_are_put_in_order() -> None:
    value = torch.randn(8, 16, 3, 3)
    source = [value.clone().requires_grad_()]
    optimizer = SlimAdam(source, plan=None, momentum_dtype="int8")
    source[0].grad = _values(value.numel()).view_as(value)
    optimizer.step()
    target = [value.to(memory_format=torch.channels_last).requires_grad_()]
    other = SlimAdam(target, plan=None, momentum_dtype="int8")
    other.load_state_dict(optimizer.state_dict())
    kept = _decoded(optimizer.state[source[0]])
    state = other.state[target[0]]
    assert state["exp_avg"].stride() == target[0].stride()
    expected = _encoded(kept.to(memory_format=torch.channels_last), kept)
    assert torch.equal(state["exp_avg"], expected[0])
    assert torch.equal(state["exp_avg_scale"], expected[1])


@pytest.mark.parametrize("momentum_dtype", NARROW, ids=str)
def test_convert_state_dict_keeps_the_first_moment(momentum_dtype: Any) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan="factored", momentum_dtype=momentum_dtype)
    _run(model, optimizer, range(3))
    other = SlimAdam(model, plan=None, momentum_dtype=momentum_dtype)
    other.load_state_dict(convert_state_dict(optimizer.state_dict(), None))
    for param in model.parameters():
        assert torch.equal(_decoded(optimizer.state[param]), _decoded(other.state[param]))


WRONG_STATES: dict[str, Any] = {
    "exp_avg_scale is torch.uint8 of shape \\(1,\\), 561 codes need torch.uint8 of shape \\(3,\\)": lambda state: {
        "exp_avg_scale": state["exp_avg_scale"][:1]
    },
    "exp_avg_scale is torch.float32 of shape \\(3,\\)": lambda state: {"exp_avg_scale": state["exp_avg_scale"].float()},
    "has an exp_avg_scale, but its exp_avg is torch.float32": lambda state: {
        "exp_avg_codes": state["exp_avg_codes"].float()
    },
    "exp_avg has shape \\(561,\\), the parameter \\(17, 33\\)": lambda state: {
        "exp_avg_codes": state["exp_avg_codes"].flatten()
    },
    "exp_avg_scale holds NoneType, not a dense": lambda state: {"exp_avg_scale": None},
}


@pytest.mark.parametrize("message", WRONG_STATES)
def test_wrong_codes_are_refused_and_nothing_is_changed(message: str) -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan=None, momentum_dtype="int8")
    _run(model, optimizer, range(2))
    before, wrong = copy.deepcopy(optimizer), _saved(optimizer)
    wrong["state"][0] |= WRONG_STATES[message](wrong["state"][0])
    with pytest.raises(ValueError, match=f"'weight'.*{message}"):
        optimizer.load_state_dict(wrong)
    assert _same_state(optimizer, before)


def test_codes_without_scales_are_refused() -> None:
    model = MODELS["matrix"]()
    optimizer = SlimAdam(model, plan=None, momentum_dtype="int8")
    _run(model, optimizer, range(2))
    wrong = _saved(optimizer)
    del wrong["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="'weight': the state dict's exp_avg holds int8 codes, but it has no"):
        optimizer.load_state_dict(wrong)


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
        _run(model, optimizer, range(4))
        runs.append((model, optimizer))
    (eager, first), (traced, second) = runs
    for one, other in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=4 * FLOAT32.eps, atol=4 * FLOAT32.eps)
        torch.testing.assert_close(_decoded(first.state[one]), _decoded(second.state[other]))


def _takes_codes(entries: list[Entry], hyper: Hyperparameters) -> None:
    for entry in entries:
        assert entry.exp_avg_scale is not None
        value = momentum.decode(entry.exp_avg, entry.exp_avg_scale)
        reference_update([entry._replace(exp_avg=value, exp_avg_scale=None)], hyper)
        momentum.encode(value, entry.grad, entry.exp_avg, entry.exp_avg_scale)


def test_an_implementation_that_takes_codes_gets_whole_blocks_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, native in (("matrix", True), ("parts of whole blocks", True), ("parts", False)):
        runs = []
        for replaced in (False, True):
            torch.manual_seed(5)
            model = MODELS[kind]()
            optimizer = SlimAdam(
                model, momentum_dtype="int8", fused=False, **_with_plan(model, kind, {"plan": "factored"})
            )
            seen: list[Entry] = []
            with monkeypatch.context() as patch:
                if replaced:

                    def update(entries: Any, hyper: Any, seen: list[Entry] = seen, native: bool = native) -> None:
                        seen += entries
                        (_takes_codes if native else reference_update)(entries, hyper)

                    patch.setattr(slimadam.stepping, "TAKES_CODES", frozenset({"reference"}))
                    patch.setitem(slimadam.stepping.UPDATES, "reference", update)
                _run(model, optimizer, range(3))
            assert all((entry.exp_avg.dtype == torch.int8) == native for entry in seen)
            assert bool(seen) == replaced
            runs.append((model, optimizer))
        (one, first), (other, second) = runs
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert _same_state(first, second)
