"""The Triton kernels, on a GPU or in Triton's interpreter, against the readable update in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is only installed on Linux")

import slimadam.kernels.triton.launch as triton_update
import slimadam.kernels.triton.slabs as slabs
import slimadam.kernels.triton.tiling as triton_tiling
from benchmarks.speed import launch_settings
from slimadam.kernels.interface import Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.reference import reference_update
from slimadam.kernels.triton.launch import TritonStep
from slimadam.kernels.triton.tiling import tiling
from tests.versions import triton_device

DEVICE = triton_device()
HYPER = Hyperparameters(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
STEPS = 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES: list[tuple[tuple[int, ...], Any]] = [
    ((), ()),
    ((1,), ()),
    ((300,), ()),
    ((4100,), ()),
    ((16,), (0,)),
    ((20000,), (0,)),
    ((7, 5), ()),
    ((7, 5), (1,)),
    ((7, 5), (0,)),
    ((7, 5), (0, 1)),
    ((7, 5), "factored"),
    ((1, 9), "factored"),
    ((9, 1), "factored"),
    ((130, 300), "factored"),
    ((70, 512), "factored"),
    ((3, 3, 256), "factored"),
    ((20, 512), (0,)),
    ((64, 48), (1,)),
    ((64, 48), (0,)),
    ((5, 4100), (1,)),
    ((2, 33000), (1,)),
    ((5000, 3), (0,)),
    ((3, 5, 7), (0,)),
    ((3, 5, 7), (1,)),
    ((3, 5, 7), (2,)),
    ((3, 5, 7), (0, 1)),
    ((3, 5, 7), (1, 2)),
    ((3, 5, 7), (0, 1, 2)),
    ((3, 5, 7), "factored"),
    ((2, 3, 4, 5), (1, 2)),
    ((2, 3, 4, 5), (2, 3)),
    ((2, 3, 4, 5), (0, 1, 2)),
    ((2, 3, 4, 5), "factored"),
    ((0, 4), (1,)),
]


def _averaged(dims: Any, ndim: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(1, ndim)), (0,)) if dims == "factored" else (dims,)


def _entry(
    shape: tuple[int, ...],
    dims: Any,
    dtype: torch.dtype = torch.float32,
    *,
    grad: torch.dtype | None = None,
    exp_avg: torch.dtype | None = None,
    amsgrad: bool = False,
) -> Entry:
    averaged = _averaged(dims, len(shape))
    kept = [[1 if dim in each else size for dim, size in enumerate(shape)] for each in averaged]
    second = [torch.rand(sizes).add(0.1).to(DEVICE, second_moment_dtype(dtype)) for sizes in kept]
    return Entry(
        torch.randn(shape).to(DEVICE, dtype),
        torch.randn(shape).to(DEVICE, grad or dtype),
        torch.randn(shape).mul(0.1).to(DEVICE, exp_avg or dtype),
        second,
        [part * 1.02 for part in second] if amsgrad else (),
        torch.tensor(3.0, device=DEVICE),
        averaged,
    )


def _in_float64(entry: Entry) -> Entry:
    param, grad, exp_avg = (tensor.detach().clone().double() for tensor in entry[:3])
    second, largest = ([part.clone().double() for part in parts] for parts in (entry.exp_avg_sq, entry.max_exp_avg_sq))
    return entry._replace(
        param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=second, max_exp_avg_sq=largest, step=entry.step.clone()
    )


def _run(entries: Sequence[Entry], hyper: Hyperparameters = HYPER, steps: int = STEPS, **options: Any) -> TritonStep:
    prepared = TritonStep(entries, hyper)
    for _ in range(steps):
        assert prepared.with_gradients([entry.grad for entry in entries], hyper) is prepared
        prepared.run(hyper, **options)
    return prepared


def _expected(entries: Sequence[Entry], hyper: Hyperparameters = HYPER, steps: int = STEPS) -> list[Entry]:
    """The same steps in float64, where what is stored between steps is rounded as the entries' dtypes are."""
    wide = [_in_float64(entry) for entry in entries]
    for _ in range(steps):
        for entry, kept in zip(wide, entries, strict=True):
            entry.step.add_(1)
            reference_update([entry], hyper)
            entry.exp_avg.copy_(entry.exp_avg.to(kept.exp_avg.dtype))
            if kept.param.dtype != torch.float64:
                entry.param.copy_(entry.param.to(kept.param.dtype))
    return wide


def _assert_agree(entries: Sequence[Entry], expected: Sequence[Entry]) -> None:
    """To a few units in the last place: what is stored may be rounded the other way in each step."""
    for entry, wide in zip(entries, expected, strict=True):
        unit = torch.finfo(entry.param.dtype).eps
        largest = max([*wide.param.abs().flatten().tolist(), 1e-3])
        moments = torch.int8 if entry.exp_avg_scale is not None else entry.exp_avg.dtype
        stored = 0 if moments == torch.int8 else 20 * STEPS * HYPER.lr * torch.finfo(moments).eps
        message = f"{tuple(entry.param.shape)} {entry.averaged_dims} {entry.param.dtype}"
        torch.testing.assert_close(
            entry.param.double(),
            wide.param,
            rtol=0,
            atol=2 * STEPS * unit * largest + stored,
            msg=lambda m, x=message: x + m,
        )
        compute = torch.finfo(second_moment_dtype(entry.param.dtype)).eps
        for part, exact in zip((*entry.exp_avg_sq, *entry.max_exp_avg_sq),
                               (*wide.exp_avg_sq, *wide.max_exp_avg_sq), strict=True):  # fmt: skip
            torch.testing.assert_close(part.double(), exact, rtol=40 * compute, atol=0, msg=message)
        assert entry.step == wide.step


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"amsgrad": True, "maximize": True}),
    ],
    ids=str,
)
def test_every_form_agrees_with_float64(dtype: torch.dtype, flags: dict[str, bool]) -> None:
    cases = [case for case in CASES if case[1] != "factored" or "amsgrad" not in flags]
    entries = [_entry(*case, dtype, amsgrad="amsgrad" in flags) for case in cases]
    hyper = HYPER._replace(**flags)
    expected = _expected(entries, hyper)
    _run(entries, hyper)
    _assert_agree(entries, expected)


@pytest.mark.parametrize(
    ("dtype", "grad", "exp_avg"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_precisions(dtype: torch.dtype, grad: torch.dtype, exp_avg: torch.dtype) -> None:
    entries = [_entry(*case, dtype, grad=grad, exp_avg=exp_avg) for case in CASES if math.prod(case[0]) < 2000]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    entries = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = tuple(
            data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 5e3))
        )
        first = data.draw(st.integers(0, len(shape) - 1))
        adjacent = tuple(range(first, data.draw(st.integers(first, len(shape) - 1)) + 1))
        dims = data.draw(st.sampled_from([(), adjacent] + (["factored"] if len(shape) > 1 else [])))
        entries.append(_entry(shape, dims))
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


def test_small_limits_take_the_summing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiling, "ROWS_IN_ONE_PROGRAM", 4)
    entries = [_entry(*case) for case in CASES if math.prod(case[0]) < 5000]
    kinds = {tiling(entry.param, entry.averaged_dims).kind for entry in entries}
    assert kinds == {"full", "spread"} | ({"rows"} & kinds)
    assert sum(tiling(entry.param, entry.averaged_dims).kind == "spread" for entry in entries) >= 15
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


def test_sums_of_many_tiles_are_finished_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "FINISHED_AT_ONCE", 32)
    entries = [_entry((1000, 40), "factored"), _entry((2, 500, 7), "factored")]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


def test_launches_do_not_grow_with_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [_entry((32, 64), dims) for dims in ((), (1,), (0,), "factored")]
    many = [_entry((32 + 16 * size, 64), dims) for size in range(9) for dims in ((), (1,), (0,), "factored")]
    assert _launches(few, monkeypatch) == _launches(many, monkeypatch) == 4


def _launches(entries: Sequence[Entry], monkeypatch: pytest.MonkeyPatch) -> int:
    from triton.runtime import interpreter, jit

    counted = []
    owner, name = (interpreter.GridExecutor, "__call__") if DEVICE == "cpu" else (jit.JITFunction, "run")
    run = getattr(owner, name)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *a, **k: (counted.append(1), run(*a, **k))[1])
        _run(entries, steps=1)
    return len(counted)


def test_empty_tensors_only_count_their_steps() -> None:
    entries = [_entry((0, 4), dims) for dims in ((), (0,), (1,), "factored")] + [_entry((4, 0), "factored")]
    _run(entries)
    assert all(entry.step == 3 + STEPS for entry in entries)


def test_moved_gradients_are_followed_and_other_flags_are_noticed() -> None:
    entries = [_entry((40, 48), dims) for dims in ((), (1,), (0,), "factored")]
    hyper = HYPER
    prepared = TritonStep(entries, hyper)
    moved = [entry._replace(grad=torch.randn_like(entry.grad)) for entry in entries]
    expected = _expected(moved, hyper, 1)
    grads = [entry.grad for entry in moved]
    assert prepared.with_gradients(grads, hyper) is prepared
    prepared.run(hyper)
    _assert_agree(moved, expected)
    assert prepared.with_gradients(grads, hyper._replace(maximize=True)) is None
    shifted = torch.cat([torch.zeros(1), grads[0].flatten()])[1:].view_as(grads[0])
    assert prepared.with_gradients([shifted, *grads[1:]], hyper) is None


def test_a_step_after_an_interrupted_one_follows_gradients_that_had_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [_entry((40, 48), dims) for dims in ((), (1,), (0,), "factored")]
    prepared = TritonStep(entries, HYPER)
    moved = [entry._replace(grad=torch.randn_like(entry.grad)) for entry in entries]
    expected = _expected(moved, steps=1)
    grads = [entry.grad for entry in moved]
    with monkeypatch.context() as patched:
        patched.setattr(triton_update, "_pinned", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared.with_gradients(grads, HYPER)
    assert prepared.with_gradients(grads, HYPER) is prepared
    prepared.run(HYPER)
    _assert_agree(moved, expected)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_infinite_gradients_leave_everything_alone_and_scaled_ones_are_divided() -> None:
    cases = [((7, 5), dims) for dims in ((), (1,), (0,), "factored")]
    entries = [_entry(*case) for case in cases]
    before = [_in_float64(entry) for entry in entries]
    _run(entries, found_inf=torch.ones((), device=DEVICE), grad_scale=torch.full((), 4.0, device=DEVICE))
    _assert_agree(entries, before)
    expected = _expected([entry._replace(grad=entry.grad / 4) for entry in entries])
    _run(entries, found_inf=torch.zeros((), device=DEVICE), grad_scale=torch.full((), 4.0, device=DEVICE))
    _assert_agree(entries, expected)


def test_hyperparameters_may_be_tensors() -> None:
    entries = [_entry((7, 5), dims) for dims in ((), (1,), (0,), "factored")]
    expected = _expected(entries)
    numbers = {name: torch.tensor(getattr(HYPER, name), dtype=torch.float64, device=DEVICE)
               for name in ("lr", "beta1", "beta2", "weight_decay")}  # fmt: skip
    _run(entries, HYPER._replace(**numbers))
    _assert_agree(entries, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of lanes past the end, where eps is zero
@pytest.mark.parametrize("zeros", [*Hyperparameters._fields[:5], ("beta1", "weight_decay")], ids=str)
def test_zero_hyperparameters(zeros: str | tuple[str, ...]) -> None:
    entries = [_entry((7, 5), dims) for dims in ((), (1,), (0,), "factored")]
    names = (zeros,) if isinstance(zeros, str) else zeros
    hyper = HYPER._replace(**dict.fromkeys(names, 0.0))
    expected = _expected(entries, hyper)
    _run(entries, hyper)
    _assert_agree(entries, expected)


def test_late_steps_have_exact_bias_corrections() -> None:
    entries = [_entry((7, 5), (1,))]
    hyper = HYPER._replace(beta1=0.9, beta2=0.999)
    for step in (0.0, 1.0, 999.0, 2.0**24 - 8):
        entries[0].step.fill_(step)
        expected = _expected(entries, hyper)
        _run(entries, hyper)
        _assert_agree(entries, expected)


def test_parts_of_one_parameter_share_its_step() -> None:
    whole = _entry((12, 8), ())
    step = whole.step
    parts = []
    for start, dims in ((0, ()), (4, (1,)), (8, (0,))):
        one = _entry((4, 8), dims)
        rows = slice(start, start + 4)
        parts.append(
            one._replace(param=whole.param[rows], grad=whole.grad[rows], exp_avg=whole.exp_avg[rows], step=step)
        )
    expected = _expected(parts)
    _run(parts)
    assert step == 3 + STEPS
    _assert_agree(parts, expected)


@pytest.mark.parametrize("dims", [(), (0,), (1,), "factored"], ids=str)
def test_strided_parts(dims: Any) -> None:
    """Columns of a wider matrix, as the query of a fused weight stored transposed."""
    stored = [torch.randn(24, 60).to(DEVICE) for _ in range(3)]
    outside = [tensor.clone() for tensor in stored]
    one = _entry((24, 20), dims)
    param, grad, exp_avg = (tensor[:, 20:40] for tensor in stored)
    entries = [one._replace(param=param, grad=grad, exp_avg=exp_avg)]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)
    for tensor, before in zip(stored, outside, strict=True):
        torch.testing.assert_close(tensor[:, :20], before[:, :20], rtol=0, atol=0)
        torch.testing.assert_close(tensor[:, 40:], before[:, 40:], rtol=0, atol=0)


@pytest.mark.parametrize("width", [256, 300])
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_strided_parts_of_long_rows(width: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that hold whole lines of 256 elements, and of others; indices within rows may need 64 bits."""
    monkeypatch.setattr(triton_update, "WIDE_FROM", 1 if wide else 1 << 30)
    entries = []
    for dims in ((), "factored"):
        one = _entry((24, width), dims)
        stored = [torch.randn(24, width + 32) for _ in range(3)]
        param, grad, exp_avg = (tensor[:, 16 : 16 + width] for tensor in stored)
        entries.append(one._replace(param=param, grad=grad, exp_avg=exp_avg))
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


@pytest.mark.parametrize("dims", [(), (0,), (1,), (2, 3), (1, 2, 3), "factored"], ids=str)
def test_channels_last(dims: Any) -> None:
    one = _entry((6, 5, 3, 3), dims)
    param, grad, exp_avg = (tensor.contiguous(memory_format=torch.channels_last) for tensor in one[:3])
    second = [part.contiguous(memory_format=torch.channels_last) for part in one.exp_avg_sq]
    entries = [one._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=second)]
    if tiling(param, one.averaged_dims) is None:
        assert dims in ("factored",)
        return
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


@pytest.mark.parametrize("dims", [(), (0,), (1,), "factored"], ids=str)
def test_unaligned_tensors(dims: Any) -> None:
    one = _entry((16, 32), dims)
    shifted = [torch.cat([torch.zeros(1, device=DEVICE), tensor.flatten()])[1:].view(16, 32) for tensor in one[:3]]
    assert all(tensor.data_ptr() % 16 for tensor in shifted)
    entries = [one._replace(param=shifted[0], grad=shifted[1], exp_avg=shifted[2])]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


def test_tensors_past_two_to_the_thirty_one_elements() -> None:
    """Two rows that lie 2**31 elements apart; the memory between them is never touched."""
    with _untouched_memory():
        stored = [torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)]
    one = _entry((2, 16), (1,), torch.bfloat16)
    param, grad, exp_avg = (tensor.as_strided((2, 16), (2**31, 1)) for tensor in stored)
    for view, values in zip((param, grad, exp_avg), one[:3], strict=True):
        view.copy_(values)
    entries = [one._replace(param=param, grad=grad, exp_avg=exp_avg)]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


@contextmanager
def _untouched_memory() -> Iterator[None]:
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    """One step of 0.3 of the distance between two bfloat16 numbers, for many elements."""
    count = 1 << 16
    hyper = Hyperparameters(lr=0.3 * 2**-7, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, stochastic_round=True)
    outcomes = []
    for seed in (1, 1, 2):
        one = _entry((count,), (), torch.bfloat16)
        entry = one._replace(param=torch.ones_like(one.param), grad=-torch.ones_like(one.grad), seed=seed)
        _run([entry], hyper, steps=1)
        outcomes.append(entry.param.float())
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    up = (outcomes[0] == 1 + 2**-7).double()
    assert torch.equal(outcomes[0] == 1, up == 0)
    assert up.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / count))
    halves = up.view(-1, 2)
    assert (halves[:, 0] * halves[:, 1]).mean().item() == pytest.approx(0.09, abs=4 * math.sqrt(0.09 / (count / 2)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_stay_visible_under_stochastic_rounding() -> None:
    entry = _entry((3, 4), (), torch.bfloat16)
    entry.grad[0, 0], entry.grad[1, 1] = math.nan, math.inf
    _run([entry], HYPER._replace(stochastic_round=True), steps=1)
    finite = entry.param.isfinite()
    assert (~finite).sum() == 2
    assert not finite[0, 0]
    assert not finite[1, 1]


def _codes(value: np.ndarray[Any, Any], grad: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """The 8-bit code of the first moment from its definition, its scales, and where it does not hang by a hair."""
    count = value.size
    padded = np.zeros(-(-count // 256) * 256)
    padded[:count] = value.ravel()
    blocks = padded.reshape(-1, 256)
    largest = np.abs(blocks).max(1)
    exponents = np.where(largest > 0, np.ceil(np.log2(np.where(largest > 0, largest, 1))) + 127, 0)
    wide = np.where(largest > 0, 2.0 ** (exponents - 127), 0)[:, None]
    root = 127 * np.sqrt(np.divide(np.abs(blocks), wide, out=np.zeros_like(blocks), where=wide > 0))
    moving = np.zeros_like(padded)
    moving[:count] = grad.ravel()
    still = moving.reshape(-1, 256) == 0
    code = np.where(still, np.floor(root), np.round(root)) * np.sign(blocks)
    clear = np.abs((root - np.where(still, 0, 0.5)) - np.round(root - np.where(still, 0, 0.5))) > 1e-3
    code, clear = (array.ravel()[:count].reshape(value.shape) for array in (code, clear))
    return code, torch.from_numpy(exponents).to(torch.uint8), clear


def _decode(codes: Tensor, scales: Tensor) -> np.ndarray[Any, Any]:
    root = codes.double().cpu().numpy().ravel() / 127
    return (
        np.sign(root) * root**2 * np.repeat(2.0 ** (scales.double().cpu().numpy() - 127), 256)[: root.size]
    ).reshape(codes.shape)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((300,), ()), ((4096,), ()), ((40, 256), (1,)), ((3, 1024), (1,)), ((2, 5120), (1,)), ((7, 300), (1,)),
     ((64, 48), (0,)), ((64, 300), "factored"), ((3, 5, 7), (1,)), ((3,), ())],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bit_first_moments(shape: tuple[int, ...], dims: Any, dtype: torch.dtype) -> None:
    one = _entry(shape, dims, dtype)
    one.grad.flatten()[::3] = 0
    codes, scales, _ = _codes(one.exp_avg.double().cpu().numpy(), np.ones(shape))
    entry = one._replace(exp_avg=torch.from_numpy(codes).to(DEVICE, torch.int8), exp_avg_scale=scales.to(DEVICE))
    decoded = torch.from_numpy(_decode(entry.exp_avg, scales)).to(DEVICE)
    wide = _in_float64(entry)._replace(exp_avg=decoded, exp_avg_scale=None)
    wide.step.add_(1)
    reference_update([wide], HYPER)
    _run([entry], steps=1)
    _assert_agree([entry], [wide])
    expected, expected_scales, clear = _codes(wide.exp_avg.cpu().numpy(), one.grad.double().cpu().numpy())
    difference = np.abs(entry.exp_avg.double().cpu().numpy() - expected)
    assert clear.mean() > 0.9
    assert difference[clear].max() == 0
    assert difference.max() <= 1
    assert entry.exp_avg_scale is not None
    torch.testing.assert_close(entry.exp_avg_scale.cpu(), expected_scales, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_eight_bit_blocks_with_nan_infinity_and_nothing() -> None:
    one = _entry((4, 256), ())
    one.grad.zero_()
    one.grad[0, 3], one.grad[1, 5] = math.nan, math.inf
    codes, scales = torch.zeros(4, 256, dtype=torch.int8), torch.zeros(4, dtype=torch.uint8)
    entry = one._replace(exp_avg=codes.to(DEVICE), exp_avg_scale=scales.to(DEVICE))
    _run([entry], steps=1)
    assert entry.exp_avg_scale is not None
    assert entry.exp_avg_scale.tolist() == [255, 255, 0, 0]
    assert entry.exp_avg[2:].eq(0).all()
    assert entry.param[2:].isfinite().all()


@pytest.mark.parametrize(("dtype", "lines"), [(torch.float32, 8), (torch.bfloat16, 16)], ids=str)
def test_launch_settings_are_measured_and_put_back(dtype: torch.dtype, lines: int) -> None:
    before = dict(triton_update.SETTINGS)
    found = launch_settings.measure("rows", 256, dtype, DEVICE, copies=1, rounds=1)
    assert next(iter(found)) == f"{lines} x 256, 8 warps"
    assert len(found) == len(launch_settings.candidates("rows", 256, dtype)) > 5
    assert all(milliseconds > 0 for milliseconds in found.values())
    assert before == triton_update.SETTINGS


def test_a_trial_counts_one_step_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_update.try_launch(torch.device("cpu"))
    monkeypatch.setattr(triton_update, "_advance_steps", lambda *arguments: None)
    with pytest.raises(RuntimeError, match=r"left it at 0\.0"):
        triton_update.try_launch(torch.device("cpu"))
