"""A step by Triton's kernels belongs to the device of its tensors, whichever is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only installed on Linux")

import slimadam.kernels.triton.launch as triton_update
from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.kernels.triton import kernels

RULES = {"full": Rule(), "rows": Rule((1,), "mean"), "columns": Rule((0,), "mean"), "factored": Rule(form="factored")}


class Watched:
    """A kernel that notes the device that is current at each launch."""

    def __init__(self, kernel: Any, current: list[torch.device], launches: list[torch.device | None]) -> None:
        self._kernel, self._current, self._launches = kernel, current, launches
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(self._current[-1] if self._current else None)
        return self._kernel[grid]


@pytest.fixture
def launches(on_triton: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.device | None]:
    """The device that was made the current one, at each launch, table and copy."""
    current: list[torch.device] = []
    found: list[torch.device | None] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def copied(*arguments: Any) -> Any:
        found.append(current[-1] if current else None)
        return pinned(*arguments)

    pinned = triton_update._pinned
    monkeypatch.setattr(triton_update, "_on", on)
    monkeypatch.setattr(triton_update, "_pinned", copied)
    monkeypatch.setattr(kernels, "advance_steps", Watched(kernels.advance_steps, current, found))
    for kind, kernel in triton_update._KERNELS.items():
        monkeypatch.setitem(triton_update._KERNELS, kind, Watched(kernel, current, found))
    return found


def test_everything_happens_on_the_tensors_device(launches: list[torch.device | None], device: str) -> None:
    params = {name: torch.randn(6, 5).to(device).requires_grad_() for name in RULES}
    optimizer = SlimAdam(params.items(), plan=CompressionPlan(RULES))
    for _ in range(3):  # gradients move from step to step, and tables follow
        kept = [param.grad for param in params.values()]
        for param in params.values():
            param.grad = torch.randn_like(param)
        before = len(launches)
        optimizer.step()
        assert len(launches) > before
        del kept
    assert set(launches) == {params["full"].device}
    assert optimizer.backend("factored") == "triton"


def test_the_device_is_made_the_current_one() -> None:
    guard = triton_update._on(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device)
    assert guard.idx == 1
    with triton_update._on(torch.device("cpu")):
        pass


def test_memory_is_not_reused_before_another_stream_has_read_it(
    launches: list[torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are taken on another stream than the one on which tables were made, which may let go of them first."""
    stream = "first"
    recorded: list[tuple[int, str]] = []
    monkeypatch.setattr(triton_update, "_current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, user: recorded.append((id(tensor), user)))
    params = {name: torch.randn(6, 5).requires_grad_() for name in RULES}
    optimizer = SlimAdam(params.items(), plan=CompressionPlan(RULES))
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.step()
    assert recorded == []
    stream = "second"
    optimizer.step()
    optimizer.step()
    (run,) = (run for runs in optimizer._stepper._runs.values() for run in runs.values())
    (step,) = run._steps.values()  # type: ignore[attr-defined]
    assert len(recorded) > 8
    assert sorted(recorded) == sorted((id(tensor), "second") for tensor in step._tensors())
