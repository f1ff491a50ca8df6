"""The choice of an implementation where Triton is there but cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slimadam.optim.step import dispatch

pytest.importorskip("triton", reason="Triton is only installed on Linux")

DEVICES = [torch.device("cuda", index) for index in range(2)]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception | None], list[torch.device]]]:
    """Let launches fail, or not, and note the devices that they are tried on."""

    def trials_that(error: Exception | None) -> list[torch.device]:
        tried: list[torch.device] = []

        def launch(device: torch.device) -> None:
            tried.append(device)
            if error is not None:
                raise error

        monkeypatch.setattr(dispatch, "_triton", lambda: SimpleNamespace(try_launch=launch))
        return tried

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # raises in torch without CUDA
    dispatch._launches_triton.cache_clear()
    yield trials_that
    dispatch._launches_triton.cache_clear()


def test_a_failing_launch_is_told_once_for_each_device(
    trials: Callable[[Exception | None], list[torch.device]], caplog: pytest.LogCaptureFixture
) -> None:
    tried = trials(RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."))
    with caplog.at_level(logging.WARNING, logger="slimadam"):
        assert not any(dispatch.runs_triton(device) for device in [*DEVICES, *DEVICES])
    assert tried == DEVICES
    assert [record.getMessage() for record in caplog.records] == [
        f"Triton cannot run on {device}, so steps take lists of tensors at once: "
        "RuntimeError: Failed to find C compiler."
        for device in DEVICES
    ]
    on_cuda = torch.empty(4, 4, device="meta")  # like CUDA without Triton, it is not on the CPU
    group = {"differentiable": False, "foreach": None, "fused": None, "bf16_stochastic_round": False}
    assert dispatch.choose_backend(on_cuda, on_cuda.dtype, [(1,)], group) == "foreach"


def test_a_launch_that_works_is_tried_once(
    trials: Callable[[Exception | None], list[torch.device]], caplog: pytest.LogCaptureFixture
) -> None:
    tried = trials(None)
    assert all(dispatch.runs_triton(device) for device in [*DEVICES, *DEVICES])
    assert tried == DEVICES
    assert not caplog.records
    assert not dispatch.runs_triton(torch.device("cpu"))


def test_nothing_is_tried_where_a_launch_would_stay_or_has_no_memory(
    trials: Callable[[Exception | None], list[torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured graph would repeat it, and FakeTensorMode makes tensors without memory."""
    tried = trials(RuntimeError("no launch"))
    with FakeTensorMode():
        assert dispatch.runs_triton(DEVICES[0])
    with monkeypatch.context() as captures:
        captures.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert dispatch.runs_triton(DEVICES[0])
    assert tried == []
    assert not dispatch.runs_triton(DEVICES[0])
