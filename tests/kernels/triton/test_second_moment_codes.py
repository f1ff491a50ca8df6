"""The Triton kernel on second moments in codes, against the readable update in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is only installed on Linux")

from slimadam.kernels.float8 import NOT_FINITE
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.kernels.reference import reference_update
from slimadam.kernels.triton.launch import TritonStep, same_layout
from slimadam.optim.step.dispatch import BACKENDS

HYPER = Hyperparameters(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
STEPS = 3
SHAPES: list[tuple[int, ...]] = [(), (1,), (300,), (4100,), (7, 5), (3, 5, 7), (0, 4)]
PRECISIONS = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float16),
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32, torch.float64),
]
"""Precisions of parameters, gradients and first moments."""


def _entry(
    shape: tuple[int, ...],
    device: str,
    dtype: torch.dtype = torch.float32,
    grad: torch.dtype | None = None,
    exp_avg: torch.dtype | None = None,
) -> Entry:
    """Every seventh gradient is zero; codes are about the gradients' squares, and one of each special kind."""
    codes, gradient = torch.randint(117, 132, shape, dtype=torch.uint8), torch.randn(shape)
    gradient.view(-1)[::7] = 0
    some = codes.view(-1)[5:9]
    some.copy_(torch.tensor([0, 1, 254, NOT_FINITE], dtype=torch.uint8)[: len(some)])
    return Entry(
        torch.randn(shape).to(device, dtype),
        gradient.to(device, grad or dtype),
        torch.randn(shape).mul(0.1).to(device, exp_avg or dtype),
        [codes.to(device)],
        (),
        torch.tensor(3.0, device=device),
        ((),),
    )


def _run(entries: Sequence[Entry], hyper: Hyperparameters = HYPER, steps: int = STEPS, **options: Any) -> None:
    prepared = TritonStep(entries, hyper)
    for _ in range(steps):
        prepared.run(hyper, **options)


def _expected(entries: Sequence[Entry], hyper: Hyperparameters = HYPER, steps: int = STEPS) -> list[Entry]:
    """The same steps in float64, where what is stored between steps is rounded as it is there."""
    wide = [_in_float64(entry) for entry in entries]
    for _ in range(steps):
        for entry, kept in zip(wide, entries, strict=True):
            entry.step.add_(1)
            reference_update([entry], hyper)
            entry.exp_avg.copy_(entry.exp_avg.to(kept.exp_avg.dtype))
            if not hyper.stochastic_round:
                entry.param.copy_(entry.param.to(kept.param.dtype))
    return wide


def _comparable(*dtypes: torch.dtype) -> int:
    """Steps after which codes are the same: parameters decide them, and the interpreter rounds bfloat16 down."""
    return 1 if torch.bfloat16 in dtypes else STEPS


def _in_float64(entry: Entry) -> Entry:
    param, grad, exp_avg = (tensor.clone().double() for tensor in entry[:3])
    second = [part.clone() if part.dtype == torch.uint8 else part.double() for part in entry.exp_avg_sq]
    return entry._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=second, step=entry.step.clone())


def _assert_agree(entries: Sequence[Entry], expected: Sequence[Entry], steps: int = STEPS) -> None:
    """Codes may differ where the last bit of a second moment or the parameter's upper half decides: very rarely."""
    for entry, wide in zip(entries, expected, strict=True):
        codes, exact = (one.exp_avg_sq[0].to(torch.int32) for one in (entry, wide))
        same = codes == exact
        assert (~same).sum() <= max(codes.numel() // 1000, codes.numel() >= 100)
        assert (codes - exact).abs().le(1).all()
        unit = torch.finfo(entry.param.dtype).eps
        largest = max([*wide.param.abs().flatten().tolist(), 1e-3])
        stored = 20 * steps * HYPER.lr * torch.finfo(entry.exp_avg.dtype).eps if entry.exp_avg_scale is None else 0
        tolerance = 2 * steps * unit * largest + stored
        torch.testing.assert_close(entry.param[same].double(), wide.param[same], rtol=0, atol=tolerance)
        assert entry.step == wide.step


@pytest.mark.parametrize(("dtype", "grad", "exp_avg"), PRECISIONS, ids=str)
def test_every_precision_agrees_with_float64(
    dtype: torch.dtype, grad: torch.dtype, exp_avg: torch.dtype, device: str
) -> None:
    entries = [_entry(shape, device, dtype, grad, exp_avg) for shape in SHAPES]
    steps = _comparable(dtype, exp_avg)
    expected = _expected(entries, steps=steps)
    _run(entries, steps=steps)
    _assert_agree(entries, expected, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_gradients_of_a_function_to_maximize_are_rounded_by_what_lies_in_memory(
    dtype: torch.dtype, device: str
) -> None:
    entries = [_entry((2100,), device, dtype)]
    hyper = HYPER._replace(maximize=True)
    steps = _comparable(dtype)
    expected = _expected(entries, hyper._replace(clip_factor=torch.tensor(0.25, device=device)), steps)
    _run(entries, hyper, steps, grad_scale=torch.tensor(4.0, device=device), found_inf=torch.zeros((), device=device))
    _assert_agree(entries, expected, steps)


def test_infinite_gradients_leave_codes_alone(device: str) -> None:
    entries = [_entry((300,), device)]
    before = [_in_float64(entry) for entry in entries]
    _run(entries, found_inf=torch.ones((), device=device))
    _assert_agree(entries, before)


def test_stochastic_rounding_of_parameters_takes_other_random_bits(device: str) -> None:
    entries = [_entry((2100,), device, torch.bfloat16)._replace(seed=7)]
    hyper = HYPER._replace(stochastic_round=True)
    expected = _expected(entries, hyper, 1)
    _run(entries, hyper, 1)
    _assert_agree(entries, expected, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "stochastic"])
def test_first_moments_in_codes_too(dtype: torch.dtype, rounds: bool, device: str) -> None:
    one = _entry((2100,), device, dtype)
    codes = torch.randint(-127, 128, (2100,), dtype=torch.int8, device=device)
    scales = torch.full((9,), 127, dtype=torch.uint8, device=device)
    root = codes.double() / 127
    hyper = HYPER._replace(stochastic_round=rounds)
    expected = _expected([one._replace(exp_avg=root * root.abs())], hyper, 1)
    entries = [one._replace(exp_avg=codes, exp_avg_scale=scales)]
    _run(entries, hyper, 1)
    _assert_agree(entries, expected, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_extreme_gradients(dtype: torch.dtype, device: str) -> None:
    """What is not finite stays so, and large second moments become the largest code."""
    entry = _entry((300,), device, dtype)
    entry.grad[20:25] = torch.tensor([math.nan, math.inf, -math.inf, 1e18, 1e-25])
    expected = _expected([entry], steps=1)
    _run([entry], steps=1)
    codes = entry.exp_avg_sq[0]
    assert torch.equal(codes, expected[0].exp_avg_sq[0])
    assert codes[20:24].tolist() == [NOT_FINITE] * 3 + [254]
    torch.testing.assert_close(entry.param.isfinite(), expected[0].param.isfinite(), rtol=0, atol=0)
    entry.grad[20:23] = 1
    _run([entry], steps=1)
    assert codes[20:23].eq(NOT_FINITE).all()


def test_nothing_stays_nothing_and_the_smallest_number_does_not_vanish(device: str) -> None:
    entry = _entry((300,), device)
    entry.grad.zero_()
    entry.exp_avg_sq[0][::2], entry.exp_avg_sq[0][1::2] = 0, 1
    before = entry.exp_avg_sq[0].clone()
    _run([entry])
    assert torch.equal(entry.exp_avg_sq[0], before)


def test_late_steps_take_other_random_bits(device: str) -> None:
    """The product of a step count and a factor goes past 32 bits."""
    for step in (0.0, 1.0, 65535.0, 2.0**24 - 8):
        entries = [_entry((2100,), device)]
        entries[0].step.fill_(step)
        expected = _expected(entries, steps=1)
        _run(entries, steps=1)
        _assert_agree(entries, expected, 1)


def test_parts_get_the_codes_of_the_whole(device: str) -> None:
    whole = _entry((12, 256), device)
    parts = [_rows_of(whole, slice(start, start + 4)) for start in (0, 4, 8)]
    _run(parts)
    _run([whole])
    assert torch.equal(torch.cat([part.exp_avg_sq[0] for part in parts]), whole.exp_avg_sq[0])


def _rows_of(entry: Entry, rows: slice) -> Entry:
    param, grad, exp_avg, codes = (tensor[rows].clone() for tensor in (*entry[:3], *entry.exp_avg_sq))
    return entry._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=[codes], step=entry.step.clone())


def test_other_second_moments_in_the_same_step(device: str) -> None:
    coded = _entry((70, 60), device)
    second = torch.rand(40, 48, device=device) + 0.1
    plain = _entry((40, 48), device)._replace(exp_avg_sq=[second])
    by_row = _entry((40, 48), device)._replace(exp_avg_sq=[second[:, :1].clone()], averaged_dims=((1,),))
    expected = _expected([coded, plain, by_row])
    _run([coded, plain, by_row])
    _assert_agree([coded], expected[:1])
    for entry, wide in zip((plain, by_row), expected[1:], strict=True):
        torch.testing.assert_close(entry.param.double(), wide.param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels last", "unaligned", "gaps", "long gaps"])
def test_layouts(layout: str, device: str) -> None:
    one = _entry((6, 5, 4, 3) if layout == "channels last" else (24, 300), device)
    entries = [_with_layout(one, layout)]
    assert same_layout(entries[0])
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


def _with_layout(entry: Entry, layout: str) -> Entry:
    tensors = [*entry[:3], *entry.exp_avg_sq]
    if layout == "channels last":
        moved = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    elif layout == "unaligned":
        moved = [_shifted(tensor, 1) for tensor in tensors]
    else:
        gap = 16 if layout == "gaps" else 300
        padded = [torch.cat([tensor, tensor[:, :gap]], 1) for tensor in tensors[:3]]
        moved = [*(tensor[:, : entry.param.shape[1]] for tensor in padded), tensors[3]]
    return entry._replace(param=moved[0], grad=moved[1], exp_avg=moved[2], exp_avg_sq=moved[3:])


def _shifted(tensor: Tensor, by: int) -> Tensor:
    return torch.cat([tensor.new_zeros(by), tensor.flatten()])[by:].view_as(tensor)


def test_which_codes_are_supported(device: str) -> None:
    entry = _entry((8, 16), device)
    triton = BACKENDS["triton"]
    assert triton.supports(entry)
    assert not triton.supports(entry._replace(max_exp_avg_sq=[entry.exp_avg_sq[0].clone()]))
    assert not triton.supports(entry._replace(precomputed=True))
    assert not triton.supports(entry._replace(exp_avg_sq=[entry.exp_avg_sq[0][:, :1]], averaged_dims=((1,),)))
    assert not triton.supports(entry._replace(exp_avg_sq=[entry.exp_avg_sq[0].t().contiguous().t()]))
