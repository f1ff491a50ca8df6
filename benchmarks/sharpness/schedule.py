"""The sharpness follows the learning rate through a warmup, a stable phase and a decay: the byte GPT.

The critical sharpness is measured on each batch's own update against ``2/lr``, at which that update no longer lowers
its loss (arXiv 2601.16979).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from benchmarks.sharpness.tracking import agreement, median_of
from slimadam import CriticalSharpness, directional_sharpness
from slimadam.demo.data import load
from slimadam.demo.training import DemoSettings

SETTINGS = DemoSettings(layers=2, width=32, heads=2, context=32, batch_size=128)


class Way(NamedTuple):
    """How the byte GPT is trained.

    Attributes:
        make: Makes the optimizer.
        lr: Its largest learning rate.
        steps: Steps of training.
        batch_size: Windows in a batch.
        one_batch: Train on the first batch only, so that the loss is the same function throughout.
    """

    make: Callable[[nn.Module], Optimizer]
    lr: float
    steps: int
    batch_size: int = SETTINGS.batch_size
    one_batch: bool = False


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=SETTINGS.betas, weight_decay=0.1)


WAYS = {
    "AdamW": Way(_adamw, 0.06, 800),
    "SGD": Way(lambda model: torch.optim.SGD(model.parameters(), lr=1.0), 1.0, 1600),
    "AdamW, one batch": Way(_adamw, 0.05, 600, 32, one_batch=True),
}
PHASES = {"warmup": 0.25, "stable": 0.45, "decay": 0.3}
"""Shares of the run."""
LEAST_RISE = 2.0
FOLLOWS = 0.8
"""Rank correlation with ``2/lr`` from which the sharpness counts as following it."""
FACTOR = 2.0


def share_of_rate(step: int, steps: int) -> float:
    """Return the share of the largest rate: linear warmup, constant, linear decay to a twentieth.

    Args:
        step: Number of the step, from 1.
        steps: Number of all steps.
    """
    warm, decay = PHASES["warmup"] * steps, PHASES["decay"] * steps
    return min(1.0, step / warm, 0.05 + 0.95 * (steps - step) / decay)


def phase(step: int, steps: int) -> str:
    """Return the name of the phase that a step is in.

    Args:
        step: Number of the step, from 1.
        steps: Number of all steps.
    """
    if step <= PHASES["warmup"] * steps:
        return "warmup"
    return "decay" if step > (1 - PHASES["decay"]) * steps else "stable"


def study(quick: bool) -> dict[str, Any]:
    """Return each optimizer's run, what its phases show, and whether the sharpness follows."""
    rows = {
        name: _train(way._replace(steps=40, batch_size=8), 2) if quick else _train(way, 8) for name, way in WAYS.items()
    }
    runs = {name: summary(found) for name, found in rows.items()}
    return {
        "runs": runs,
        "table": [line for name, run in runs.items() for line in _lines(name, run)],
        "findings": {finding: held for name, run in runs.items() for finding, held in _findings(name, run).items()},
        "bars": {},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return by phase the median share of ``2/lr``, and the rank correlation with it."""
    found = [row for row in rows if row["status"] == "found"]
    by_phase = {"all": found, **{name: [row for row in found if row["phase"] == name] for name in PHASES}}
    decay = _sharpness(by_phase["decay"])
    return {
        "rows": rows,
        "share_of_two_over_lr": {name: median_of(row["critical"] for row in own) for name, own in by_phase.items()},
        "rank_correlation": {
            name: rank_correlation(_sharpness(own), [2 / row["lr"] for row in own])
            for name, own in by_phase.items()
            if name != "stable"
        },
        "rise_in_the_decay": median_of(decay[-(len(decay) // 10 + 1) :]) / median_of(_sharpness(by_phase["stable"])),
        "tracking": agreement(found),
    }


def _findings(name: str, run: dict[str, Any]) -> dict[str, bool]:
    """Return whether each phase meets its criterion."""
    correlation = run["rank_correlation"]
    return {
        f"{name}: in the warmup the critical sharpness falls as the rate grows (rank correlation {FOLLOWS:g})":
        correlation["warmup"] >= FOLLOWS,
        f"{name}: at the constant rate it stays within a factor of {FACTOR:g} of 2/lr at the median":
        1 / FACTOR <= run["share_of_two_over_lr"]["stable"] <= FACTOR,
        f"{name}: in the decay it rises as the rate falls (rank correlation {FOLLOWS:g})":
        correlation["decay"] >= FOLLOWS,
        f"{name}: in the decay it rises {LEAST_RISE:g} times and more": run["rise_in_the_decay"] >= LEAST_RISE,
    }  # fmt: skip


def _lines(name: str, run: dict[str, Any]) -> list[str]:
    shares = ", ".join(f"{phase} {share:.2f}" for phase, share in run["share_of_two_over_lr"].items())
    correlations = ", ".join(f"{phase} {value:.2f}" for phase, value in run["rank_correlation"].items())
    return [
        f"{name}: median share of 2/lr: {shares}; rank correlation with it: {correlations}",
        f"{name}: at the end of the decay {run['rise_in_the_decay']:.2f} times as sharp as at the constant rate",
        f"{name}: critical over directional {run['tracking']['median_of_directional']:.3f} at the median; "
        f"{run['tracking']['forward_passes']:.1f} forward passes",
    ]


def _sharpness(rows: list[dict[str, Any]]) -> list[float]:
    return [row["critical"] * 2 / row["lr"] for row in rows]


def _train(way: Way, every: int) -> list[dict[str, Any]]:
    """Train, and return the measurements at every ``every``-th step."""
    data, steps = load(None, SETTINGS.context), way.steps
    batches = data.batches(1 if way.one_batch else steps, way.batch_size, SETTINGS.context, SETTINGS.seed)
    model = SETTINGS.new_model()
    optimizer = way.make(model)
    probe = CriticalSharpness(optimizer, modules=[model])
    rows = []
    for step, (inputs, targets) in zip(range(1, steps + 1), itertools.cycle(batches), strict=False):
        optimizer.param_groups[0]["lr"] = way.lr * share_of_rate(step, steps)
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # flash attention has no second derivative
            loss = model.loss(inputs, targets)
            torch.autograd.backward(loss, retain_graph=True)
            if step % every == 0:
                measured = probe.measure(lambda batch=(inputs, targets): model.loss(*batch))  # type: ignore[misc]
                rows.append({
                    "step": step,
                    "phase": phase(step, steps),
                    "lr": measured.lr,
                    "loss": measured.loss,
                    "critical": measured.sharpness * measured.lr / 2,
                    "status": measured.status,
                    "forward_passes": measured.forward_passes,
                    "directional": directional_sharpness(optimizer, loss) * measured.lr / 2,
                })  # fmt: skip
        optimizer.step()
    return rows


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's rank correlation.

    Args:
        one: Values.
        other: Values in the same order.
    """
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (one, other)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
