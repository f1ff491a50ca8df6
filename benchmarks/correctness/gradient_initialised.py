"""GI-Adam's first steps, in every implementation, form and precision, beside the formula in float64."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.exactness import compare, gradients, momentum_of
from benchmarks.harness.formula import Hyperparameters, follow
from slimadam import CompressionPlan, Rule, SlimAdam, Split
from slimadam.optim.step import dispatch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which torch does when it pleases

STEPS = 5
LARGEST_ERROR = 1e-6
HYPER = Hyperparameters(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, variance_init="gradient")
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "reference": {"fused": False},
    "foreach": {"foreach": True},
    "compiled": {},
    "triton": {},
}
_MATRIX, _CONVOLUTION = (24, 35), (6, 5, 3, 3)
_PARTS = tuple(
    Rule(rule.dims, rule.form, piece.shape, part=piece)
    for rule, piece in zip(
        (Rule((1,), "mean"), Rule((0,), "mean"), Rule(form="factored"), Rule()),
        Split({"query": 6, "key": 6, "value": 6, "gate": 6}).divide("w", _MATRIX),
        strict=True,
    )
)
FORMS: dict[str, tuple[tuple[int, ...], tuple[Rule, ...]]] = {
    "full": (_MATRIX, (Rule(),)),
    "mean over columns": (_MATRIX, (Rule((1,), "mean"),)),
    "mean over rows": (_MATRIX, (Rule((0,), "mean"),)),
    "mean over all": (_MATRIX, (Rule((0, 1), "mean"),)),
    "mean of a convolution": (_CONVOLUTION, (Rule((1, 2, 3), "mean"),)),
    "factored": (_MATRIX, (Rule(form="factored"),)),
    "factored convolution": (_CONVOLUTION, (Rule(form="factored"),)),
    "parts": (_MATRIX, _PARTS),
}
MOMENTA: tuple[torch.dtype | str, ...] = (torch.float32, torch.bfloat16, "int8")


def missing() -> dict[str, str]:
    """Return the implementations that cannot run here, and the reasons."""
    found = {}
    if importlib.util.find_spec("triton") is None:
        found["triton"] = "Triton is not installed"
    param = torch.ones(_MATRIX, requires_grad=True)
    if SlimAdam([param], plan=None, fused=True).backend(param) != "compiled":
        found["compiled"] = "there is no C++ compiler"
    return found


@contextlib.contextmanager
def running(implementation: str) -> Iterator[None]:
    """Let SlimAdam take Triton on a CPU too, in Triton's interpreter, if that is the implementation."""
    on_triton = mock.patch.object(dispatch, "runs_triton", return_value=True)
    with on_triton if implementation == "triton" else contextlib.nullcontext():
        yield


def errors(implementation: str, forms: Iterable[str]) -> dict[str, float]:
    """Return the largest relative error of five steps by form and precision.

    First moments are in the parameter's precision.

    Args:
        implementation: Name of the way to take a step.
        forms: Keys of :data:`FORMS`.
    """
    found = {}
    for form in forms:
        for dtype in (torch.float32, torch.float64):
            start, param, grads = _stepped(implementation, form, dtype, None)
            expected = follow(start, grads, FORMS[form][1], HYPER)
            # Of the distance that each element has gone, and of what it began with.
            error = (param.cpu().double() - expected.param).abs() / (expected.path + start.cpu().double().abs())
            found[f"{form}, {str(dtype).removeprefix('torch.')}"] = error.max().item()
    return found


def rounded_moments(implementation: str, forms: Iterable[str]) -> float:
    """Return the largest error with first moments in a precision of their own, as a share of what rounding explains.

    Args:
        implementation: Name of the way to take a step.
        forms: Keys of :data:`FORMS`.

    Raises:
        WrongStepError: The error is larger than rounding explains.
    """
    worst = 0.0
    in_interpreter = implementation == "triton" and not torch.cuda.is_available()
    for form in forms:
        for stored in MOMENTA:
            if in_interpreter and stored == torch.bfloat16:  # it cuts off where a GPU rounds to nearest
                continue
            start, param, grads = _stepped(implementation, form, torch.float32, stored)
            momentum = momentum_of(start, stored)
            expected = follow(start, grads, FORMS[form][1], HYPER, momentum)
            worst = max(worst, compare(form, start, param, expected, STEPS, momentum))
    return worst


def first_update_of_adams() -> float:
    """Return the size of the first update over that of Adam; the formula says ``sqrt(1 - beta2)``."""
    updates = []
    for variance_init in ("zeros", "gradient"):
        param = torch.zeros(_MATRIX, dtype=torch.float64, requires_grad=True)
        optimizer = SlimAdam([param], lr=1.0, eps=0.0, weight_decay=0.0, plan=None, variance_init=variance_init)
        (param.grad,) = gradients(param, 1)
        optimizer.step()
        updates.append(param.detach().abs())
    return (updates[1] / updates[0]).mean().item()


def _stepped(
    implementation: str, form: str, dtype: torch.dtype, momentum_dtype: torch.dtype | str | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Take five steps; return the parameter before and after them, and the gradients."""
    shape, rules = FORMS[form]
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    # Small beside the updates, so that these are what is compared.
    start = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = start.to(device=device, dtype=dtype)
    grads = gradients(start, STEPS)
    plan = CompressionPlan({f"w[{rule.part.label}]" if rule.part else "w": rule for rule in rules})
    param = start.clone().requires_grad_()
    with running(implementation):
        options = {**IMPLEMENTATIONS[implementation], "momentum_dtype": momentum_dtype}
        optimizer = SlimAdam([("w", param)], plan=plan, **vars(HYPER), **options)
        if momentum_dtype is None:
            _check_runs(implementation, form, optimizer)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
    return start, param.detach(), grads


def _check_runs(implementation: str, form: str, optimizer: SlimAdam) -> None:
    if optimizer.backend("w") != implementation:
        raise RuntimeError(f"{form} runs on {optimizer.backend('w')}, not on {implementation}")
