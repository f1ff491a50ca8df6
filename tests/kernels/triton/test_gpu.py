"""Every step right on CUDA, whatever implementation runs there; benchmarks/gpu/checks.py has the checks."""

from __future__ import annotations

import pytest

from benchmarks.gpu.checks import CHECKS
from tests.versions import ON_CUDA

pytestmark = ON_CUDA


@pytest.mark.parametrize("name", CHECKS)
def test_steps_are_right(name: str) -> None:
    report = CHECKS[name]("cuda")
    assert report.worst <= 1
    assert sum(report.backends.values()) > 0
