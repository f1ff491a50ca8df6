"""Check which steps work in this environment: ``python -m benchmarks.supported [--out FOLDER] [--only PATTERN ...]``.

Every plan with every implementation and first moment takes 25 steps. Each must end where the formula in float64 does,
and autograd must see each step: a backward pass through a graph recorded before it raises. ``make versions`` runs this
on every declared Python. Exits with 1 if a row fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.harness.interpreter import mend_interpreter

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are first imported
    mend_interpreter()

from benchmarks.harness import machine
from benchmarks.harness.exactness import RARE, gradients, run, set_gradients
from benchmarks.workloads.skeleton import skeleton
from slimadam import AutoPlan, SlimAdam
from slimadam.optim.step import dispatch

NAME = "supported"
STEPS = 25
SHAPES = {
    "token_embedding.weight": (67, 24),
    "blocks.0.attn.q_proj.weight": (24, 24),
    "blocks.0.mlp.up_proj.weight": (40, 24),
    "blocks.0.norm.weight": (24,),
    "conv.weight": (6, 5, 3, 3),
}
PLANS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "rules": lambda: "rules",
    "factored": lambda: "factored",
    "auto": lambda: AutoPlan(calibration_steps=10),
}
MOMENTA: dict[str, Any] = {"float32": None, "bfloat16": torch.bfloat16, "int8": "int8"}
AUTO_DIFFERENCE = 1e-6
"""Largest difference between implementations: 25 float32 updates of at most about 3e-3, each rounded a few times."""


@dataclass(frozen=True)
class Implementation:
    """A way to take a step.

    Attributes:
        label: Its name in the table.
        options: Arguments of SlimAdam that ask for it.
        is_compiled: Run through ``torch.compile``.
        uses_triton: Run by Triton's kernels, on a CPU in its interpreter.
    """

    label: str
    options: Mapping[str, Any]
    is_compiled: bool = False
    uses_triton: bool = False

    def is_tried(self, plan: str, momentum: str) -> bool:
        """Return whether a row is worth its time: compiling takes half a minute.

        Args:
            plan: A key of :data:`PLANS`.
            momentum: A key of :data:`MOMENTA`.
        """
        return not self.is_compiled or (plan in ("None", "factored") and momentum == "float32")

    def missing(self, momentum: Any) -> str | None:
        """Return why it cannot run here, or None."""
        if self.uses_triton and importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if self.uses_triton and momentum == torch.bfloat16 and not torch.cuda.is_available():
            return "Triton's interpreter cuts off where a GPU rounds to bfloat16"
        return None

    def step_of(self, optimizer: SlimAdam) -> Callable[[], Any]:
        """Return what takes a step."""
        if not self.is_compiled:
            return optimizer.step
        torch._dynamo.reset()
        return torch.compile(optimizer.step)

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Let the optimizer choose it: where there is no GPU, Triton's kernels take CPU tensors."""
        kept = dispatch.runs_triton
        if self.uses_triton:
            dispatch.runs_triton = lambda device: True
        try:
            yield
        finally:
            dispatch.runs_triton = kept


IMPLEMENTATIONS = (
    Implementation("reference", {"fused": False}),
    Implementation("foreach", {"foreach": True}),
    Implementation("default", {}),
    Implementation("fused=True", {"fused": True}),
    Implementation("torch.compile", {}, is_compiled=True),
    Implementation("Triton", {}, uses_triton=True),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Plan, implementation and first moment.
        backends: Backends that updated the parameters.
        rounding: Largest difference to float64 as a share of what rounding explains; at most 1 is right.
        unseen: Steps of a parameter that autograd did not see.
        problem: Why it failed or was left out; None: it passed.
    """

    name: str
    backends: str = ""
    rounding: float | None = None
    unseen: int | None = None
    problem: str | None = None
    is_left_out: bool = False


def rows(patterns: Sequence[str] = ("*",)) -> Iterator[Row]:
    """Yield the table line by line."""
    for implementation in IMPLEMENTATIONS:
        for plan in PLANS:
            for momentum in MOMENTA:
                name = f"{implementation.label}, plan {plan}, {momentum} momentum"
                wanted = any(fnmatch(name, pattern) for pattern in patterns)
                if wanted and implementation.is_tried(plan, momentum):
                    yield _row(name, implementation, PLANS[plan], MOMENTA[momentum])


def _row(name: str, implementation: Implementation, plan: Callable[[], Any], momentum: Any) -> Row:
    reason = implementation.missing(momentum)
    if reason is not None:
        return Row(name, problem=reason, is_left_out=True)
    options = {**implementation.options, "momentum_dtype": momentum}
    try:
        with implementation.chosen():
            if isinstance(plan(), AutoPlan):
                return Row(name, *_auto(implementation, plan, options))
            watch = _Watch(implementation)
            report = run(skeleton(SHAPES), plan(), options=options, steps=STEPS, step_with=watch)
    except Exception as error:  # what fails is what the table is for
        return Row(name, problem=f"{type(error).__name__}: {error}")
    problem = f"autograd did not see {watch.unseen} steps" if watch.unseen else None
    used = "reference, traced" if implementation.is_compiled else _counted(report.backends)
    return Row(name, used, report.worst, watch.unseen, problem)


class _Watch:
    """Takes the steps, and before each records a graph that must not survive it."""

    def __init__(self, implementation: Implementation) -> None:
        self._implementation = implementation
        self.unseen = 0

    def __call__(self, optimizer: SlimAdam, grads: Mapping[str, list[Tensor]]) -> None:
        step = self._implementation.step_of(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for values in zip(*grads.values(), strict=True):
            set_gradients(optimizer, values)
            recorded = [(param, param.square().sum()) for param in params]
            step()
            self.unseen += sum(not _raises(param, loss) for param, loss in recorded)


def _raises(param: Tensor, loss: Tensor) -> bool:
    """Return whether autograd refuses a graph whose parameter has changed since."""
    try:
        torch.autograd.grad(loss, param)
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


def _auto(
    implementation: Implementation, plan: Callable[[], Any], options: Mapping[str, Any]
) -> tuple[str, float, int, str | None]:
    """Run ``plan="auto"`` past its decision beside the same with the readable reference."""
    hyper: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}
    model, beside = skeleton(SHAPES), skeleton(SHAPES)
    beside.load_state_dict(model.state_dict())
    watch = _Watch(implementation)
    grads = {name: gradients(param, STEPS) for name, param in model.named_parameters()}
    optimizer = SlimAdam(model, plan=plan(), **hyper, **options)
    watch(optimizer, grads)
    reference = SlimAdam(beside, plan=plan(), **hyper, fused=False, momentum_dtype=options["momentum_dtype"])
    _Watch(IMPLEMENTATIONS[0])(reference, grads)
    pairs = zip(model.parameters(), beside.parameters(), strict=True)
    differences = torch.cat([(one - other).detach().flatten().abs() for one, other in pairs]).sort().values
    # A first moment that is rounded when it is stored may fall on the other side in a few elements.
    rare = 0 if options["momentum_dtype"] is None else int(RARE * len(differences))
    worst = differences[len(differences) - 1 - rare].item() / AUTO_DIFFERENCE
    backends = _counted(Counter(optimizer.backend(param) for param in model.parameters()))
    if optimizer.plan is None or optimizer.plan.second_moments_saved <= 0:
        return backends, worst, watch.unseen, "nothing was compressed"
    problem = f"{worst:.1f} times what rounding explains" if worst > 1 else None
    return backends, worst, watch.unseen, problem or (f"autograd did not see {watch.unseen}" if watch.unseen else None)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


def _known(folder: Path) -> dict[str, Any]:
    """Return the tables in the result file.

    Raises:
        ValueError: It is damaged.
    """
    path = folder / f"{NAME}.json"
    if not path.exists():
        return {}
    try:
        environments: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["environments"]
        sorted(environments, key=release)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); delete it, or pass another folder with --out") from error
    return environments


def _keep(found: Sequence[Row], known: dict[str, Any], folder: Path) -> Path:
    """Put the rows into the table of this environment, whose others stay."""
    key = f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}"
    before = {row["name"]: row for row in known.get(key, {}).get("rows", [])}
    rows_now = list({**before, **{row.name: asdict(row) for row in found}}.values())
    known = {**known, key: {"machine": machine.describe(), "rows": rows_now}}
    return machine.write(NAME, {"steps": STEPS, "environments": dict(sorted(known.items(), key=_order))}, folder)


def _order(item: tuple[str, Any]) -> list[int]:
    return release(item[0])


def release(text: str) -> list[int]:
    """Return the numbers in a version."""
    return [int(number) for number in re.findall(r"\d+", text)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, keep it in ``supported.json`` beside those of other Pythons, and return 1 if a row failed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows whose name matches")
    chosen = parser.parse_args(arguments)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}")
    try:
        known = _known(chosen.out)
    except ValueError as error:
        parser.error(str(error))
    found = []
    for row in rows(chosen.only):
        found.append(row)
        rounding = "" if row.rounding is None else f"{row.rounding:.2f} of rounding, {row.unseen} steps unseen"
        verdict = (
            "ok" if row.problem is None else f"left out: {row.problem}" if row.is_left_out else f"FAIL: {row.problem}"
        )
        print(f"{row.name:52s} {row.backends:30s} {rounding:36s} {verdict}", flush=True)
    if not found:
        parser.error(
            f"no row matches {chosen.only}; a row is called, for example, 'default, plan rules, int8 momentum'"
        )
    print("written:", _keep(found, known, chosen.out))
    return int(any(row.problem is not None and not row.is_left_out for row in found))


if __name__ == "__main__":
    sys.exit(main())
