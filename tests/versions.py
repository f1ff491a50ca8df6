"""What the torch that runs the tests can do, and where Triton's kernels run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
import torch


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


TORCH = release(torch.__version__)


def triton_device() -> str:
    """A GPU; without one, or where ``TRITON_INTERPRET=1`` asks for it, the CPU, in Triton's interpreter."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def needs_torch(version: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """Skip a test where torch is older, and say why."""
    return pytest.mark.skipif(version > TORCH, reason=f"torch {torch.__version__}: {reason}")


shards = needs_torch((2, 7), "FSDP2 does not run on a CPU, and DTensors may have no uneven or empty shards")
gradient_dtype = needs_torch((2, 9), "a gradient has its parameter's precision")

# What the CUDA allocator holds and what compiled kernels compute cannot be seen on a CPU, nor in Triton's interpreter.
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="TRITON_INTERPRET runs kernels on the CPU instead"),
]
"""Marks of tests that need a GPU."""


def on_cuda(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on a GPU alone."""
    for mark in ON_CUDA:
        test = mark(test)
    return test
