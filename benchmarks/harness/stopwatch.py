"""Measure milliseconds, launches and bytes of an optimizer's step, on a CPU or on CUDA."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

COPIED_BYTES = 1 << 28
CYCLES_PER_MILLISECOND = 2_000_000
"""Cycles of a GPU in a millisecond, at least: none runs faster."""
LONGEST_SLEEP = 500
"""Milliseconds; a call that keeps the host busy for longer waits for the device in it."""
_WITHOUT_TENSORS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size, type)
_CODE = (ModuleType, FunctionType, MethodType, BuiltinFunctionType)


class Lap(NamedTuple):
    """One run of a step, in milliseconds.

    Attributes:
        total: Until the work is done; on CUDA the device's own time, without waiting for launches.
        host: Until the call returned, on an idle device; the same on a CPU.
    """

    total: float
    host: float


def lap(step: Callable[[], Any], device: str) -> Lap:
    """Time a call; on CUDA two of them: the host's time of one, and the device's of the other, by events.

    Args:
        step: The call.
        device: Device that does the work.
    """
    if not is_cuda(device):
        start = time.perf_counter()
        step()
        took = 1e3 * (time.perf_counter() - start)
        return Lap(took, took)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return Lap(_device_milliseconds(step, host), host)


def _device_milliseconds(step: Callable[[], Any], host: float) -> float:
    """Return the device's time of a call; launches queue behind a device that sleeps for longer than they take."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    sleep = min(1 + 2 * host, LONGEST_SLEEP)
    torch.cuda._sleep(int(CYCLES_PER_MILLISECOND * sleep))  # type: ignore[no-untyped-call]
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def copier(device: str) -> tuple[Callable[[], Any], int]:
    """Return a copy of random numbers, too large for any cache, and the bytes that it reads and writes.

    On a CPU it adds to its target: a plain copy there also reads what it overwrites, which an update in place needs
    anyway.
    """
    source, target = (torch.randn(COPIED_BYTES // 4, device=device) for _ in range(2))
    if is_cuda(device):
        return lambda: target.copy_(source), 2 * COPIED_BYTES
    return lambda: target.add_(source), 3 * COPIED_BYTES


def python_calls(step: Callable[[], Any]) -> int:
    """Return the number of calls of Python functions in one step."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def launches(step: Callable[[], Any]) -> int:
    """Return the number of kernels that one step launches on CUDA, counted by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events)


def tensor_bytes(values: Any) -> int:
    """Return the bytes of all memory that tensors in a nested structure hold; shared memory counts once."""
    return sum(storage.nbytes() for storage in _storages(values).values())


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in _tensors(values, {}):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage
    return found


def _tensors(values: Any, seen: dict[int, Any]) -> Iterable[Tensor]:
    """Yield the plain tensors in mappings, sequences, tensor subclasses and other objects' attributes."""
    if isinstance(values, _WITHOUT_TENSORS + _CODE) or id(values) in seen:
        return
    seen[id(values)] = values  # an id is only a key while its object lives
    if isinstance(values, Tensor) and hasattr(values, "__tensor_flatten__"):
        names, _ = values.__tensor_flatten__()
        for name in names:
            yield from _tensors(getattr(values, name), seen)
    elif isinstance(values, Tensor):
        yield values
    else:
        inner = values.values() if isinstance(values, Mapping) else values
        inner = inner if isinstance(inner, Iterable) else list(getattr(values, "__dict__", {}).values())
        for value in inner:
            yield from _tensors(value, seen)


def free_bytes(device: str) -> int:
    """Return the bytes of memory that can still be allocated."""
    if is_cuda(device):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def is_cuda(device: str) -> bool:
    """Return whether a device is CUDA's."""
    return torch.device(device).type == "cuda"
