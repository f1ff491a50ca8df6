"""Optimizers side by side on one model's parameters: every one steps in turn, each beside a step of fused AdamW.

A shared machine's memory can be half as fast a second later, so a time is divided by that of the step beside it, and a
ratio is the median of these. All share the parameters and the gradients, which halves the memory and changes no timing;
each has its own state.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.harness import exactness, stopwatch
from benchmarks.harness.contenders import DEFAULT, FUSED, Contender
from benchmarks.workloads.shapes import ODD_MODEL, Shapes, elements
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam

WARMUP_TURNS = 2
SLOW = 20
"""Contenders that take so many times as long as fused AdamW while warming up are timed ``SLOW_ROUNDS`` times."""
SLOW_ROUNDS = 2
Row = dict[str, Any]


@dataclass
class Comparison:
    """Figures of the contenders, and the reasons why others have none.

    Attributes:
        rows: Figures by label.
        left_out: Why a contender has no row.
        refused: Contenders of ours that are wrong, or that failed; nothing is reported of them but why.
        copies: Milliseconds of each copy.
        batches: How many sets of contenders were timed in turn; one where memory holds all.
    """

    rows: dict[str, Row] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    batches: int = 0


@dataclass
class _Built:
    contender: Contender
    optimizer: Optimizer
    step: Callable[[], Any]
    row: Row
    laps: list[stopwatch.Lap] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    is_slow: bool = False


class _Bench:
    """The parameters that all contenders step, and what is known of the machine."""

    def __init__(self, shapes: Shapes, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.elements = device, dtype, elements(shapes)
        self.largest = max(map(math.prod, shapes.values()))
        self.model = skeleton(shapes, device, dtype)
        for param in self.model.parameters():
            param.grad = torch.randn_like(param).mul_(1e-3)
        self.copy, self.copied_bytes = stopwatch.copier(device)

    def fits(self, contender: Contender, optimizer: Optimizer) -> bool:
        """Return whether memory holds its state and what its step allocates."""
        state = optimizer.memory().total if isinstance(optimizer, SlimAdam) else 8 * self.elements
        lists = stopwatch.is_cuda(self.device) or "foreach" in contender.label
        return stopwatch.free_bytes(self.device) > state + 8 * (self.elements if lists else self.largest)

    def build(self, contender: Contender, optimizer: Optimizer, before: int) -> _Built:
        """Make the state by a step and measure it; ``before`` is what was allocated before the optimizer was made."""
        step = contender.step_of(optimizer)
        step()
        allocated = self.allocated() - before
        row: Row = {"state_bytes_per_parameter": stopwatch.tensor_bytes(optimizer.state) / self.elements}
        step()
        if stopwatch.is_cuda(self.device):
            torch.cuda.reset_peak_memory_stats(self.device)
            held = self.allocated()
            step()
            peak = torch.cuda.max_memory_allocated(self.device) - held
            row |= {
                "allocated_bytes_per_parameter": allocated / self.elements,
                "peak_bytes_per_parameter": (allocated + peak) / self.elements,
                "launches": stopwatch.launches(step),
            }
        row["python_calls_per_parameter"] = stopwatch.python_calls(step) / len(list(self.model.parameters()))
        if isinstance(optimizer, SlimAdam):
            row["monitor_bytes_per_parameter"] = optimizer.memory().monitor / self.elements
            row["backends"] = dict(_backends(optimizer))
        return _Built(contender, optimizer, step, row)

    def allocated(self) -> int:
        """Return bytes in use on CUDA."""
        return torch.cuda.memory_allocated(self.device) if stopwatch.is_cuda(self.device) else 0


def compare(
    shapes: Shapes,
    contenders: Sequence[Contender],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 9,
    deadline: float = math.inf,
) -> Comparison:
    """Time a step of each contender.

    Args:
        shapes: The model's parameters.
        contenders: Optimizers to compare; fused AdamW is one of them.
        device: Where.
        dtype: Precision of parameters and gradients.
        rounds: Timed steps of each.
        deadline: ``time.monotonic()`` after which nothing further is built.

    Returns:
        Medians, bytes, and what was left out. Where memory does not hold every contender's state, they are timed in
        several sets, fused AdamW in each; ratios are to that of the same set.
    """
    bench, found = _Bench(shapes, device, dtype), Comparison()
    pending = [contender for contender in contenders if contender.label != FUSED]
    (baseline,) = (contender for contender in contenders if contender.label == FUSED)
    while pending or not found.batches:
        found.batches += 1
        pending = _batch(bench, baseline, pending, rounds, deadline, found)
        gc.collect()
    return found


def _batch(
    bench: _Bench, baseline: Contender, pending: Sequence[Contender], rounds: int, deadline: float, found: Comparison
) -> list[Contender]:
    """Time as many contenders as memory holds beside fused AdamW; returns those that have to wait."""
    before = bench.allocated()
    built = [bench.build(baseline, baseline.make(bench.model), before)]
    waiting: list[Contender] = []
    for contender in pending:
        if waiting:
            waiting.append(contender)
        elif time.monotonic() > deadline:
            found.left_out[contender.label] = "the time budget was used up"
        elif (one := _built(bench, contender, found)) is not None:
            built.append(one)
        elif contender.label not in found.left_out | found.refused:
            waiting.append(contender)
    if len(built) == 1 and waiting:
        found.left_out[waiting.pop(0).label] = "its state and fused AdamW's do not fit into memory together"
    _time(bench, built, rounds, found)
    return waiting


def ratios_to_default(rows: dict[str, Row]) -> dict[str, float]:
    """Return times relative to AdamW as it comes, where that was measured."""
    if DEFAULT not in rows:
        return {}
    return {label: row["ratio"] / rows[DEFAULT]["ratio"] for label, row in rows.items()}


def _built(bench: _Bench, contender: Contender, found: Comparison) -> _Built | None:
    """Return a contender ready to be timed, or None: with the reason in ``found``, or without where memory is short."""
    reason = contender.missing()
    if reason is not None:
        found.left_out[contender.label] = reason
        return None
    try:
        error = None if contender.settings is None else _check(contender, bench.device, bench.dtype)
        before = bench.allocated()
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = contender.make(bench.model)
            if not bench.fits(contender, optimizer):
                return None
            one = bench.build(contender, optimizer, before)
    except NotImplementedError as reason_why:
        found.left_out[contender.label] = _first_line(reason_why)
        return None
    except Exception as failure:  # whatever another project's step raises here is the reason why it has no row
        _set_aside(contender, failure, found)
        return None
    if error is not None:
        one.row["worst_share_of_rounding"] = error
    return one


def _set_aside(contender: Contender, failure: Exception, found: Comparison) -> None:
    where = found.left_out if contender.settings is None else found.refused
    where[contender.label] = _first_line(failure)


def _check(contender: Contender, device: str, dtype: torch.dtype) -> float:
    """Compare with float64 before anything is timed."""
    settings = dict(contender.settings or {})
    plan = settings.pop("plan")
    return exactness.run(skeleton(ODD_MODEL, device, dtype), plan, options=settings).worst


def _time(bench: _Bench, built: list[_Built], rounds: int, found: Comparison) -> None:
    fused, *others = built
    for turn in range(rounds + WARMUP_TURNS):
        counts = turn >= WARMUP_TURNS
        first = turn % max(1, len(others))  # none always runs after the same one: caches remember it
        for one in [*others[first:], *others[:first]]:
            if one.is_slow and turn >= WARMUP_TURNS + SLOW_ROUNDS:
                continue
            try:
                own, beside = _side_by_side(bench, one, fused, turn)
            except Exception as failure:
                _set_aside(one.contender, failure, found)
                others.remove(one)
                continue
            if counts:
                one.laps.append(own)
                one.ratios.append(own.total / beside.total)
                fused.laps.append(beside)
            else:  # in every turn: one stall makes none slow
                one.is_slow = own.total > SLOW * beside.total and (turn == 0 or one.is_slow)
        copied = stopwatch.lap(bench.copy, bench.device)
        if counts:
            found.copies.append(copied.total)
            fused.laps += [] if others else [stopwatch.lap(fused.step, bench.device)]
    for one in (fused, *others):
        found.rows.setdefault(one.contender.label, _figures(bench, one, statistics.median(found.copies)) | one.row)


def _side_by_side(bench: _Bench, one: _Built, fused: _Built, turn: int) -> tuple[stopwatch.Lap, stopwatch.Lap]:
    """Time a step of a contender and one of fused AdamW, which goes first in every other turn."""
    if turn % 2:
        own = stopwatch.lap(one.step, bench.device)
        return own, stopwatch.lap(fused.step, bench.device)
    beside = stopwatch.lap(fused.step, bench.device)
    return stopwatch.lap(one.step, bench.device), beside


def _figures(bench: _Bench, one: _Built, copied: float) -> Row:
    """Return the reported figures of a contender; ``copied`` is the duration of the copy in milliseconds."""
    median = statistics.median(lap.total for lap in one.laps)
    moved = 3 * bench.dtype.itemsize + 2 * one.row["state_bytes_per_parameter"]
    bandwidth = moved * bench.elements / median / 1e6
    figures: Row = {
        "milliseconds": median,
        "ratio": statistics.median(one.ratios) if one.ratios else 1.0,
        "moved_bytes_per_parameter": moved,
        "gigabytes_per_second": bandwidth,
        "share_of_copy_bandwidth": bandwidth / (bench.copied_bytes / copied / 1e6),
        "laps": [round(lap.total, 4) for lap in one.laps],
        "ratios": [round(ratio, 4) for ratio in one.ratios],
    }
    if stopwatch.is_cuda(bench.device):
        figures["host_milliseconds"] = statistics.median(lap.host for lap in one.laps)
    return figures


def _backends(optimizer: SlimAdam) -> Counter[str]:
    return Counter(optimizer.backend(param) for group in optimizer.param_groups for param in group["params"])


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
