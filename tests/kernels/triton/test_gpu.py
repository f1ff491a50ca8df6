"""Every step right on CUDA, whatever implementation runs there; benchmarks/gpu/checks.py has the checks."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu.checks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET runs kernels on the CPU instead"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_steps_are_right(name: str) -> None:
    report = CHECKS[name]("cuda")
    assert report.worst <= 1
    assert sum(report.backends.values()) > 0
