"""The update on tables of tensors: as many launches for a thousand tensors as for one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..interface import Dims, Entry, Hyperparameters, second_moment_dtype
from ..layout import memory_order
from . import kernels, table
from .tiling import STRIP, Kind, Tiling, tiling

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
    """Return whether the kernels support a parameter.

    Args:
        param: The parameter, or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.
        codes: True if its first moment is kept as 8-bit codes.
    """
    return param.dtype in DTYPES and tiling(param, averaged_dims, codes) is not None


def same_layout(entry: Entry) -> bool:
    """Return whether the step count and the second moments lie where the kernels look for them."""
    order = memory_order(entry.param)
    moments = [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    in_order = order is None or all(moment.permute(order).is_contiguous() for moment in moments)
    return _tiling(entry) is not None and in_order and entry.step.device == entry.param.device


def _tiling(entry: Entry) -> Tiling | None:
    return tiling(entry.param, entry.averaged_dims, entry.exp_avg_scale is not None, entry.precomputed)


class Settings(NamedTuple):
    """Launch settings of a kernel.

    Attributes:
        lines: Number of rows of a tile.
        columns: Number of columns of a tile.
        num_warps: Number of warps of 32 threads that share a tile.
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
"""Settings of the launches that sum for ``"spread"``; ``columns`` must be a multiple of ``RUN``."""
MOST_REGISTERS = 255
"""Registers that a thread may use: left to itself, ptxas spills a few to fit more threads in."""
FINISHED_AT_ONCE = 1024
"""Second moments, or numbers of a slice, that a program of the finishing kernels works on at a time."""
STEPS_AT_ONCE = 1024

_KERNELS: dict[Kind, Any] = {
    "full": kernels.update_full,
    "rows": kernels.update_rows,
    "columns": kernels.update_columns,
    "spread": kernels.update_spread,
}


def _numbers(hyper: Hyperparameters, device: torch.device) -> list[int | Tensor]:
    """Return the hyperparameters as kernels take them: a float as the bits of a float64, a tensor as itself."""
    return [
        value
        if isinstance(value, Tensor) and value.device == device
        else int(struct.unpack("<q", struct.pack("<d", float(value)))[0])
        for value in (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    ]


class _Key(NamedTuple):
    """Properties that the tensors of one launch share; ``options`` are the kernel's compile-time arguments."""

    kind: Kind
    columns: int
    precomputed: bool
    is_pitched: bool
    sums_aligned: bool
    options: tuple[tuple[str, Any], ...]


class TritonStep:
    """The tables of a step, built once and valid until a parameter or its state moves.

    Entries with precomputed second moments wait for :meth:`run_given`. All of it happens on the tensors' device and its
    current stream, whichever device is the current one.

    Args:
        entries: The tensors; :func:`same_layout` must be true of each.
        hyper: Hyperparameters, of which the flags are taken.
    """

    def __init__(self, entries: Sequence[Entry], hyper: Hyperparameters) -> None:
        self._flags = _flags(hyper)
        self._addresses = _addresses(entries)
        self._device = entries[0].param.device
        with _on(self._device):
            self._build(entries, hyper)

    def _build(self, entries: Sequence[Entry], hyper: Hyperparameters) -> None:
        device = self._device
        places = {address: index for index, address in enumerate(dict.fromkeys(self._addresses["step"]))}
        self._steps = _on_device(torch.tensor(list(places)), device)
        self._step_dtype = _DTYPES[entries[0].step.dtype]
        self._corrections = torch.empty((len(places), 2), dtype=torch.float64, device=device)
        self._scratch: list[Tensor] = []
        rows: list[list[int]] = []
        groups: dict[_Key, list[tuple[int, Tiling]]] = {}
        for number, entry in enumerate(entries):
            found = _tiling(entry)
            assert found is not None
            row = _table_row(entry, found, hyper.amsgrad)
            row[table.CORRECTIONS.value] = self._corrections[places[entry.step.data_ptr()]].data_ptr()
            for column, size in _scratch_sizes(entry, found).items():
                self._scratch.append(torch.empty(size, dtype=second_moment_dtype(entry.param.dtype), device=device))
                row[column] = self._scratch[-1].data_ptr()
            rows.append(row)
            groups.setdefault(_key(entry, found, hyper), []).append((number, found))
        self._rows = torch.tensor(rows)
        self._table = _on_device(self._rows, device)
        self._launches = [_Launch(key, group, device) for key, group in groups.items()]

    def fits(self, entries: Sequence[Entry], hyper: Hyperparameters) -> bool:
        """Return whether the tables are valid for these tensors and flags, after following gradients that have moved.

        Args:
            entries: The tensors.
            hyper: Hyperparameters.
        """
        found = _addresses(entries)
        if found == self._addresses and self._flags == _flags(hyper):
            return True
        grads, old = found.pop("grad"), self._addresses.pop("grad")
        same = found == self._addresses and [grad % 16 for grad in grads] == [grad % 16 for grad in old]
        self._addresses["grad"] = grads
        if not same or self._flags != _flags(hyper):
            return False
        self._rows[:, table.GRAD.value] = torch.tensor(grads)
        with _on(self._device):
            self._table.copy_(_pinned(self._rows, self._device), non_blocking=True)
        return True

    def run(self, hyper: Hyperparameters, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Count the step and take it.

        Args:
            hyper: Hyperparameters; tensors among them are read on the device.
            grad_scale: Divisor of the gradients.
            found_inf: Unless zero, nothing is done.
        """
        _, beta1, beta2, *_ = numbers = _numbers(hyper, self._device)
        count = len(self._steps)
        with _on(self._device):
            kernels.advance_steps[(_ceil(count, STEPS_AT_ONCE),)](
                self._steps, count, self._corrections, beta1, beta2, found_inf,
                STEP_DTYPE=self._step_dtype, BLOCK=STEPS_AT_ONCE,
            )  # fmt: skip
            for launch in self._launches:
                if not launch.key.precomputed:
                    launch.run(self._table, numbers, grad_scale, found_inf)

    def run_given(self, hyper: Hyperparameters, grad_scale: Tensor | None = None) -> None:
        """Update the entries with precomputed second moments, once these are there, after :meth:`run`.

        Args:
            hyper: As in :meth:`run`.
            grad_scale: As in :meth:`run`.
        """
        numbers = _numbers(hyper, self._device)
        with _on(self._device):
            for launch in self._launches:
                if launch.key.precomputed:
                    launch.run(self._table, numbers, grad_scale, None)


class _Launch:
    """The launches for tensors with the same key; ``members`` are their numbers in the table and their tilings."""

    def __init__(self, key: _Key, members: Sequence[tuple[int, Tiling]], device: torch.device) -> None:
        self.key, self.options = key, dict(key.options)
        self.settings = settings = SETTINGS[key.kind, key.columns]
        numbers, tilings = zip(*members, strict=True)
        self.programs = _programs(numbers, [_tiles(one, settings) for one in tilings], device)
        self.sums = key.kind == "spread" and not key.precomputed
        if self.sums:
            self.summing = _programs(numbers, [_tiles_summed(one) for one in tilings], device)
            self.finishing = _programs(numbers, [_finishing(one) for one in tilings], device)
            self.slices = _programs(numbers, [one.pre if one.by_row else 0 for one in tilings], device)
            common = {name: self.options[name] for name in ("COMPUTE", "maxnreg")}
            common |= {"LINES": SUMS.lines, "num_warps": SUMS.num_warps}
            grad = {"GRAD_DTYPE": self.options["GRAD_DTYPE"], "ALIGNED": key.sums_aligned}
            self.sum_options = {**common, **grad, "COLUMNS": SUMS.columns}
            self.slice_options = {**common, "AMSGRAD": self.options["AMSGRAD"], "BLOCK": FINISHED_AT_ONCE}
            self.finish_options = {**self.slice_options, "COLUMNS": SUMS.columns}

    def run(
        self, table: Tensor, numbers: list[int | Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if self.sums:
            beta2 = numbers[2]
            _launch(kernels.sum_squares, table, self.summing, grad_scale, found_inf, **self.sum_options)
            _launch(kernels.finish_sums, table, self.finishing, beta2, found_inf, **self.finish_options)
            _launch(kernels.finish_slices, table, self.slices, beta2, found_inf, **self.slice_options)
        update = _KERNELS[self.key.kind]
        _launch(update, table, self.programs, *numbers, grad_scale, found_inf, **self.options)


def _launch(kernel: Any, table: Tensor, programs: Tensor, *arguments: int | Tensor | None, **options: Any) -> None:
    if len(programs):
        kernel[(len(programs),)](table, programs, *arguments, **options)


def _flags(hyper: Hyperparameters) -> tuple[bool, ...]:
    return hyper.amsgrad, hyper.maximize, hyper.stochastic_round


def _addresses(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Return the addresses of every tensor of a step."""
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
    """Return a copy that a device reads by itself; while a CUDA graph is captured, it outlives every replay."""
    if device.type != "cuda":
        return values
    pinned = values.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    return _pinned(values, device).to(device, non_blocking=True, copy=True)


def _key(entry: Entry, found: Tiling, hyper: Hyperparameters) -> _Key:
    dense = [entry.param, entry.grad, entry.exp_avg]
    if found.kind == "full":
        dense += [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    columns = {"full": 256, "spread": 256, "columns": STRIP, "rows": _row_tile(found.red)}[found.kind]
    columns = columns if entry.exp_avg_scale is None else max(columns, 256)
    settings = SETTINGS[found.kind, columns]
    inner = found.red if found.kind == "rows" else found.post
    is_flat = found.kind in ("full", "spread") and not found.is_pitched
    rows_aligned = is_flat or (inner % 16 == 0 and found.pitch % 16 == 0)
    options: dict[str, Any] = {
        "PARAM_DTYPE": _DTYPES[entry.param.dtype],
        "GRAD_DTYPE": _DTYPES[entry.grad.dtype],
        "MOMENT_DTYPE": _DTYPES[entry.exp_avg.dtype],
        "COMPUTE": _DTYPES[second_moment_dtype(entry.param.dtype)],
        "STEP_DTYPE": _DTYPES[entry.step.dtype],
        "AMSGRAD": hyper.amsgrad and not entry.precomputed,
        "MAXIMIZE": hyper.maximize,
        "ROUNDS": hyper.stochastic_round and entry.param.dtype == torch.bfloat16,
        "ALIGNED": rows_aligned and all(tensor.data_ptr() % 16 == 0 for tensor in dense),
        "LINES": settings.lines,
        "num_warps": settings.num_warps,
        "maxnreg": MOST_REGISTERS,
    }
    if found.kind in ("full", "spread"):
        options["PITCHED"] = found.is_pitched
    else:
        options["COLUMNS"] = settings.columns
    if found.kind == "rows":
        options["WHOLE"] = found.red <= _row_tile(found.red)
    if found.kind == "spread":
        options["WIDE"] = max(found.width, found.red) >= 1 << 30
    summed = (entry.grad.data_ptr(), found.post, found.pitch, found.slice_pitch)
    sums_aligned = found.kind == "spread" and all(size % 16 == 0 for size in summed)
    return _Key(found.kind, columns, entry.precomputed, found.is_pitched, sums_aligned, tuple(options.items()))


def _row_tile(red: int) -> int:
    widths = sorted(columns for kind, columns in SETTINGS if kind == "rows")
    return next((width for width in widths if red <= width), widths[-1])


def _table_row(entry: Entry, found: Tiling, amsgrad: bool) -> list[int]:
    rows_sq, columns_sq = _by_row_and_column(entry.exp_avg_sq, found)
    row = {
        table.PARAM.value: entry.param.data_ptr(),
        table.GRAD.value: entry.grad.data_ptr(),
        table.EXP_AVG.value: entry.exp_avg.data_ptr(),
        table.EXP_AVG_SCALE.value: 0 if entry.exp_avg_scale is None else entry.exp_avg_scale.data_ptr(),
        table.ROWS_SQ.value: rows_sq,
        table.COLUMNS_SQ.value: columns_sq,
        table.STEP.value: entry.step.data_ptr(),
        table.PRE.value: found.pre,
        table.RED.value: found.red,
        table.POST.value: found.post,
        table.PITCH.value: found.pitch,
        table.SEED.value: entry.seed & 0xFFFFFFFF,
        table.SLICE_PITCH.value: found.slice_pitch,
        table.SLICE_COUNT.value: found.slice_count,
        table.WIDTH.value: found.width,
    }
    if amsgrad and not entry.precomputed:
        row[table.ROWS_MAX.value], row[table.COLUMNS_MAX.value] = _by_row_and_column(entry.max_exp_avg_sq, found)
    return [row.get(column, 0) for column in range(table.FIELDS.value)]


def _by_row_and_column(moments: Sequence[Tensor], found: Tiling) -> tuple[int, int]:
    """Return the addresses of the second moments by row (or in full) and by column."""
    address = moments[0].data_ptr()
    if len(moments) == 2:
        return address, moments[1].data_ptr()
    return (0, address) if found.by_column else (address, 0)


def _scratch_sizes(entry: Entry, found: Tiling) -> dict[int, int]:
    """Return the numbers of sums to keep, by column of the table."""
    if found.kind != "spread" or entry.precomputed:
        return {}
    sizes = {table.COLUMN_SUMS.value: found.pre * _ceil(found.red, SUMS.lines) * found.post}
    if found.by_row and found.by_column:
        sizes[table.ROW_SUMS.value] = found.pre * found.red * _ceil(found.post, SUMS.columns)
        sizes[table.ROW_MEANS.value] = found.pre
    return sizes


def _programs(numbers: Sequence[int], tiles: Sequence[int], device: torch.device) -> Tensor:
    """Return int32 ``[programs, 2]``: for each program the number of the tensor and of its tile."""
    counts = torch.tensor(tiles)
    tensors = torch.tensor(numbers).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    programs = torch.stack([tensors, torch.arange(len(tensors)) - starts], dim=1)
    return _on_device(programs.to(torch.int32), device)


def _tiles(found: Tiling, settings: Settings) -> int:
    if found.kind == "rows":
        return _ceil(found.pre, settings.lines)
    if found.kind == "columns":
        return found.pre * _ceil(found.post, settings.columns)
    return _ceil(found.pre * found.slice_count, settings.lines * 256)


def _tiles_summed(found: Tiling) -> int:
    return found.pre * _ceil(found.red, SUMS.lines) * _ceil(found.post, SUMS.columns)


def _finishing(found: Tiling) -> int:
    by_row = _ceil(found.pre * found.red, FINISHED_AT_ONCE) if found.by_row and found.by_column else 0
    return by_row + (_ceil(found.pre * found.post, FINISHED_AT_ONCE) if found.by_column else 0)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
