"""Compare clipping gradients inside the step with clipping before it: ``python -m benchmarks.clipping``.

``clip_grad_norm_`` reads and writes every gradient before the step reads it again, ``SlimAdam(max_grad_norm=...)``
reads it once more. All optimizers share the parameters and the gradients of one model and step in turn, so that a busy
machine slows all of them; before each step, untimed, gradients get a norm that must be clipped. Before one of ours is
timed it is compared with the float64 formula; a wrong one stops the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness import exactness, machine, stopwatch
from benchmarks.workloads.shapes import MODELS, ODD_MODEL, Shapes, elements
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam

MAX_NORM = 1.0
NORM = 2.0
WARMUP_TURNS = 2


def check(device: str = "cpu") -> float:
    """Return the largest error of clipped steps against float64, as a share of what rounding explains.

    Raises:
        WrongStepError: The error is larger than rounding explains.
    """
    return exactness.run(skeleton(ODD_MODEL, device), "rules", step_with=_step_clipped).worst


def _step_clipped(optimizer: SlimAdam, grads: Mapping[str, list[Tensor]]) -> None:
    """Take steps whose gradients are twice as large, and clipped back to what they were."""
    for step in zip(*grads.values(), strict=True):
        exactness.set_gradients(optimizer, [2 * grad for grad in step])
        optimizer.max_grad_norm = float(torch.stack([grad.double().norm() for grad in step]).norm())
        optimizer.step()


class _Contender:
    """An optimizer whose gradients are clipped by its step, or before it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, inside: bool) -> None:
        self.laps: list[float] = []
        self._params = list(model.parameters())
        self._optimizer, self._inside = optimizer, inside

    def step(self) -> None:
        if not self._inside:
            nn.utils.clip_grad_norm_(self._params, MAX_NORM)
        self._optimizer.step()


def _contenders(model: nn.Module) -> dict[str, _Contender]:
    adamw: dict[str, Callable[[], Optimizer]] = {
        "AdamW (fused)": lambda: torch.optim.AdamW(model.parameters(), fused=True),
        "AdamW (default)": lambda: torch.optim.AdamW(model.parameters()),
    }
    found = {f"clip_grad_norm_ + {name}": _Contender(model, make(), inside=False) for name, make in adamw.items()}
    before, within = SlimAdam(model, plan="rules"), SlimAdam(model, plan="rules", max_grad_norm=MAX_NORM)
    found["clip_grad_norm_ + SlimAdam (rules)"] = _Contender(model, before, inside=False)
    found["SlimAdam (rules, max_grad_norm)"] = _Contender(model, within, inside=True)
    return found


def _laps(model: nn.Module, rounds: int, device: str) -> dict[str, list[float]]:
    """Return milliseconds of each contender's steps, clipping included."""
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    contenders = _contenders(model)
    for turn in range(rounds + WARMUP_TURNS):
        order = list(contenders.values())
        first = turn % len(order)  # none always runs after the same one: caches and the clock remember it
        for one in [*order[first:], *order[:first]]:
            nn.utils.clip_grad_norm_(model.parameters(), NORM / 2)
            torch._foreach_mul_([param.grad for param in model.parameters() if param.grad is not None], 2.0)
            lap = stopwatch.lap(one.step, device)
            one.laps += [lap.total] if turn >= WARMUP_TURNS else []
    return {label: one.laps for label, one in contenders.items()}


def measure(shapes: Shapes, rounds: int, device: str) -> dict[str, Any]:
    """Check, then time every contender.

    Args:
        shapes: Shapes of the model.
        rounds: Timed steps of each contender.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Rows by label, and the errors of the check.

    Raises:
        WrongStepError: A clipped step is wrong.
    """
    error = check(device)
    laps = _laps(skeleton(shapes, device), rounds, device)
    medians = {label: statistics.median(times) for label, times in laps.items()}
    baseline = next(iter(medians.values()))
    rows = {
        label: {
            "milliseconds": medians[label],
            "ratio": medians[label] / baseline,
            "laps": [round(lap, 4) for lap in times],
        }
        for label, times in laps.items()
    }
    return {
        "max_norm": MAX_NORM,
        "norm": NORM,
        "rounds": rounds,
        "worst_share_of_rounding": error,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, print a table and write ``clipping.json``."""
    parser = machine.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each optimizer")
    options = parser.parse_args(arguments)
    shapes = MODELS[options.model]()
    found = measure(shapes, options.rounds, options.device)
    print(f"worst error as a share of what rounding explains: {found['worst_share_of_rounding']:.2f}")
    print(f"{options.model}, float32, {elements(shapes):,} parameters, {options.device}")
    print(" " * 52 + "      ms   of the first")
    for label, row in found["rows"].items():
        print(f"{label:52s}{row['milliseconds']:8.2f}{row['ratio']:15.3f}")
    name = (
        "clipping"
        if (options.model, options.device) == ("gpt2-small", "cpu")
        else f"clipping_{options.model}_{options.device}"
    )
    print("written:", machine.write(name, {"model": options.model, "device": options.device, **found}, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
