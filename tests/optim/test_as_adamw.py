"""With ``plan=None``, SlimAdam is ``torch.optim.AdamW``."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from slimadam import CompressionPlan, Rule, SlimAdam, convert_state_dict
from tests.reference import gradients, train

SHAPES = [(), (1,), (0,), (7, 5), (1, 9), (3, 4, 5, 2)]
STEPS = 25
IMPLEMENTATIONS = [
    {"foreach": False},
    {"fused": False},
    {"foreach": True},
    {"capturable": True},
    {},
]
OPTIONS = [
    dict(zip(("weight_decay", "amsgrad", "maximize"), values, strict=True))
    for values in itertools.product((0.0, 0.1), (False, True), (False, True))
]


def _ulps(ours: Tensor, theirs: Tensor) -> float:
    if ours.numel() == 0:
        return 0.0
    # A parameter can cross zero, where its own ulp says nothing: the size of a few updates is the least scale.
    scale = theirs.abs().clamp_min(1e-2)
    return float(((ours - theirs).abs() / scale).max()) / torch.finfo(theirs.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_adamw_over_25_steps(
    dtype: torch.dtype, implementation: dict[str, Any], options: dict[str, Any]
) -> None:
    params = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    grads = list(zip(*(gradients(shape, STEPS, seed) for seed, shape in enumerate(SHAPES)), strict=True))
    shared = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, **options}
    theirs, _ = train(params, lambda p: torch.optim.AdamW(p, **shared), grads)
    ours, _ = train(params, lambda p: SlimAdam(p, **shared, **implementation, plan=None), grads)
    allowed = 0 if implementation.get("foreach") is False or implementation.get("fused") is False else 4
    for shape, a, b in zip(SHAPES, ours, theirs, strict=True):
        assert _ulps(a.detach(), b.detach()) <= allowed, shape


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_complex_parameters_equal_adamw(dtype: torch.dtype, amsgrad: bool) -> None:
    params = [torch.randn(4, 3, dtype=dtype)]
    grads = [[torch.randn(4, 3, dtype=dtype)] for _ in range(5)]
    theirs, _ = train(params, lambda p: torch.optim.AdamW(p, amsgrad=amsgrad), grads)
    ours, optimizer = train(params, lambda p: SlimAdam(p, amsgrad=amsgrad, plan=None), grads)
    assert torch.equal(ours[0], theirs[0])
    assert optimizer.state[ours[0]]["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize("implementation", [{"foreach": False}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_float32_second_moments(dtype: torch.dtype, implementation: dict[str, Any]) -> None:
    params = [torch.randn(6, 5).to(dtype)]
    grads = [[grad.to(dtype)] for grad in gradients((6, 5), 5)]
    ours, optimizer = train(params, lambda p: SlimAdam(p, lr=1e-2, plan=None, **implementation), grads)
    second = optimizer.state[ours[0]]["exp_avg_sq"]
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for (grad,) in grads:
        expected = 0.999 * expected + 0.001 * grad.double() ** 2
    assert second.dtype == torch.float32
    assert optimizer.state[ours[0]]["exp_avg"].dtype == dtype
    torch.testing.assert_close(second.double(), expected, rtol=5 * 2**-23, atol=0)
    theirs, _ = train(params, lambda p: torch.optim.AdamW(p, lr=1e-2), grads)
    # AdamW rounds the root of its own second moment to 16 bits, which moves each of 5 updates of 1e-2 by an ulp.
    atol = 5 * (1e-2 * 2 + 4) * torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=atol)


def test_default_on_cpu_is_compiled_and_says_so() -> None:
    param = torch.randn(4, 3).requires_grad_()
    assert SlimAdam([param], plan=None).backend(param) == "compiled"
    assert SlimAdam([("w", param)], plan=None, fused=False).backend("w") == "reference"
    assert SlimAdam([param], plan=None, foreach=True).backend(param) == "foreach"
    with pytest.raises(KeyError, match="not a parameter"):
        SlimAdam([("w", param)], plan=None).backend("v")


LOADS_AVERAGES = """
import torch
from slimadam import CompressionPlan, Rule, SlimAdam, convert_state_dict
from slimadam.parts import Part

PLANS = {
    "rows": {"w": Rule((1,), "mean")},
    "all": {"w": Rule((0, 1), "mean")},
    "factored": {"w": Rule(form="factored")},
    "parts": {
        f"w[{label}]": Rule((1,), "mean", (150, 200), part=Part(label, (300, 200), (300, 200), 0, start, 150))
        for label, start in (("query", 0), ("value", 150))
    },
}
for form, rules in PLANS.items():
    for plan in (CompressionPlan(rules), None):
        param = torch.nn.Parameter(torch.randn(300, 200))
        param.grad = torch.randn(300, 200)
        slim = SlimAdam([("w", param)], plan=plan, fused=True)
        slim.step()
        saved = slim.state_dict() if plan else convert_state_dict(slim.state_dict(), CompressionPlan(rules))
        adamw = torch.optim.AdamW([param], fused=True)
        try:
            adamw.load_state_dict(saved)
            for _ in range(20):
                adamw.step()
        except Exception as error:
            print(form, "saved" if plan else "converted", type(error).__name__)
"""


def test_adamw_refuses_averages_and_its_fused_kernel_never_gets_them() -> None:
    """That kernel writes as many second moments as the parameter has elements, whatever there is room for."""
    done = subprocess.run([sys.executable, "-c", LOADS_AVERAGES], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    errors = {"rows": "RuntimeError", "all": "RuntimeError", "factored": "KeyError", "parts": "KeyError"}
    assert done.stdout.splitlines() == [
        f"{form} {way} {error}" for form, error in errors.items() for way in ("saved", "converted")
    ]


def test_groups_with_averages_are_saved_as_not_fused() -> None:
    params = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in ("full", "averaged")}
    plan = CompressionPlan({"full": Rule(), "averaged": Rule((1,), "mean")})
    optimizer = SlimAdam([{"params": [named]} for named in params.items()], plan=plan, fused=True)
    saved = optimizer.state_dict()
    assert [group["fused"] for group in saved["param_groups"]] == [True, None]
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    everything = SlimAdam([{"params": [named]} for named in params.items()], plan=None, fused=True).state_dict()
    converted = convert_state_dict(everything, plan)
    assert [group["fused"] for group in everything["param_groups"]] == [True, True]
    assert [group["fused"] for group in converted["param_groups"]] == [True, None]
