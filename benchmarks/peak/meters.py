"""Measure the memory that a process holds at most, phase by phase.

:class:`TensorBytes` is exact on a CPU: torch's profiler tells of every block that the CPU allocator hands out or takes
back, temporaries of kernels and what autograd keeps included. A ``TorchDispatchMode`` sees only what operators return.
What is not the allocator's, scratch memory of matrix products and Python's objects, is in :class:`ProcessBytes`: the
operating system's count of pages, which also has those that the C library keeps for later. On CUDA the allocator
counts for itself.
"""

from __future__ import annotations

import gc
import resource
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from benchmarks.harness.stopwatch import is_cuda

_MARK = "phase: "
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Bytes held in a phase.

    Attributes:
        before: When it began.
        peak: At most.
        after: When it ended.
    """

    before: int
    peak: int
    after: int

    @property
    def beyond(self) -> int:
        """Bytes that were held for the phase alone: neither before it nor after it."""
        return self.peak - max(self.before, self.after)


class Meter(ABC):
    """Measures phases that do not overlap."""

    def __init__(self) -> None:
        self._peaks: dict[str, Peak] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block; what an earlier one left to the garbage collector is not counted.

        Args:
            name: Its name, another one each time.
        """
        gc.collect()
        with self._measured(name):
            yield

    @abstractmethod
    def _measured(self, name: str) -> AbstractContextManager[None]: ...

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the phases in a block, which begins before any tensor is made."""
        yield

    def peaks(self) -> dict[str, Peak]:
        """Return the phases in their order, once the meter has run."""
        return self._peaks


class TensorBytes(Meter):
    """Counts the bytes of the CPU allocator's blocks; those from before it ran are not known."""

    def __init__(self) -> None:
        super().__init__()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    @contextmanager
    @override
    def running(self) -> Iterator[None]:
        with self._profile:
            yield
        assert self._profile.profiler is not None
        results: Any = self._profile.profiler.kineto_results
        self._peaks = _peaks_of(results.events())

    @contextmanager
    @override
    def _measured(self, name: str) -> Iterator[None]:
        with record_function(f"{_MARK}{name}"):
            yield


def _peaks_of(events: list[Any]) -> dict[str, Peak]:
    """Return the phases of a profile."""
    phases = []
    changes = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_MARK):
            start = event.start_ns()
            phases.append((start, start + event.duration_ns(), name.removeprefix(_MARK)))
    changes.sort(key=lambda change: change[0])
    held, position, peaks = 0, 0, {}
    for start, end, name in sorted(phases):
        while position < len(changes) and changes[position][0] < start:
            held += changes[position][1]
            position += 1
        before = peak = held
        while position < len(changes) and changes[position][0] <= end:
            held += changes[position][1]
            peak = max(peak, held)
            position += 1
        peaks[name] = Peak(before, peak, held)
    return peaks


class ProcessBytes(Meter):
    """Counts the process's pages in memory. Where its peak cannot be reset, that of earlier phases stays."""

    @contextmanager
    @override
    def _measured(self, name: str) -> Iterator[None]:
        before = _status("VmRSS")
        _reset_peak()
        yield
        self._peaks[name] = Peak(before, _peak(), _status("VmRSS"))


def _reset_peak() -> None:
    try:
        _RESET.write_text("5")
    except OSError:  # the kernel has no such file, or does not let this process write to it
        return


def _status(key: str) -> int:
    """Return a count of the process's status in bytes; 0 where the system keeps none."""
    if not _STATUS.exists():
        return 0
    values = (line.split() for line in _STATUS.read_text().splitlines())
    return next((1024 * int(words[1]) for words in values if words[0] == f"{key}:"), 0)


def _peak() -> int:
    return _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CudaBytes(Meter):
    """Counts the bytes that CUDA's allocator has handed out."""

    @contextmanager
    @override
    def _measured(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        self._peaks[name] = Peak(before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated())


def meter_of(device: str, process: bool = False) -> Meter:
    """Return the meter of tensors on a device, or that of the process.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        process: Whether to count the process's pages.
    """
    if process:
        return ProcessBytes()
    return CudaBytes() if is_cuda(device) else TensorBytes()
