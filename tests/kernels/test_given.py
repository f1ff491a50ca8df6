"""Every implementation on second moments that are made already, against float64 arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimadam.kernels.cpp.build import library
from slimadam.kernels.interface import Entry, Hyperparameters
from slimadam.optim.step.dispatch import BACKENDS, choose_backend

HYPER = Hyperparameters(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
STEP = 3
CASES: list[tuple[tuple[int, ...], Any]] = [
    ((1,), (0,)),
    ((300,), (0,)),
    ((7, 5), (0,)),
    ((7, 5), (1,)),
    ((7, 5), (0, 1)),
    ((1, 7), (0,)),
    ((7, 1), (1,)),
    ((7, 5), "factored"),
    ((3, 5, 7), (1,)),
    ((3, 5, 7), (0,)),
    ((3, 5, 7), "factored"),
    ((600, 70), (0,)),
    ((600, 70), (1,)),
    ((3, 5000), (1,)),
    ((600, 70), "factored"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OPTIONS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "compiled": {},
}


def _entry(shape: tuple[int, ...], dims: Any, dtype: torch.dtype, device: str = "cpu") -> Entry:
    averaged = (tuple(range(1, len(shape))), (0,)) if dims == "factored" else (dims,)
    kept = [[1 if dim in each else size for dim, size in enumerate(shape)] for each in averaged]
    wide = torch.promote_types(dtype, torch.float32)
    second = [torch.rand(sizes).add(0.1).to(device, wide) for sizes in kept]
    param, grad, exp_avg = (torch.randn(shape).to(device, dtype) for _ in range(3))
    step = torch.tensor(float(STEP), device=device)
    return Entry(param, grad, exp_avg, second, (), step, averaged, precomputed=True)


def _expected(entry: Entry, hyper: Hyperparameters) -> tuple[Tensor, Tensor]:
    """First moment and parameter after the step, from the formulas alone."""
    param, grad, exp_avg = (tensor.double() for tensor in entry[:3])
    second = torch.ones_like(param)
    for part in entry.exp_avg_sq:
        second = second * part.double()
    grad = -grad if hyper.maximize else grad
    exp_avg = (hyper.beta1 * exp_avg + (1 - hyper.beta1) * grad).to(entry.exp_avg.dtype).double()
    denominator = (second / (1 - hyper.beta2**STEP)).sqrt() + hyper.eps
    moved = exp_avg / (1 - hyper.beta1**STEP) / denominator
    return exp_avg, param * (1 - hyper.lr * hyper.weight_decay) - hyper.lr * moved


def _check(entry: Entry, hyper: Hyperparameters, run: Any) -> None:
    exp_avg, param = _expected(entry, hyper)
    before = [part.clone() for part in entry.exp_avg_sq]
    run()
    rtol = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}[entry.param.dtype]
    torch.testing.assert_close(entry.exp_avg.double(), exp_avg, rtol=rtol, atol=rtol)
    torch.testing.assert_close(entry.param.double(), param, rtol=rtol, atol=rtol)
    for part, was in zip(entry.exp_avg_sq, before, strict=True):
        torch.testing.assert_close(part, was, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", sorted(OPTIONS))
@pytest.mark.parametrize(("amsgrad", "maximize"), [(False, False), (True, True)])
def test_a_step_from_given_second_moments(backend: Any, dtype: torch.dtype, amsgrad: bool, maximize: bool) -> None:
    if backend == "compiled" and library() is None:
        pytest.skip("no C++ compiler")
    hyper = HYPER._replace(amsgrad=amsgrad, maximize=maximize)
    defaults = {"foreach": None, "fused": None, "differentiable": False, "capturable": False, "momentum_dtype": None}
    group = {**defaults, "bf16_stochastic_round": False, **OPTIONS[backend]}
    for shape, dims in CASES:
        entry = _entry(shape, dims, dtype)
        assert choose_backend(entry.param, dtype, entry.averaged_dims, group) == backend
        assert BACKENDS[backend].supports(entry)
        _check(entry, hyper, lambda entry=entry: BACKENDS[backend].update([entry], hyper))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_triton_from_given_second_moments(dtype: torch.dtype, device: str) -> None:
    pytest.importorskip("triton", reason="Triton is only installed on Linux")
    from slimadam.kernels.triton.launch import TritonStep

    entries = [_entry(shape, dims, dtype, device) for shape, dims in CASES]
    for entry in entries:
        entry.step.fill_(STEP - 1)
    prepared = TritonStep(entries, HYPER)
    params = [entry.param.clone() for entry in entries]
    prepared.run(HYPER)
    for entry, param in zip(entries, params, strict=True):
        torch.testing.assert_close(entry.param, param, rtol=0, atol=0)
        assert entry.step == STEP
    expected = [_expected(entry, HYPER) for entry in entries]
    prepared.run_given(HYPER)
    rtol = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}[dtype]
    for entry, (exp_avg, param) in zip(entries, expected, strict=True):
        torch.testing.assert_close(entry.exp_avg.double(), exp_avg, rtol=rtol, atol=rtol)
        torch.testing.assert_close(entry.param.double(), param, rtol=rtol, atol=rtol)


def test_triton_takes_a_part_with_gaps_from_given_second_moments(device: str) -> None:
    pytest.importorskip("triton", reason="Triton is only installed on Linux")
    from slimadam.kernels.triton.launch import TritonStep

    whole = [torch.randn(6, 2, 20).to(device) for _ in range(3)]
    for dims, kept in (((0,), (1, 20)), ((1,), (6, 1))):
        param, grad, exp_avg = (tensor.clone()[:, 1] for tensor in whole)
        second, step = (torch.rand(kept) + 0.1).to(device), torch.tensor(2.0, device=device)
        entry = Entry(param, grad, exp_avg, [second], (), step, (dims,), precomputed=True)
        expected = _expected(entry, HYPER)
        prepared = TritonStep([entry], HYPER)
        prepared.run(HYPER)
        prepared.run_given(HYPER)
        torch.testing.assert_close(entry.param.double(), expected[1], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(entry.exp_avg.double(), expected[0], rtol=2e-6, atol=2e-6)
