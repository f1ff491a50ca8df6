"""Bytes of an optimizer's state."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from slimadam.distributed.slots import ParamSlot
from slimadam.kernels.float8 import CODES
from slimadam.kernels.interface import Entry
from slimadam.optim.step.dispatch import Backend
from slimadam.optim.step.tasks import planned
from slimadam.state.first_moment import momentum_of
from slimadam.state.second_moment import step_dtype
from slimadam.utils.formatting import format_bytes

if TYPE_CHECKING:
    from slimadam.measurement.monitor import Monitor
    from slimadam.plans.auto import Measuring


@dataclass(frozen=True)
class MemoryReport(Mapping[str, float]):
    """Bytes of optimizer state, computed from shapes and the plan; readable as attributes or as a mapping.

    Attributes:
        exp_avg: First moments; the scales of int8 codes count too.
        exp_avg_sq: Second moments.
        max_exp_avg_sq: Their running maxima, with amsgrad.
        step: Step counts.
        total: All of it: what ``state`` holds.
        monitor: Samples of full second moments that :meth:`SlimAdam.snr_check`, or ``AutoPlan(start="slim")``, needs;
            kept beside the state.
        workspace: Tables and partial sums that Triton's kernels keep on a GPU from their first step on, beside the
            state; zero on a CPU.
        adamw_exp_avg_sq: Second moments of ``torch.optim.AdamW`` for the same parameters.
        adamw_total: All of AdamW's state.
        second_moments_saved: Share of AdamW's second-moment elements done without, in 0..1; four codes count as one.
        bytes_per_parameter: ``total`` over the number of parameter elements.
    """

    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    step: int
    total: int
    monitor: int
    workspace: int
    adamw_exp_avg_sq: int
    adamw_total: int
    second_moments_saved: float
    bytes_per_parameter: float

    def __str__(self) -> str:
        parts = {"first moments": self.exp_avg, "second moments": self.exp_avg_sq, "maxima": self.max_exp_avg_sq}
        counted = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
        others = {"samples": self.monitor, "workspace": self.workspace}
        beside = "".join(f"; {name} beside it {format_bytes(size)}" for name, size in others.items() if size)
        return (
            f"optimizer state {format_bytes(self.total)} (AdamW {format_bytes(self.adamw_total)}), "
            f"{self.bytes_per_parameter:.2f} bytes per parameter: {counted or 'nothing'}; "
            f"{self.second_moments_saved:.2%} of the elements of AdamW's second moments saved{beside}"
        )

    def __getitem__(self, key: str) -> float:
        if key not in self:
            raise KeyError(key)
        value: float = getattr(self, key)
        return value

    def __contains__(self, key: object) -> bool:
        return any(field.name == key for field in dataclasses.fields(self))

    def __iter__(self) -> Iterator[str]:
        return iter(field.name for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return len(dataclasses.fields(self))


def memory_report(
    slots: Iterable[ParamSlot], states: Container[Tensor], tracker: Monitor | Measuring | None = None
) -> MemoryReport:
    """Count what the state of these parameters costs, of DTensors this rank's shards.

    Args:
        slots: The parameters.
        states: Those that have a state; frozen ones without are left out.
        tracker: Keeps samples beside the state.
    """
    moments = seconds = maxima = steps = adamw_seconds = adamw_total = elements = 0
    kept = 0.0
    samples: list[str] = []
    updated: dict[Backend, list[Entry]] = defaultdict(list)
    for slot in slots:
        if not (slot.param.requires_grad or slot.param in states):
            continue
        samples += slot.keys
        moments += momentum_of(slot.param, slot.group).nbytes(slot.param)
        own = slot.own
        held = sum(math.prod(shape) * dtype.itemsize for shape, dtype in slot.stored)
        seconds += held
        maxima += held if slot.group["amsgrad"] else 0
        steps += step_dtype().itemsize
        native = own.numel() * own.dtype.itemsize
        adamw_seconds += native
        adamw_total += native * (3 if slot.group["amsgrad"] else 2)
        elements += own.numel()
        kept += sum(math.prod(shape) / (4 if dtype is CODES else 1) for shape, dtype in slot.stored)
        for backend, entry in planned(slot):
            updated[backend].append(entry)
    total = moments + seconds + maxima + steps
    return MemoryReport(
        exp_avg=moments,
        exp_avg_sq=seconds,
        max_exp_avg_sq=maxima,
        step=steps,
        total=total,
        monitor=0 if tracker is None else tracker.memory_of(samples),
        workspace=sum(backend.workspace(entries) for backend, entries in updated.items()),
        adamw_exp_avg_sq=adamw_seconds,
        adamw_total=adamw_total + steps,
        second_moments_saved=1 - kept / elements if elements else 0.0,
        bytes_per_parameter=total / elements if elements else 0.0,
    )
