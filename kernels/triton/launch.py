"""The update on tables of tensors: as many launches for a thousand tensors as for one."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..float8 import is_coded
from ..interface import Dims, Entry, Hyperparameters, Scalar, addresses_of, second_moment_dtype
from ..layout import memory_order
from . import kernels, slabs
from .slabs import ceil, is_in_rows, updates, work
from .tiling import Kind, Tiling, tiling

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
DTYPES = frozenset(_DTYPES) - {torch.int8, torch.uint8}
"""Precisions of parameters and gradients."""


def supports(param: Tensor, averaged_dims: Sequence[Dims], codes: bool) -> bool:
    """Return whether the kernels support a parameter.

    Args:
        param: The parameter, or a part of one.
        averaged_dims: For each of its second moments, the dimensions it is averaged over.
        codes: True if its first moment is kept as 8-bit codes.
    """
    return param.dtype in DTYPES and tiling(param, averaged_dims, codes) is not None


def workspace(entries: Sequence[Entry]) -> int:
    """Return the bytes that a step of these tensors, which need no memory, keeps on the device: tables and sums."""
    step = TritonStep(entries, Hyperparameters())
    return sum(tensor.nbytes for tensor in step._tensors())


def same_layout(entry: Entry) -> bool:
    """Return whether the step count and the second moments lie where the kernels look for them."""
    order = memory_order(entry.param)
    moments = [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    in_order = order is None or all(moment.permute(order).is_contiguous() for moment in moments)
    return _tiling(entry) is not None and in_order and entry.step.device == entry.param.device


def _tiling(entry: Entry) -> Tiling | None:
    """Return the tiling of a parameter, or None if no kernel updates these tensors."""
    found = tiling(entry.param, entry.averaged_dims, entry.exp_avg_scale is not None, entry.precomputed)
    if not is_coded(entry.exp_avg_sq[0]):
        return found
    return found if found is not None and found.kind == "full" and not entry.max_exp_avg_sq else None


class Settings(NamedTuple):
    """Launch settings of a kernel.

    Attributes:
        lines: Number of rows of a tile.
        columns: Number of columns of a tile.
        num_warps: Number of warps of 32 threads that share a tile.
        narrow_lines: Number of rows of a tile of 2-byte parameters, which leave registers for more; None: ``lines``.
        wide_warps: Number of warps for 8-byte parameters, which take more registers; None: ``num_warps``.
    """

    lines: int
    columns: int
    num_warps: int
    narrow_lines: int | None = None
    wide_warps: int | None = None

    def lines_of(self, itemsize: int) -> int:
        """Return the number of rows of a tile of parameters of so many bytes."""
        return self.narrow_lines or self.lines if itemsize == 2 else self.lines

    def warps_of(self, itemsize: int) -> int:
        """Return the number of warps for parameters of so many bytes."""
        return self.wide_warps or self.num_warps if itemsize == 8 else self.num_warps


SETTINGS: dict[tuple[Kind, int], Settings] = {
    ("full", 256): Settings(8, 256, 8),
    ("spread", 256): Settings(4, 256, 4, 8, 8),
    ("rows", 32): Settings(32, 32, 4, 64),
    ("rows", 256): Settings(8, 256, 8, 16),
    ("rows", 1024): Settings(2, 1024, 8, 4),
    ("rows", 2048): Settings(1, 2048, 8, 2),
    ("rows", 4096): Settings(1, 4096, 8),
}
"""By kernel and width of a tile."""
COMPILER_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every launch: products and sums are fused, which Triton 3.10 no longer does by default."""
if torch.version.hip is None:
    COMPILER_OPTIONS["maxnreg"] = 255  # left to itself, ptxas spills a few registers to fit more threads in
STEPS_AT_ONCE = 1024
COUNTERS_IN_A_LINE = 32
"""Counters in 128 bytes, to which those of a launch are aligned."""
WIDE_FROM = 1 << 30
"""Rows, or numbers of rows, from which indices within a tile take 64 bits."""

_KERNELS: dict[Kind, Any] = {
    "full": kernels.update_full,
    "rows": kernels.update_rows,
    "spread": kernels.update_spread,
}
_Argument = int | Tensor | None
_Arguments = dict[str, _Argument]
"""What kernels take besides tables, by name."""
_Kinds = tuple[Any, ...]
"""What Triton compiles anew for, of each argument."""
_Compiled = dict[_Kinds, tuple[Callable[..., None], list[Any]]]
"""Launches of a kernel that have been made, each with the constants that it takes at the end."""


class _Key(NamedTuple):
    """Properties that the tensors of one launch share; ``options`` are the kernel's compile-time arguments."""

    kind: Kind
    columns: int
    precomputed: bool
    options: tuple[tuple[str, Any], ...]


class TritonStep:
    """The tables of a step, built once and valid until a parameter or its state moves.

    Entries with precomputed second moments wait for :meth:`run_given`. All of it happens on the tensors' device and its
    current stream, whichever device is the current one.

    Args:
        entries: The tensors; :func:`same_layout` must be true of each.
        hyper: Hyperparameters, of which the flags are taken.

    Attributes:
        is_captured: True if it is part of a CUDA graph, whose replays alone fill its tables.
    """

    def __init__(self, entries: Sequence[Entry], hyper: Hyperparameters) -> None:
        self._flags, self._grads = _flags(hyper), addresses_of([entry.grad for entry in entries])
        self._offsets = _offsets(self._grads)
        self._compiled: _Compiled = {}
        self._device = device = entries[0].param.device
        self._step_dtype = _DTYPES[entries[0].step.dtype]
        self._scratch: list[Tensor] = []
        addresses = dict.fromkeys(entry.step.data_ptr() for entry in entries)
        places = {address: place for place, address in enumerate(addresses)}
        rows: list[list[int]] = []
        groups: dict[_Key, list[tuple[int, Tiling]]] = {}
        with _on(device):
            self.is_captured = _captures(device)
            self._steps = _on_device(torch.tensor(list(places), device="cpu"), device)
            self._corrections = torch.empty((len(places), 2), dtype=torch.float64, device=device)
            for number, entry in enumerate(entries):
                found = _tiling(entry)
                assert found is not None
                row = _table_row(entry, found, hyper.amsgrad)
                row[kernels.CORRECTIONS.value] = self._corrections[places[entry.step.data_ptr()]].data_ptr()
                for column, size in _scratch_sizes(entry, found).items():
                    self._scratch.append(torch.empty(size, dtype=second_moment_dtype(entry.param.dtype), device=device))
                    row[column] = self._scratch[-1].data_ptr()
                rows.append(row)
                if entry.param.numel():
                    groups.setdefault(_key(entry, found, hyper), []).append((number, found))
            self._rows = torch.tensor(rows, device="cpu")
            self._table = _on_device(self._rows, device)
            self._launches = [_Launch(key, members, device) for key, members in groups.items()]
            sizes = [launch.counter_count for launch in self._launches]
            self._counters = torch.empty(sum(sizes), dtype=torch.int32, device=device)
            for launch, counters in zip(self._launches, torch.split(self._counters, sizes), strict=True):
                launch.counters = counters
            self._streams = {_current_stream(device)}
        if self.is_captured:
            _kept_for_graphs.append(self)

    def with_gradients(self, grads: Sequence[Tensor], hyper: Hyperparameters) -> TritonStep | None:
        """Return the step with tables that are valid for these gradients and flags, or None if they have to be built.

        While a CUDA graph is captured, that is one with a table of its own, which no other step writes.

        Args:
            grads: The gradients of the entries, which are where they were otherwise.
            hyper: Hyperparameters.
        """
        addresses = addresses_of(grads)
        moved = addresses != self._grads
        if (moved and _offsets(addresses) != self._offsets) or _flags(hyper) != self._flags:
            return None
        with _on(self._device):
            if _captures(self._device):
                return self._captured(addresses)
            if moved:
                self._grads = []  # an interruption must not leave old addresses in the table under new ones here
                self._write(addresses)
                self._table.copy_(_pinned(self._rows, self._device), non_blocking=True)
                self._grads = addresses
        return self

    def _captured(self, grads: list[int]) -> TritonStep:
        """Return a copy for a graph. What no step changes, or each writes before it reads it, is shared."""
        captured = copy(self)
        captured.is_captured = True
        captured._rows = self._rows.clone()
        captured._write(grads)
        captured._grads = grads
        captured._table = _on_device(captured._rows, self._device)
        _kept_for_graphs.append(captured)
        return captured

    def _use_on_current_stream(self) -> None:
        """Let the memory be reused, once it is let go, only after what has been launched on this stream by then."""
        stream = _current_stream(self._device)
        if stream in self._streams or self.is_captured:
            return
        self._streams.add(stream)
        for tensor in self._tensors():
            tensor.record_stream(stream)

    def _write(self, grads: list[int]) -> None:
        self._rows.select(1, kernels.GRAD.value).copy_(torch.frombuffer(array("q", grads), dtype=torch.int64))

    def _tensors(self) -> list[Tensor]:
        """Return everything on the device that its kernels work with and that is its own."""
        programs = [launch.programs for launch in self._launches]
        return [self._steps, self._corrections, self._counters, self._table, *self._scratch, *programs]

    def run(self, hyper: Hyperparameters, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Count the step and take it.

        Args:
            hyper: Hyperparameters; tensors among them are read on the device.
            grad_scale: Divisor of the gradients.
            found_inf: Unless zero, nothing is done.
        """
        arguments = self._arguments(hyper, grad_scale, found_inf)
        kinds = _kinds(arguments)
        betas = arguments["beta1"], arguments["beta2"]
        with _on(self._device):
            self._use_on_current_stream()
            counted = self._steps, self._corrections, self._counters
            _advance_steps(*counted, *betas, found_inf, self._step_dtype, self._compiled, kinds)
            for launch in self._launches:
                if not launch.key.precomputed:
                    launch.run(self._table, arguments, kinds)

    def run_given(self, hyper: Hyperparameters, grad_scale: Tensor | None = None) -> None:
        """Update the entries with precomputed second moments, once these are there, after :meth:`run`.

        Args:
            hyper: As in :meth:`run`.
            grad_scale: As in :meth:`run`.
        """
        arguments = self._arguments(hyper, grad_scale, None)
        kinds = _kinds(arguments)
        with _on(self._device):
            for launch in self._launches:
                if launch.key.precomputed:
                    launch.run(self._table, arguments, kinds)

    def _arguments(self, hyper: Hyperparameters, grad_scale: Tensor | None, found_inf: Tensor | None) -> _Arguments:
        """Return what kernels take: of hyperparameters tensors on the device, and floats as the bits of a float64."""
        return {
            "grad_scale": grad_scale,
            "found_inf": found_inf,
            "lr": self._number(hyper.lr),
            "beta1": self._number(hyper.beta1),
            "beta2": self._number(hyper.beta2),
            "eps": self._number(hyper.eps),
            "weight_decay": self._number(hyper.weight_decay),
        }

    def _number(self, value: Scalar) -> _Argument:
        return value if isinstance(value, Tensor) and value.device == self._device else _bits(float(value))


def try_launch(device: torch.device) -> None:
    """Count one step on a device; raise what keeps Triton from compiling for it or from launching there."""
    step = torch.zeros((), dtype=torch.float32, device=device)
    corrections = torch.empty((1, 2), dtype=torch.float64, device=device)
    with _on(device):
        addresses = torch.tensor([step.data_ptr()], device=device)
        counters = torch.empty(1, dtype=torch.int32, device=device)
        _advance_steps(addresses, corrections, counters, _bits(0.9), _bits(0.999), None, _DTYPES[step.dtype], {}, ())
    if step != 1:
        raise RuntimeError(f"a kernel that counts a step left it at {float(step)}")


def _advance_steps(
    addresses: Tensor, corrections: Tensor, counters: Tensor, beta1: _Argument, beta2: _Argument,
    found_inf: Tensor | None, dtype: Any, compiled: _Compiled, kinds: _Kinds,
) -> None:  # fmt: skip
    count, counter_count = addresses.numel(), counters.numel()
    options = {"STEP_DTYPE": dtype, "BLOCK": STEPS_AT_ONCE, **COMPILER_OPTIONS}
    given = addresses, count, corrections, counters, counter_count, beta1, beta2, found_inf
    programs = ceil(max(count, counter_count), STEPS_AT_ONCE)
    _launch(kernels.advance_steps, programs, given, options, compiled, kinds)


def _launch(
    kernel: Any, programs: int, given: Sequence[Any], options: dict[str, Any], compiled: _Compiled, kinds: _Kinds
) -> None:
    """Launch a kernel; a second time with arguments of the same kinds, without asking Triton for what it has compiled.

    To find that, Triton takes longer than the launch itself.

    Args:
        kernel: The kernel.
        programs: Number of programs.
        given: What it is given.
        options: Its compile-time arguments and compiler options.
        compiled: The launches of this kernel with these options that were made so far, by kinds.
        kinds: Kinds of the arguments.
    """
    made = compiled.get(kinds)
    if made is not None:
        launch, constants = made
        launch(*given, *constants)
        return
    found = kernel[(programs,)](*given, **options)
    if found is not None:  # the interpreter compiles nothing
        # Triton 3.2 leaves constants out of the signature, and of the launch.
        constants = [options[name] for name in list(found.src.signature)[len(given) :]]
        compiled[kinds] = found[(programs, 1, 1)], constants


def _kinds(arguments: _Arguments) -> _Kinds:
    return tuple(map(_kind, arguments.values()))


def _kind(argument: _Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if argument is None else -(1 << 31) <= argument < 1 << 31


@lru_cache(maxsize=64)
def _bits(value: float) -> int:
    """Return the bits of a float64; those of -0.0 for zero, as Triton compiles anew for an int of less than 32 bits."""
    bits: int = struct.unpack("<q", struct.pack("<d", value or -0.0))[0]
    return bits


class _Launch:
    """The launch for tensors with the same key; ``members`` are their numbers in the table and their tilings."""

    def __init__(self, key: _Key, members: Sequence[tuple[int, Tiling]], device: torch.device) -> None:
        self.key = key
        self.counters: Tensor | None = None
        self.counter_count = 0
        options = dict(key.options)
        lines = options["LINES"]
        if key.kind != "spread":
            self.programs = _on_device(_programs(members, lines), device)
        elif key.precomputed:
            self.programs = _on_device(updates(members, lines, options["IN_ROWS"]), device)
        else:
            itemsize = options["GRAD_DTYPE"].primitive_bitwidth // 8
            programs, slab_count = work(members, lines, options["IN_ROWS"], itemsize)
            self.programs = _on_device(programs, device)
            self.counter_count = ceil(1 + slab_count, COUNTERS_IN_A_LINE) * COUNTERS_IN_A_LINE
        self._kernel = _KERNELS[key.kind]
        self._options = {name: options[name] for name in self._kernel.arg_names if name in options}
        self._options |= {"num_warps": options["num_warps"], **COMPILER_OPTIONS}
        own = ("table", "programs", "counters")
        self._names = [name for name in self._kernel.arg_names if name not in options and name not in own]
        self._compiled: _Compiled = {}

    def run(self, table: Tensor, arguments: _Arguments, kinds: _Kinds) -> None:
        counters = [self.counters if self.counter_count else None] if self.key.kind == "spread" else []
        given = table, self.programs, *counters, *[arguments[name] for name in self._names]
        _launch(self._kernel, self.programs.size(0), given, self._options, self._compiled, kinds)


def _flags(hyper: Hyperparameters) -> tuple[bool, bool, bool]:
    """Return the hyperparameters that tables rest on."""
    return hyper.amsgrad, hyper.maximize, hyper.stochastic_round


def _offsets(addresses: list[int]) -> list[int]:
    """Return how far addresses are from multiples of 16, on which tables rest."""
    return [address & 15 for address in addresses]


_kept_for_graphs: list[object] = []
"""What captured CUDA graphs point to: nothing tells when the last replay is over."""


def _captures(device: torch.device) -> bool:
    """Return whether the current stream of a device, which is the current one, captures a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one: that is where Triton launches, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy that a device reads by itself; while a CUDA graph is captured, it outlives every replay."""
    if device.type != "cuda":
        return values
    if not _captures(device):
        return values.pin_memory()
    if torch.__version__ < "2.11":
        raise RuntimeError(
            f"torch {torch.__version__} cannot pin memory while a CUDA graph is captured, as the Triton kernels need: "
            "upgrade to torch 2.11, or capture a step with foreach=True"
        )
    pinned = values.pin_memory()
    _kept_for_graphs.append(pinned)
    return pinned


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    return _pinned(values, device).to(device, non_blocking=True, copy=True)


def _key(entry: Entry, found: Tiling, hyper: Hyperparameters) -> _Key:
    kind, is_flat = found.kind, found.kind in ("full", "spread")
    dense = [entry.param, entry.grad, entry.exp_avg]
    if kind == "full" or found.by_column:
        dense += [*entry.exp_avg_sq, *entry.max_exp_avg_sq]
    columns = 256 if is_flat else _row_tile(found.red)
    columns = columns if entry.exp_avg_scale is None else max(columns, 256)
    settings = SETTINGS[kind, columns]
    in_rows = kind == "spread" and is_in_rows(found, entry.exp_avg_scale is not None)
    row = found.red if kind == "rows" else found.width
    unit = 16 // min(entry.param.itemsize, entry.grad.itemsize, entry.exp_avg.itemsize)
    rows_aligned = (is_flat and not (found.is_pitched or in_rows)) or (row % unit == 0 and found.pitch % unit == 0)
    options = {
        "PARAM_DTYPE": _DTYPES[entry.param.dtype],
        "GRAD_DTYPE": _DTYPES[entry.grad.dtype],
        "MOMENT_DTYPE": _DTYPES[entry.exp_avg.dtype],
        "COMPUTE": _DTYPES[second_moment_dtype(entry.param.dtype)],
        "STEP_DTYPE": _DTYPES[entry.step.dtype],
        "AMSGRAD": hyper.amsgrad and not entry.precomputed,
        "MAXIMIZE": hyper.maximize,
        "ROUNDS": hyper.stochastic_round and entry.param.dtype == torch.bfloat16,
        "ALIGNED": unit if rows_aligned and all(tensor.data_ptr() % 16 == 0 for tensor in dense) else 0,
        "LINES": settings.lines_of(entry.param.itemsize),
        "num_warps": settings.warps_of(entry.param.itemsize),
    }
    if is_flat:
        options |= {"PITCHED": found.is_pitched, "WIDE": max(found.width, found.red) >= WIDE_FROM}
    if kind == "full":
        options["SECOND_DTYPE"] = _DTYPES[entry.exp_avg_sq[0].dtype]
    if kind == "rows":
        options |= {"WHOLE": found.red <= columns, "COLUMNS": settings.columns}
    if kind == "spread":
        summed = (found.post, found.pitch, found.slice_pitch)
        unit = 16 // entry.grad.itemsize
        sums_aligned = entry.grad.data_ptr() % 16 == 0 and all(size % unit == 0 for size in summed)
        options |= {
            "SUMS_ALIGNED": unit if sums_aligned else 0,
            "IN_ROWS": in_rows,
            "LINES": options["LINES"] if in_rows else settings.lines,  # tiles that divide each position need registers
            "TILES": slabs.TILES,
            "SUM_LINES": slabs.SUM_LINES,
            "SUM_COLUMNS": slabs.SUM_COLUMNS,
            "BLOCK": slabs.FINISHED_AT_ONCE,
        }
    return _Key(kind, columns, entry.precomputed, tuple(options.items()))


def _row_tile(red: int) -> int:
    widths = sorted(columns for kind, columns in SETTINGS if kind == "rows")
    return next((width for width in widths if red <= width), widths[-1])


def _table_row(entry: Entry, found: Tiling, amsgrad: bool) -> list[int]:
    rows_sq, columns_sq = _by_row_and_column(entry.exp_avg_sq, found)
    row = {
        kernels.PARAM.value: entry.param.data_ptr(),
        kernels.GRAD.value: entry.grad.data_ptr(),
        kernels.EXP_AVG.value: entry.exp_avg.data_ptr(),
        kernels.EXP_AVG_SCALE.value: 0 if entry.exp_avg_scale is None else entry.exp_avg_scale.data_ptr(),
        kernels.ROWS_SQ.value: rows_sq,
        kernels.COLUMNS_SQ.value: columns_sq,
        kernels.STEP.value: entry.step.data_ptr(),
        kernels.PRE.value: found.pre,
        kernels.RED.value: found.red,
        kernels.POST.value: found.post,
        kernels.PITCH.value: found.pitch,
        kernels.SEED.value: entry.seed & 0xFFFFFFFF,
        kernels.SLICE_PITCH.value: found.slice_pitch,
        kernels.SLICE_COUNT.value: found.slice_count,
        kernels.WIDTH.value: found.width,
    }
    if amsgrad and not entry.precomputed:
        row[kernels.ROWS_MAX.value], row[kernels.COLUMNS_MAX.value] = _by_row_and_column(entry.max_exp_avg_sq, found)
    return [row.get(column, 0) for column in range(kernels.FIELDS.value)]


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
    sizes = {kernels.COLUMN_SUMS.value: found.pre * ceil(found.red, slabs.SUM_LINES) * found.post}
    if found.by_row and found.by_column:
        sizes[kernels.ROW_SUMS.value] = found.pre * found.red * ceil(found.post, slabs.SUM_COLUMNS)
        sizes[kernels.ROW_MEANS.value] = found.pre
    return sizes


def _programs(members: Sequence[tuple[int, Tiling]], lines: int) -> Tensor:
    """Return int32 ``[programs, 2]``: for each program the number of the tensor and of its tile."""
    counts = torch.tensor([_tiles(found, lines) for _, found in members], device="cpu")
    tensors = torch.tensor([number for number, _ in members], device="cpu").repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    programs = torch.stack([tensors, torch.arange(len(tensors), device="cpu") - starts], dim=1)
    return programs.to(torch.int32)


def _tiles(found: Tiling, lines: int) -> int:
    return ceil(found.pre, lines) if found.kind == "rows" else ceil(found.pre * found.slice_count, lines * 256)
