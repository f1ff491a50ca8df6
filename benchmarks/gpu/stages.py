"""The stages of ``python -m benchmarks.gpu``: what each measures, and which bars its figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.checks import CHECKS, NotOnThisDeviceError
from benchmarks.gpu.training import LONG, SHORT, TrainingSettings, train
from benchmarks.harness import stopwatch
from benchmarks.harness.comparison import Comparison, compare
from benchmarks.harness.contenders import FUSED, PEERS, Contender, ours, torch_own
from benchmarks.speed import clipping
from benchmarks.speed.memory import RECIPES, rows_of, ways
from benchmarks.workloads.shapes import MODELS, elements

if TYPE_CHECKING:
    from slimadam.kernels.triton.tiling import Kind

RULES = "SlimAdam (rules)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OTHERS = ", others"
"""End of the names of items that a run can do without."""
LARGEST_RATIO, LEAST_BANDWIDTH, MOST_LAUNCHES = 0.75, 0.90, 4
LARGE = 1_000_000_000
Result = dict[str, Any]
Items = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class Settings:
    """Device and size of the stages.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        quick: Tiny sizes, to try the program itself.
        state: Folder of what trainings go on from; None: they begin anew.
    """

    device: str
    quick: bool = False
    state: Path | None = None


class NotApplicable(Exception):  # noqa: N818
    """An item does not apply here; the message says why."""


@dataclass(frozen=True)
class Stage:
    """Some items that run one after the other.

    Attributes:
        seconds: Time that it needs on a GPU, by which stages share the time of a run.
        items: The items, by name, from the settings and the time by which they have to end.
        goes_on: A later call goes on with what has not been finished.
    """

    seconds: float
    items: Callable[[Settings, float], Items]
    goes_on: bool = False


def _checks(settings: Settings, deadline: float) -> Items:
    """Return each correctness check."""

    def check(name: str) -> Callable[[], Result]:
        def run() -> Result:
            try:
                report = CHECKS[name](settings.device)
            except (NotImplementedError, NotOnThisDeviceError) as reason:
                raise NotApplicable(str(reason)) from reason
            return {"worst_share_of_rounding": report.worst, "backends": dict(report.backends)}

        return run

    names = ("whole_models", "grad_scaler", "as_adamw") if settings.quick else tuple(CHECKS)
    return {name: check(name) for name in names}


def _throughput(settings: Settings, deadline: float) -> Items:
    """Return each model in each precision: ours and torch's, then others', which may crash, last what compiles."""
    models = ("tiny",) if settings.quick else ("gpt2-small", "llama-1b")
    pairs = [(model, dtype) for model in models for dtype in DTYPES]
    usual, others, compiled = contenders(settings)
    share = (deadline - time.monotonic()) / len(pairs) / (1 + bool(others))

    def measure(model: str, dtype: str, chosen: Sequence[Contender]) -> Callable[[], Result]:
        def run() -> Result:
            shapes, until = MODELS[model](), min(deadline, time.monotonic() + share)
            rounds = 2 if settings.quick else 15
            found = compare(shapes, chosen, settings.device, DTYPES[dtype], rounds, until)
            bars = _throughput_bars(found, usual, model, dtype, settings) if chosen is usual else []
            return {**vars(found), "elements": elements(shapes), "bars": bars}

        return run

    items = {f"{model}, {dtype}": measure(model, dtype, usual) for model, dtype in pairs}
    if others:
        items |= {f"{model}, {dtype}{OTHERS}": measure(model, dtype, others) for model, dtype in pairs}
    if compiled:
        items["gpt2-small, float32, compiled"] = measure("gpt2-small", "float32", compiled)
    return items


def _throughput_bars(
    found: Comparison, chosen: Sequence[Contender], model: str, dtype: str, settings: Settings
) -> list[Result]:
    is_full_size = stopwatch.is_cuda(settings.device) and not settings.quick
    bars = speed_bars(found.rows, model, dtype) if is_full_size else []
    failed = {f"{label} is right": reason for label, reason in found.refused.items()}
    wrong = [_bar(name, reason, "no difference to float64", False) for name, reason in failed.items()]
    return bars + wrong + missing_rows(chosen, found.rows.keys() | found.refused, found.left_out)


def _clipped(settings: Settings, deadline: float) -> Items:
    """Return the comparison of clipping within the step with clipping before it."""
    model, rounds = ("tiny", 2) if settings.quick else ("gpt2-small", 15)
    return {f"{model}, float32": lambda: clipping.measure(MODELS[model](), rounds, settings.device)}


def _memory(settings: Settings, deadline: float) -> Items:
    """Return each recipe."""
    # CUDA's allocator rounds up to 512 bytes, which is much for vectors of a tiny model.
    model = "tiny" if settings.quick and not stopwatch.is_cuda(settings.device) else "gpt2-small"
    peers = [] if settings.quick else list(PEERS)

    def measure(recipe: str) -> Callable[[], Result]:
        def run() -> Result:
            left_out: dict[str, str] = {}
            rows = list(rows_of(model, settings.device, peers, left_out, [recipe]))
            bars = [
                _bar(f"{row.optimizer}{', in backward' if row.in_backward else ''}", row.wrong() or "as computed",
                     "bytes as computed", row.wrong() is None)
                for row in rows
                if row.computed is not None
            ]  # fmt: skip
            both = {row.optimizer for row in rows if row.in_backward and row.held}  # which is measured last
            reasons = {label.removeprefix(f"{recipe}, "): reason for label, reason in left_out.items()}
            absent = missing_rows(ways(recipe, ()), both, reasons)
            return {"rows": list(map(asdict, rows)), "left_out": left_out, "bars": bars + absent}

        return run

    recipes = list(RECIPES)[-1:] if settings.quick else RECIPES
    return {f"{model}, {recipe}": measure(recipe) for recipe in recipes}


def _training(size: TrainingSettings, *, goes_on: bool) -> Callable[[Settings, float], Items]:
    """Return the stage's items: each optimizer at each learning rate, from where an earlier call was ended or anew."""

    def items(settings: Settings, deadline: float) -> Items:
        own = size.quick() if settings.quick else size
        folder = settings.state if goes_on else None
        return {
            f"{label}, lr {lr:g}": partial(train, label, lr, own, settings.device, folder, deadline)
            for label in own.labels
            for lr in own.rates
        }

    return items


def _sweep(settings: Settings, deadline: float) -> Items:
    """Return each kernel and width of tile in each precision, with every candidate for its launch settings."""
    if find_spec("triton") is None:
        return {"launch settings": partial(_does_not_apply, "Triton is not installed")}
    from benchmarks.speed import launch_settings
    from slimadam.kernels.triton.launch import SETTINGS

    reason = launch_settings.unusable(settings.device)
    if reason is not None:
        return {"launch settings": partial(_does_not_apply, reason)}
    copies, rounds = (1, 1) if settings.quick else (8, 15)

    def measure(kind: Kind, columns: int, dtype: str) -> Result:
        found = launch_settings.measure(kind, columns, DTYPES[dtype], settings.device, copies, rounds)
        now = next(iter(found))
        bar = _bar(f"{now}, at present", found[now], "can be launched", not isinstance(found[now], str))
        return {"milliseconds": found, "bars": [bar]}

    return {
        f"{kind} {columns}, {dtype}": partial(measure, kind, columns, dtype)
        for dtype in DTYPES
        for kind, columns in SETTINGS
    }


def _does_not_apply(reason: str) -> Result:
    raise NotApplicable(reason)


STAGES: Mapping[str, Stage] = {
    "checks": Stage(110, _checks),
    "throughput": Stage(170, _throughput),
    "clipping": Stage(20, _clipped),
    "memory": Stage(40, _memory),
    "short_training": Stage(90, _training(SHORT, goes_on=False)),
}
"""The stages of a run."""
LONGER: Mapping[str, Stage] = {
    "sweep": Stage(300, _sweep),
    "training": Stage(440, _training(LONG, goes_on=True), goes_on=True),
}
"""Stages that are run only when they are asked for."""


def speed_bars(rows: Mapping[str, Any], model: str, dtype: str) -> list[Result]:
    """Compare figures of the paper's rules on CUDA with the bars; return none where they have no row.

    Args:
        rows: Figures by label.
        model: Name of the model.
        dtype: Name of the precision.
    """
    if RULES not in rows:
        return []
    row, fused = rows[RULES], rows[FUSED]
    launches, host, theirs = row["launches"], row["host_milliseconds"], fused["host_milliseconds"]
    bars = [
        _bar("launches a step", launches, f"<= {MOST_LAUNCHES}", launches <= MOST_LAUNCHES),
        _bar("host milliseconds", host, f"< {theirs:.3f}, AdamW fused", host < theirs),
    ]
    if dtype == "float32":
        bars.append(_bar("time of AdamW fused", row["ratio"], f"<= {LARGEST_RATIO}", row["ratio"] <= LARGEST_RATIO))
    if elements(MODELS[model]()) >= LARGE:
        share = row["share_of_copy_bandwidth"]
        bars.append(_bar("copy bandwidth", share, f">= {LEAST_BANDWIDTH}", share >= LEAST_BANDWIDTH))
    return bars


def missing_rows(chosen: Sequence[Contender], found: Collection[str], reasons: Mapping[str, str]) -> list[Result]:
    """List, as missed bars, those of ours without a row.

    Args:
        chosen: Contenders that were to be measured.
        found: Labels of what was.
        reasons: Why something was left out, by label.
    """
    own = [one.label for one in chosen if one.settings is not None]
    absent = [label for label in dict.fromkeys([RULES, *own]) if label not in found]
    return [_bar(label, reasons.get(label, "not measured"), "a row", False) for label in absent]


def contenders(settings: Settings) -> tuple[list[Contender], list[Contender], list[Contender]]:
    """Return ours and torch's, others', and what compiles, each beside fused AdamW; on a quick run the least of ours.

    Args:
        settings: Device and size.
    """
    compiled = [one for one in torch_own() if one.compiled]
    usual = [one for one in torch_own() if not one.compiled]
    fused = [one for one in usual if one.label == FUSED]
    if settings.quick:
        return [*fused, *(one for one in ours() if one.label == RULES)], [], []
    return [*usual, *ours()], [*fused, *PEERS.values()], [*fused, *compiled]


def _bar(name: str, value: Any, limit: str, passed: bool) -> Result:
    return {"name": name, "value": value, "limit": limit, "passed": passed}
