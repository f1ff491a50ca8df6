"""The update on tables of tensors: as many launches for a thousand tensors as for one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..interface import Dims, Entry, Hyperparameters, Scalar
from ..layout import layout
from . import kernels, table
from .tiling import STRIP, Geometry, Kind, geometry

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}
DTYPES = frozenset(_DTYPES) - {torch.int8}
"""Precisions of parameters and gradients."""


def supports(param: Tensor, averaged_dims: Sequence[Dims], codes: bool) -> bool:
    """Whether the kernels take a parameter.

    Args:
        param: The parameter, or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.
        codes: Whether its first moment is kept as 8-bit codes.
    """
    return param.dtype in DTYPES and geometry(param, averaged_dims, codes) is not None


def same_layout(entry: Entry) -> bool:
    """Whether the step count and the second moments lie where the kernels look for them."""
    found = layout(entry.param, ())
    moments = [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    in_order = found is None or all(moment.permute(found.order).is_contiguous() for moment in moments)
    seen = geometry(entry.param, entry.averaged_dims, entry.exp_avg_scale is not None, entry.precomputed)
    return seen is not None and in_order and entry.step.device == entry.param.device


class Settings(NamedTuple):
    """How a kernel is launched.

    Attributes:
        lines: Rows of a tile.
        columns: Columns of a tile.
        num_warps: Warps of 32 threads that share a tile.
    """

    lines: int
    columns: int
    num_warps: int


SETTINGS: dict[tuple[Kind, int], Settings] = {
    ("full", 256): Settings(8, 256, 8),
    ("spread", 256): Settings(8, 256, 8),
    ("columns", STRIP): Settings(128, STRIP, 8),
    ("rows", 32): Settings(64, 32, 4),
    ("rows", 256): Settings(16, 256, 8),
    ("rows", 1024): Settings(4, 1024, 8),
    ("rows", 4096): Settings(1, 4096, 8),
}
"""By kernel and width of a tile."""
SUMS = Settings(64, 128, 8)
"""Of the launches that sum for ``"spread"``; there ``columns`` must be a multiple of how a long run is folded."""
MOST_REGISTERS = 255
"""Allowed a thread: left to itself, ptxas spills a few to fit more threads in."""
FINISHED_AT_ONCE = 1024
"""Second moments, or numbers of a slice, that a program of the finishing kernels works on at a time."""


class Numbers(NamedTuple):
    """Hyperparameters as the kernels take them: a float as the bits of a float64, a tensor as itself."""

    lr: int | Tensor
    beta1: int | Tensor
    beta2: int | Tensor
    eps: int | Tensor
    weight_decay: int | Tensor


def _bits(value: Scalar, device: torch.device) -> int | Tensor:
    if isinstance(value, Tensor) and value.device == device:
        return value
    return int(struct.unpack("<q", struct.pack("<d", float(value)))[0])


def _numbers(hyper: Hyperparameters, device: torch.device) -> Numbers:
    values = (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    return Numbers(*(_bits(value, device) for value in values))


class LaunchKey(NamedTuple):
    """What the tensors of one launch have in common."""

    kind: Kind
    columns: int
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    aligned: bool
    pitched: bool
    whole: bool
    wide: bool
    sums_aligned: bool
    precomputed: bool


class Member(NamedTuple):
    """A tensor of a launch: its number in the step's table, its tensors and how the kernel sees them."""

    number: int
    entry: Entry
    geometry: Geometry


class TritonStep:
    """A step's tables: built once, and good until a parameter or its state has moved.

    Entries whose second moments are given wait for :meth:`run_given`. All of it happens on the tensors' device and its
    current stream, whichever device is the current one.

    Args:
        entries: The tensors; each of them must have a geometry (``tiling.py``).
        hyper: Hyperparameters, of which the flags are taken.
    """

    def __init__(self, entries: Sequence[Entry], hyper: Hyperparameters) -> None:
        self._flags = _flags(hyper)
        self._addresses = _addresses(entries)
        self.device = entries[0].param.device
        with _on(self.device):
            self._build(entries, hyper)

    def _build(self, entries: Sequence[Entry], hyper: Hyperparameters) -> None:
        members = [Member(number, entry, _geometry(entry)) for number, entry in enumerate(entries)]
        device = self.device
        self.step_dtype = _DTYPES[entries[0].step.dtype]
        places = {address: index for index, address in enumerate(dict.fromkeys(self._addresses["step"]))}
        self._steps = _on_device(torch.tensor(list(places)), device)
        self._corrections = torch.empty((len(places), 2), dtype=torch.float64, device=device)
        rows = [_table_row(member, hyper) for member in members]
        for address, row in zip(self._addresses["step"], rows, strict=True):
            row[table.CORRECTIONS.value] = self._corrections[places[address]].data_ptr()
        self._scratch = _allocate_scratch(members, rows, device)
        self._rows = torch.tensor(rows)
        self.table = _on_device(self._rows, device)
        groups: dict[LaunchKey, list[Member]] = {}
        for member in members:
            groups.setdefault(_key(member), []).append(member)
        self._launches = [_Launch(key, group, device) for key, group in groups.items()]

    def fits(self, entries: Sequence[Entry], hyper: Hyperparameters) -> bool:
        """Whether the tables are good for these tensors and flags; gradients that have moved are followed."""
        found = _addresses(entries)
        if found == self._addresses and self._flags == _flags(hyper):
            return True
        grads, old = found.pop("grad"), self._addresses.pop("grad")
        same = found == self._addresses and [grad % 16 for grad in grads] == [grad % 16 for grad in old]
        self._addresses["grad"] = grads
        if not same or self._flags != _flags(hyper):
            return False
        self._rows[:, table.GRAD.value] = torch.tensor(grads)
        with _on(self.device):
            self.table.copy_(_pinned(self._rows, self.device), non_blocking=True)
        return True

    def run(self, hyper: Hyperparameters, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Count the step and take it.

        Args:
            hyper: Hyperparameters; tensors among them are read on the device.
            grad_scale: What the gradients are divided by.
            found_inf: Not zero: nothing is done.
        """
        values = _numbers(hyper, self.device)
        count = len(self._steps)
        with _on(self.device):
            kernels.advance_steps[(_ceil(count, STEPS_AT_ONCE),)](
                self._steps, count, self._corrections, values.beta1, values.beta2, found_inf,
                STEP_DTYPE=self.step_dtype, BLOCK=STEPS_AT_ONCE,
            )  # fmt: skip
            for launch in self._launches:
                if not launch.key.precomputed:
                    launch.run(self, values, hyper, grad_scale, found_inf)

    def run_given(self, hyper: Hyperparameters, grad_scale: Tensor | None = None) -> None:
        """After :meth:`run`, and once their second moments are made: what is left of the step.

        Args:
            hyper: As there.
            grad_scale: As there.
        """
        values = _numbers(hyper, self.device)
        with _on(self.device):
            for launch in self._launches:
                if launch.key.precomputed:
                    launch.run(self, values, hyper, grad_scale, None)


class _Launch:
    """The launches for one kind, precision and alignment."""

    def __init__(self, key: LaunchKey, members: Sequence[Member], device: torch.device) -> None:
        self.key = key
        self.settings = SETTINGS[key.kind, key.columns]
        self.compute = tl.float64 if key.param == torch.float64 else tl.float32
        self.programs = _programs(members, lambda found: _tiles(found, self.settings), device)
        if key.kind == "spread" and not key.precomputed:
            self.summing = _programs(members, lambda found: _tiles_summed(found), device)
            self.finishing = _programs(members, lambda found: _finishing(found), device)
            self.slices = _programs(members, lambda found: found.pre if found.by_row else 0, device)

    def run(
        self,
        step: TritonStep,
        values: Numbers,
        hyper: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        key, settings = self.key, self.settings
        if key.kind == "spread" and not key.precomputed:
            self._sum(step, values, hyper, grad_scale, found_inf)
        options: dict[str, Any] = {
            "PARAM_DTYPE": _DTYPES[key.param],
            "GRAD_DTYPE": _DTYPES[key.grad],
            "MOMENT_DTYPE": _DTYPES[key.exp_avg],
            "COMPUTE": self.compute,
            "STEP_DTYPE": step.step_dtype,
            "AMSGRAD": hyper.amsgrad and not key.precomputed,
            "MAXIMIZE": hyper.maximize,
            "ROUNDS": hyper.stochastic_round and key.param == torch.bfloat16,
            "ALIGNED": key.aligned,
            "LINES": settings.lines,
            "num_warps": settings.num_warps,
            "maxnreg": MOST_REGISTERS,
        }
        if key.kind in ("full", "spread"):
            options["PITCHED"] = key.pitched
        else:
            options["COLUMNS"] = settings.columns
        if key.kind == "rows":
            options["WHOLE"] = key.whole
        if key.kind == "spread":
            options["WIDE"] = key.wide
        if len(self.programs):
            _KERNELS[key.kind][(len(self.programs),)](
                step.table, self.programs, *values, grad_scale, found_inf, **options
            )

    def _sum(
        self,
        step: TritonStep,
        values: Numbers,
        hyper: Hyperparameters,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        shared = {"COMPUTE": self.compute, "num_warps": SUMS.num_warps, "maxnreg": MOST_REGISTERS}
        tile = {"LINES": SUMS.lines, "COLUMNS": SUMS.columns}
        if len(self.summing):
            kernels.sum_squares[(len(self.summing),)](
                step.table, self.summing, grad_scale, found_inf,
                GRAD_DTYPE=_DTYPES[self.key.grad], ALIGNED=self.key.sums_aligned, **shared, **tile,
            )  # fmt: skip
        finish = {**shared, "AMSGRAD": hyper.amsgrad, "BLOCK": FINISHED_AT_ONCE}
        if len(self.finishing):
            kernels.finish_sums[(len(self.finishing),)](
                step.table, self.finishing, values.beta2, found_inf, **tile, **finish
            )
        if len(self.slices):
            kernels.finish_slices[(len(self.slices),)](
                step.table, self.slices, values.beta2, found_inf, LINES=SUMS.lines, **finish
            )


STEPS_AT_ONCE = 1024
_KERNELS: dict[Kind, Any] = {
    "full": kernels.update_full,
    "rows": kernels.update_rows,
    "columns": kernels.update_columns,
    "spread": kernels.update_spread,
}


def _flags(hyper: Hyperparameters) -> tuple[bool, ...]:
    return hyper.amsgrad, hyper.maximize, hyper.stochastic_round


def _addresses(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Where every tensor of a step lies."""
    state = [
        tensor.data_ptr()
        for entry in entries
        for tensor in (entry.param, entry.exp_avg, *entry.exp_avg_sq, *entry.max_exp_avg_sq)
    ]
    state += [entry.exp_avg_scale.data_ptr() for entry in entries if entry.exp_avg_scale is not None]
    steps = [entry.step.data_ptr() for entry in entries]
    return {"state": state, "step": steps, "grad": [entry.grad.data_ptr() for entry in entries]}


_captured: list[Tensor] = []


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one: that is where Triton launches, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """A copy that a device reads by itself; while a CUDA graph is captured, one that outlives every replay."""
    if device.type != "cuda":
        return values
    pinned = values.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    return _pinned(values, device).to(device, non_blocking=True, copy=True)


def _geometry(entry: Entry) -> Geometry:
    found = geometry(entry.param, entry.averaged_dims, entry.exp_avg_scale is not None, entry.precomputed)
    assert found is not None
    return found


def _key(member: Member) -> LaunchKey:
    entry, found = member.entry, member.geometry
    dense = [entry.param, entry.grad, entry.exp_avg]
    if found.kind == "full":
        dense += [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    columns = {"full": 256, "spread": 256, "columns": STRIP, "rows": _row_tile(found.red)}[found.kind]
    codes = entry.exp_avg_scale is not None
    return LaunchKey(
        kind=found.kind,
        columns=max(columns, 256) if codes else columns,
        param=entry.param.dtype,
        grad=entry.grad.dtype,
        exp_avg=entry.exp_avg.dtype,
        aligned=found.is_aligned and all(tensor.data_ptr() % 16 == 0 for tensor in dense),
        pitched=found.is_pitched,
        whole=found.kind == "rows" and found.red <= _row_tile(found.red),
        wide=found.kind == "spread" and max(found.width, found.red) >= 1 << 30,
        sums_aligned=found.kind == "spread" and entry.grad.data_ptr() % 16 == 0 and found.is_summed_aligned,
        precomputed=entry.precomputed,
    )


def _row_tile(red: int) -> int:
    widths = sorted(columns for kind, columns in SETTINGS if kind == "rows")
    return next((width for width in widths if red <= width), widths[-1])


def _table_row(member: Member, hyper: Hyperparameters) -> list[int]:
    _, entry, found = member
    row = [0] * table.FIELDS.value
    by_row, by_column = _split(entry.exp_avg_sq, found)
    row[table.PARAM.value] = entry.param.data_ptr()
    row[table.GRAD.value] = entry.grad.data_ptr()
    row[table.EXP_AVG.value] = entry.exp_avg.data_ptr()
    row[table.EXP_AVG_SCALE.value] = 0 if entry.exp_avg_scale is None else entry.exp_avg_scale.data_ptr()
    row[table.ROWS_SQ.value], row[table.COLUMNS_SQ.value] = by_row, by_column
    if hyper.amsgrad and not entry.precomputed:
        row[table.ROWS_MAX.value], row[table.COLUMNS_MAX.value] = _split(entry.max_exp_avg_sq, found)
    row[table.STEP.value] = entry.step.data_ptr()
    row[table.PRE.value] = found.pre
    row[table.RED.value] = found.red
    row[table.POST.value] = found.post
    row[table.PITCH.value] = found.pitch
    row[table.SEED.value] = entry.seed & 0xFFFFFFFF
    row[table.SLICE_PITCH.value] = found.slice_pitch
    row[table.SLICE_COUNT.value] = found.slice_count
    row[table.WIDTH.value] = found.width
    return row


def _split(moments: Sequence[Tensor], found: Geometry) -> tuple[int, int]:
    """Addresses of the second moments by row (or in full) and by column."""
    if len(moments) == 2:
        return moments[0].data_ptr(), moments[1].data_ptr()
    address = moments[0].data_ptr()
    return (0, address) if found.by_column else (address, 0)


def _allocate_scratch(members: Sequence[Member], rows: list[list[int]], device: torch.device) -> list[Tensor]:
    """Memory for sums, entered into the rows of the table."""
    scratch = []
    for member, row in zip(members, rows, strict=True):
        found = member.geometry
        if found.kind != "spread" or member.entry.precomputed:
            continue
        dtype = torch.float64 if member.entry.param.dtype == torch.float64 else torch.float32
        row_tiles, column_tiles = _ceil(found.red, SUMS.lines), _ceil(found.post, SUMS.columns)
        sizes = {table.COLUMN_SUMS.value: found.pre * row_tiles * found.post}
        if found.by_row and found.by_column:
            sizes[table.ROW_SUMS.value] = found.pre * found.red * column_tiles
            sizes[table.ROW_MEANS.value] = found.pre
        for field, size in sizes.items():
            scratch.append(torch.empty(size, dtype=dtype, device=device))
            row[field] = scratch[-1].data_ptr()
    return scratch


def _programs(members: Sequence[Member], count: Callable[[Geometry], int], device: torch.device) -> Tensor:
    """int32 ``[programs, 2]``: of each program the tensor and the part of its work."""
    counts = torch.tensor([count(member.geometry) if member.entry.param.numel() else 0 for member in members])
    tensors = torch.tensor([member.number for member in members]).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    parts = torch.arange(len(tensors)) - starts
    return _on_device(torch.stack([tensors, parts], dim=1).to(torch.int32), device)


def _tiles(found: Geometry, settings: Settings) -> int:
    if found.kind == "rows":
        return _ceil(found.pre, settings.lines)
    if found.kind == "columns":
        return int(found.pre * _ceil(found.post, settings.columns))
    return _ceil(found.pre * found.slice_count, settings.lines * 256)


def _tiles_summed(found: Geometry) -> int:
    return int(found.pre * _ceil(found.red, SUMS.lines) * _ceil(found.post, SUMS.columns))


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _finishing(found: Geometry) -> int:
    by_row = _ceil(found.pre * found.red, FINISHED_AT_ONCE) if found.by_row and found.by_column else 0
    return by_row + (_ceil(found.pre * found.post, FINISHED_AT_ONCE) if found.by_column else 0)
