"""The stages of ``python -m benchmarks.gpu``: what each measures, and which bars its figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.gpu import training as gpu_training
from benchmarks.gpu.checks import CHECKS, NotOnThisDeviceError
from benchmarks.harness import stopwatch
from benchmarks.harness.comparison import compare
from benchmarks.harness.contenders import FUSED, PEERS, Contender, ours, torch_own
from benchmarks.speed import clipping
from benchmarks.speed.memory import RECIPES, rows_of, ways
from benchmarks.workloads.shapes import MODELS, elements

RULES = "SlimAdam (rules)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST_RATIO, LEAST_BANDWIDTH, MOST_LAUNCHES = 0.75, 0.90, 6
LARGE = 1_000_000_000
Result = dict[str, Any]
Items = dict[str, Callable[[], Result]]


@dataclass(frozen=True)
class Settings:
    """Device and size of the stages.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        quick: Tiny sizes, to try the program itself.
    """

    device: str
    quick: bool = False


class NotApplicable(Exception):  # noqa: N818
    """An item does not apply here; the message says why."""


@dataclass(frozen=True)
class Stage:
    """Some items that run one after the other.

    Attributes:
        seconds: Time budget on a GPU; what has not begun by then is left out, and the stage counts as failed.
        items: The items, by name; they begin to count when this is called.
    """

    seconds: float
    items: Callable[[Settings, float], Items]


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
    """Return each model in each precision."""
    models = ("tiny",) if settings.quick else ("gpt2-small", "llama-1b")
    pairs = [(model, dtype) for model in models for dtype in DTYPES]
    share = (deadline - time.monotonic()) / len(pairs)

    def measure(model: str, dtype: str) -> Callable[[], Result]:
        def run() -> Result:
            is_full_size = stopwatch.is_cuda(settings.device) and not settings.quick
            shapes, until = MODELS[model](), min(deadline, time.monotonic() + share)
            chosen = _contenders(settings, compiled=(model, dtype) == ("gpt2-small", "float32"))
            rounds = 2 if settings.quick else 15
            found = compare(shapes, chosen, settings.device, DTYPES[dtype], rounds, until)
            bars = speed_bars(found.rows, model, dtype) if is_full_size else []
            failed = {f"{label} is right": reason for label, reason in found.refused.items()}
            wrong = [_bar(name, reason, "no difference to float64", False) for name, reason in failed.items()]
            absent = missing_rows(chosen, found.rows.keys() | found.refused, found.left_out)
            return {**vars(found), "elements": elements(shapes), "bars": bars + wrong + absent}

        return run

    return {f"{model}, {dtype}": measure(model, dtype) for model, dtype in pairs}


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


def _training(settings: Settings, deadline: float) -> Items:
    """Return each optimizer."""
    size = gpu_training.QUICK if settings.quick else gpu_training.TrainingSettings()

    def run(label: str) -> Callable[[], Result]:
        return lambda: {"settings": asdict(size), **gpu_training.train(label, size, settings.device)}

    return {label: run(label) for label in gpu_training.optimizers(size)}


STAGES: Mapping[str, Stage] = {
    "checks": Stage(150, _checks),
    "throughput": Stage(150, _throughput),
    "clipping": Stage(20, _clipped),
    "memory": Stage(40, _memory),
    "training": Stage(90, _training),
}


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


def _contenders(settings: Settings, *, compiled: bool) -> list[Contender]:
    """Return the contenders: those without a compiler on a quick run, else compiled AdamW, which takes long, last."""
    torchs = [one for one in torch_own() if not one.compiled]
    if settings.quick:
        return [*(one for one in torchs if one.label == FUSED), *(one for one in ours() if one.label == RULES)]
    return [*torchs, *ours(), *PEERS.values(), *(one for one in torch_own() if one.compiled and compiled)]


def _bar(name: str, value: Any, limit: str, passed: bool) -> Result:
    return {"name": name, "value": value, "limit": limit, "passed": passed}
