"""The compiled step on a CPU against float64, for every form and precision."""

from __future__ import annotations

import shutil
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.kernels.cpp.update import compiled_update
from slimadam.kernels.interface import Dims, Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.layout import layout
from tests.reference import gradients, slim_adamw_float64, train

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HYPER = Hyperparameters(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-5, weight_decay=0.1)
OPTIONS: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
STEP = 3.0


def _adjacent(ndim: int) -> list[tuple[Dims, ...]]:
    return [((),), *((tuple(range(a, b)),) for a, b in combinations(range(ndim + 1), 2))]


Case = tuple[tuple[int, ...], tuple[Dims, ...]]
SMALL: list[Case] = [
    *[((3, 5, 7), dims) for dims in _adjacent(3)],
    *[((7, 3), dims) for dims in [*_adjacent(2), ((1,), (0,))]],
    *[((1, 1), dims) for dims in [*_adjacent(2), ((1,), (0,))]],
    ((3, 20, 33), ((2,), (1,))),
    ((11,), ((),)),
    ((), ((),)),
]
LARGE: list[Case] = [  # too large for one thread
    *[((1, 100_000), dims) for dims in [*_adjacent(2), ((1,), (0,))]],
    *[((100_000, 2), dims) for dims in [*_adjacent(2), ((1,), (0,))]],
    *[((260, 300), dims) for dims in [*_adjacent(2), ((1,), (0,))]],
    ((2, 260, 300), ((1,),)),
    ((2, 260, 300), ((2,), (1,))),
]
DTYPES = [(F32, F32), (F32, BF16), (F64, F64), (F64, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
DTYPES += [(F16, BF16), (F64, BF16), (F32, torch.int8), (BF16, torch.int8), (F16, torch.int8), (F64, torch.int8)]
STEPS = [(case, dtypes) for case in SMALL for dtypes in DTYPES]
STEPS += [(case, dtypes) for case in LARGE for dtypes in [(F32, F32), (F64, F64), (BF16, torch.int8)]]


def _entry(
    shape: tuple[int, ...],
    dims: tuple[Dims, ...],
    dtype: torch.dtype = F32,
    momentum: torch.dtype | None = None,
    amsgrad: bool = False,
) -> Entry:
    """A step in the middle of a run, with values of different sizes and some exact zeros in the gradient."""
    wide = second_moment_dtype(dtype)
    param, grad = torch.randn(shape).to(dtype), (torch.randn(shape) * torch.rand(shape).mul(4).exp() * 0.1).to(dtype)
    grad = torch.where(torch.rand(shape) < 0.1, torch.zeros((), dtype=dtype), grad)

    def second() -> list[Tensor]:
        return [torch.rand([1 if dim in part else n for dim, n in enumerate(shape)], dtype=wide) for part in dims]

    scale = None
    if momentum is torch.int8:
        exp_avg = torch.randint(-127, 128, shape, dtype=torch.int8)
        scale = torch.randint(122, 128, (-(-param.numel() // 256),), dtype=torch.uint8)
    else:
        exp_avg = torch.randn(shape).to(momentum or dtype)
    maxima = second() if amsgrad else ()
    return Entry(param, grad, exp_avg, second(), maxima, torch.tensor(STEP), dims, 12345, scale)


def _clone(entry: Entry) -> Entry:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return [part.clone() for part in value] if isinstance(value, list) else value

    return Entry(*map(copied, entry))


def _float64(tensor: Tensor) -> Any:
    return tensor.double().numpy()


def _decoded(entry: Entry) -> Any:
    """The first moment in float64; 8-bit codes by their definition."""
    if entry.exp_avg_scale is None:
        return _float64(entry.exp_avg)
    codes = _float64(entry.exp_avg).reshape(-1)
    scale = np.repeat(2.0 ** (_float64(entry.exp_avg_scale) - 127), 256)[: codes.size]
    return (np.sign(codes) * (codes / 127) ** 2 * scale).reshape(entry.exp_avg.shape)


def _check_step(entry: Entry, hyper: Hyperparameters, after: Entry) -> None:
    """One step in float64 numpy, from the formulas; errors bounded by the precisions that take part."""
    precision = torch.finfo(second_moment_dtype(entry.param.dtype)).eps
    momentum_precision = torch.finfo(F32 if entry.exp_avg_scale is not None else entry.exp_avg.dtype).eps
    beta1, beta2 = float(hyper.beta1), float(hyper.beta2)
    param, grad, before = _float64(entry.param), _float64(entry.grad), _decoded(entry)
    grad = -grad if hyper.maximize else grad
    m = beta1 * before + (1 - beta1) * grad
    parts = []
    for part, dims, found in zip(entry.exp_avg_sq, entry.averaged_dims, after.exp_avg_sq, strict=True):
        mean = (grad.astype(np.longdouble) ** 2).mean(axis=dims, keepdims=True) if dims else grad**2
        parts.append((beta2 * _float64(part) + (1 - beta2) * mean).astype(np.float64))
        np.testing.assert_allclose(_float64(found), parts[-1], rtol=64 * precision)
    if entry.max_exp_avg_sq:
        parts = [np.maximum(parts[0], _float64(entry.max_exp_avg_sq[0]))]
        np.testing.assert_allclose(_float64(after.max_exp_avg_sq[0]), parts[0], rtol=64 * precision)
    if len(parts) == 2:
        (row_dim,) = entry.averaged_dims[1]
        second = parts[0] * parts[1] / parts[0].mean(axis=row_dim, keepdims=True)
    else:
        second = parts[0]
    factor = float(hyper.lr) / (1 - beta1**STEP) / (np.sqrt(second) / np.sqrt(1 - beta2**STEP) + hyper.eps)
    expected = param * (1 - float(hyper.lr) * float(hyper.weight_decay)) - factor * m
    stored = momentum_precision * (1 if entry.exp_avg_scale is None else 4)  # codes are worked on in float32
    magnitude = np.abs(before) + np.abs(grad)
    error = np.abs(_float64(after.param) - expected)
    rounding = torch.finfo(entry.param.dtype).eps * (1 if hyper.stochastic_round else 0.51)
    allowed = rounding * np.abs(expected) + 4 * precision * np.abs(param)
    smallest = torch.finfo(entry.param.dtype).smallest_normal * torch.finfo(entry.param.dtype).eps
    assert (error <= allowed + (64 * precision + stored) * magnitude * factor + smallest).all()
    if entry.exp_avg_scale is None:
        allowed = 0.51 * momentum_precision * np.abs(m) + 4 * precision * magnitude
        smallest = torch.finfo(after.exp_avg.dtype).smallest_normal * momentum_precision
        assert (np.abs(_decoded(after) - m) <= allowed + smallest).all()
    else:
        _check_codes(after, m, entry.grad)


def _check_codes(after: Entry, m: Any, grad: Tensor) -> None:
    assert after.exp_avg_scale is not None
    flat, codes = np.abs(m).reshape(-1), _float64(after.exp_avg).reshape(-1)
    scale = 2.0 ** (_float64(after.exp_avg_scale) - 127)
    for block, kept in enumerate(scale):
        largest = flat[256 * block : 256 * (block + 1)].max()
        assert largest * (1 - 1e-6) <= kept <= 2 * largest * (1 + 1e-6)
    exact = 127 * np.sqrt(flat / np.repeat(scale, 256)[: flat.size])
    still = _float64(grad).reshape(-1) == 0
    found = np.abs(codes)
    assert (np.abs(found - exact)[~still] <= 0.5 + 1e-4).all()
    assert ((found <= exact + 1e-4) & (found > exact - 1 - 1e-4))[still].all()
    assert (np.sign(codes) * np.sign(m).reshape(-1) >= 0).all()


@pytest.mark.parametrize(("case", "dtypes"), STEPS, ids=str)
def test_one_step_equals_the_formula(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    (shape, dims), (dtype, momentum) = case, dtypes
    for amsgrad in (False, True)[: 3 - len(dims)]:
        for hyper in (HYPER, HYPER._replace(beta1=0.3, maximize=True, weight_decay=0.0)):
            before = _entry(shape, dims, dtype, momentum, amsgrad)
            after = _clone(before)
            compiled_update([after], hyper._replace(amsgrad=amsgrad))
            _check_step(before, hyper, after)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_dimensions(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    dims = data.draw(st.sampled_from(_adjacent(len(shape))))
    dtype, momentum = data.draw(st.sampled_from(DTYPES))
    before = _entry(shape, dims, dtype, momentum)
    after = _clone(before)
    compiled_update([after], HYPER)
    _check_step(before, HYPER, after)


FORMS: list[tuple[tuple[int, ...], tuple[int, ...] | str]] = [
    ((13, 37), ()),
    ((13, 37), (1,)),
    ((37, 13), (0,)),
    ((300, 250), (0,)),
    ((3, 5, 7), (1,)),
    ((37, 13), "factored"),
    ((300, 250), "factored"),
]


def _plan(dims: tuple[int, ...] | str) -> CompressionPlan:
    form = "factored" if dims == "factored" else "mean" if dims else "full"
    return CompressionPlan({"w": Rule((), form) if isinstance(dims, str) else Rule(dims, form)})


@pytest.mark.parametrize("extra", [{}, {"amsgrad": True}, {"maximize": True, "variance_init": "gradient"}], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(("shape", "dims"), FORMS, ids=str)
def test_a_run_agrees_with_float64(
    shape: tuple[int, ...], dims: tuple[int, ...] | str, dtype: torch.dtype, extra: dict[str, Any]
) -> None:
    if dims == "factored" and "amsgrad" in extra:
        extra = {}
    start, grads = torch.randn(shape, dtype=dtype), gradients(shape, 12)
    (ours,), optimizer = train(
        [start],
        lambda p: SlimAdam([("w", p[0])], plan=_plan(dims), fused=True, **OPTIONS, **extra),
        [[grad] for grad in grads],
    )
    assert isinstance(optimizer, SlimAdam)
    assert optimizer.backend("w") == "compiled"
    expected = slim_adamw_float64(
        start.double().numpy(), [g.to(dtype).double().numpy() for g in grads], dims, **OPTIONS, **extra
    )
    tolerance = 200 * torch.finfo(dtype).eps  # 12 steps of a few roundings each
    np.testing.assert_allclose(ours.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_full_second_moments_give_adamws_numbers() -> None:
    """Within a few units in the last place of torch.optim.AdamW, over 20 steps."""
    start, grads = torch.randn(123, 45), [[grad] for grad in gradients((123, 45), 20)]
    (ours,), _ = train([start], lambda p: SlimAdam(p, plan=None, fused=True, **OPTIONS), grads)
    (theirs,), _ = train([start], lambda p: torch.optim.AdamW(p, **OPTIONS), grads)
    torch.testing.assert_close(ours, theirs, rtol=20 * 2**-23, atol=20 * 2**-23)


def test_gradient_that_lies_otherwise_takes_the_reference() -> None:
    params = [torch.randn(6, 8).requires_grad_() for _ in range(2)]
    params[1].data.copy_(params[0].data)
    grad = torch.randn(8, 6).t()
    for param, fused in zip(params, (True, False), strict=True):
        param.grad = grad
        SlimAdam([("w", param)], plan=_plan((1,)), fused=fused, **OPTIONS).step()
    assert torch.equal(params[0], params[1])


def test_only_what_it_takes_is_compiled() -> None:
    def backend(**options: Any) -> str:
        return SlimAdam([("w", torch.randn(4, 4))], plan=_plan((1,)), **options).backend("w")

    assert backend(fused=True) == "compiled"
    assert backend(fused=True, momentum_dtype=BF16) == "compiled"
    assert backend(fused=None) == "compiled"
    assert backend(fused=False) == "reference"
    assert backend(fused=True, capturable=True) == "reference"


def test_tensors_that_move_between_steps_are_followed() -> None:
    """New gradients, swapped data and a loaded state, as zero_grad, FSDP and checkpoints bring them."""
    ours, theirs = (torch.arange(24.0).reshape(4, 6).requires_grad_() for _ in range(2))
    fused = SlimAdam([("w", ours)], plan=_plan((0,)), fused=True, **OPTIONS)
    plain = SlimAdam([("w", theirs)], plan=_plan((0,)), fused=False, **OPTIONS)
    for step, grad in enumerate(gradients((4, 6), 6)):
        ours.grad, theirs.grad = grad.float().clone(), grad.float().clone()
        if step == 2:
            ours.data = ours.data.clone()
        if step == 4:
            fused.load_state_dict(fused.state_dict())
        fused.step()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)], ids=str)
def test_empty_tensors_are_left_alone(shape: tuple[int, ...]) -> None:
    for dims in _adjacent(len(shape)):
        entry = _entry(shape, dims)
        kept = _clone(entry)
        compiled_update([entry, _entry((4, 4), ((),))], HYPER)
        assert all(torch.equal(a, b) for a, b in zip(entry.exp_avg_sq, kept.exp_avg_sq, strict=True))


@pytest.mark.parametrize("dims", _adjacent(4), ids=str)
def test_channels_last_and_transposed(dims: tuple[Dims, ...]) -> None:
    before = _entry((6, 5, 4, 3), dims)
    after = _clone(before)
    last = torch.channels_last
    full = [part.to(memory_format=last) if not any(dims) else part for part in after.exp_avg_sq]
    after = after._replace(
        param=after.param.to(memory_format=last),
        grad=after.grad.to(memory_format=last),
        exp_avg=after.exp_avg.to(memory_format=last),
        exp_avg_sq=full,
    )
    if layout(after.param, dims) is None:
        pytest.skip("not adjacent in memory; the optimizer takes the reference")
    compiled_update([after], HYPER)
    _check_step(before, HYPER, after)


def test_views_at_odd_offsets() -> None:
    for dims in [*_adjacent(2), ((1,), (0,))]:
        before = _entry((9, 35), dims)
        after = _clone(before)
        moved = [torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(9, 35) for tensor in after[:3]]
        after = after._replace(param=moved[0], grad=moved[1], exp_avg=moved[2])
        compiled_update([after], HYPER)
        _check_step(before, HYPER, after)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    """Bit for bit, also with stochastic rounding, on tensors that one thread takes and on those a team shares."""
    shapes = [((400, 300), dims) for dims in [*_adjacent(2), ((1,), (0,))]] + [
        ((100_000, 2), ((0,),)),
        ((5, 9), ((0,),)),
    ]
    hyper = HYPER._replace(stochastic_round=True)
    entries = [_entry(shape, dims, dtype, m) for shape, dims in shapes for dtype, m in [(F32, F32), (BF16, torch.int8)]]
    one, alone = ([_clone(entry) for entry in entries] for _ in range(2))
    several = []
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        compiled_update(one, hyper)
        for count in (2, 5, 8) * 3:
            torch.set_num_threads(count)
            several.append([_clone(entry) for entry in entries])
            compiled_update(several[-1], hyper)
        torch.set_num_threads(2)
        for entry in alone:
            compiled_update([entry], hyper)
    finally:
        torch.set_num_threads(threads)
    for results in zip(one, alone, *several, strict=True):
        for field in ("param", "exp_avg", "exp_avg_scale"):
            values = [getattr(result, field) for result in results]
            assert values[0] is None or all(torch.equal(values[0], value) for value in values[1:])
        for parts in zip(*(result.exp_avg_sq for result in results), strict=True):
            assert all(torch.equal(parts[0], part) for part in parts[1:])


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    """A value 30% of the way between two neighbours goes up with probability 0.3."""
    count = 200_000
    neighbours = torch.tensor([1.0, 1.0 + 2**-7])
    hyper = Hyperparameters(lr=1.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=0.0, stochastic_round=True)

    def rounded(seed: int) -> Tensor:
        # m = g and v = g**2: a step of g / (g + 1), which is 0.3 of the gap between the neighbours.
        distance = 0.3 * 2**-7
        grad = torch.full((count,), -distance / (1 - distance))
        entry = Entry(
            torch.ones(count, dtype=BF16), grad.to(BF16), torch.zeros(count), [torch.zeros(count)], (),
            torch.tensor(1.0), ((),), seed,
        )  # fmt: skip
        compiled_update([entry], hyper)
        return entry.param.float()

    first, again, other = rounded(1), rounded(1), rounded(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.isin(first, neighbours).all()
    grad = float(torch.tensor(-0.3 * 2**-7 / (1 - 0.3 * 2**-7)).to(BF16))
    probability = -grad / (1 - grad) / 2**-7
    deviation = (probability * (1 - probability) / count) ** 0.5
    for result in (first, other):
        up = (result > 1).double()
        assert abs(float(up.mean()) - probability) < 5 * deviation
        assert abs(float((up[1:] * up[:-1]).mean()) - probability**2) < 5 * deviation
    both = ((first > 1) & (other > 1)).double().mean()
    assert abs(float(both) - probability**2) < 5 * deviation


def test_nan_and_infinity_stay_what_they_are() -> None:
    for dtype in (F32, F64, BF16, F16):
        for rounds in (False, True):
            entry = _entry((4, 300), ((1,),), dtype)
            entry.grad[1, 7], entry.param[2, 3], entry.param[3, 4] = float("nan"), float("inf"), float("-inf")
            compiled_update([entry], HYPER._replace(stochastic_round=rounds))
            assert entry.param[1].isnan().all()
            assert entry.exp_avg[1, 7].isnan()
            assert entry.exp_avg[1].isnan().sum() == 1
            assert entry.exp_avg_sq[0].isnan().flatten().tolist() == [False, True, False, False]
            assert entry.param[2, 3] == float("inf")
            assert entry.param[3, 4] == float("-inf")
            assert entry.param[0].isfinite().all()


def test_8_bit_blocks_of_zeros_and_with_a_nan() -> None:
    entry = _entry((3, 256), ((1,),), F32, torch.int8)
    entry.exp_avg.zero_()
    entry.grad.zero_()
    entry.grad[2, 9] = float("nan")
    compiled_update([entry], HYPER)
    assert entry.exp_avg_scale is not None
    assert entry.exp_avg_scale[:2].tolist() == [0, 0]
    assert not entry.exp_avg[:2].any()
    assert entry.exp_avg_scale[2] == 255


def test_every_16_bit_number_survives_a_step_that_changes_nothing() -> None:
    """Conversions in both directions, over all values of both formats."""
    for dtype in (BF16, F16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        size = every.numel()
        entry = Entry(
            every.clone(),
            torch.zeros(size, dtype=dtype),
            every.clone(),
            [torch.ones(size)],
            (),
            torch.tensor(1.0),
            ((),),
        )
        compiled_update([entry], Hyperparameters(lr=0.0, beta1=1 - 1e-12, beta2=0.9))
        numbers = every.isfinite()
        assert torch.equal(entry.param[numbers], every[numbers])
        assert torch.equal(entry.exp_avg[numbers], every[numbers])
        assert entry.param[every.isnan()].isnan().all()


def test_rounding_to_16_bits_is_torchs() -> None:
    """To nearest, ties to even, at every exponent, at overflow and among subnormal numbers."""
    value = torch.randint(-(1 << 31), 1 << 31, (200_000,)).to(torch.int32).view(F32)
    value = torch.cat([value, torch.randn(100_000) * 10.0 ** torch.randint(-9, 6, (100_000,))])
    ties = torch.arange(0, 1 << 16, dtype=torch.int32)
    value = torch.cat([value, (ties << 16 | 1 << 15).view(F32), (ties << 13 | 1 << 12 | 0x3F000000).view(F32)])
    value = value[value.isfinite() & (value.abs() < 1e30)]
    for dtype in (BF16, F16):
        size = value.numel()
        zeros = torch.zeros(size, dtype=dtype)
        entry = Entry(zeros.clone(), zeros, -value, [torch.zeros(size)], (), torch.tensor(1.0), ((),))
        # A first step with no gradient and v = 0 moves zero by -lr / (1 - beta1) * (beta1 m) / eps = -m.
        compiled_update([entry], Hyperparameters(lr=1.0, beta1=0.5, beta2=0.5, eps=1.0, weight_decay=0.0))
        assert torch.equal(entry.param, (entry.exp_avg * -2).to(dtype))
