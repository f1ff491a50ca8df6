"""The UV model: every regime of the sharpness, and the period-doubling route to chaos (arXiv 2311.02076).

Learning rates are given as shares of ``sqrt(width) / y``: past 1 no minimum is flat enough for gradient descent.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.workloads.uv_model import UVModel
from slimadam import hessian_sharpness, regimes

TARGET = 2.0
WEIGHT = torch.tensor([[0.35], [0.82]], dtype=torch.float64)
READOUT = torch.tensor([0.33, -0.83], dtype=torch.float64)
EXAMPLE = torch.ones(1, dtype=torch.float64)
UNIT_RATE = math.sqrt(len(READOUT)) / TARGET
LARGEST_ERROR = 1e-6
"""Bar: relative, of ``hessian_sharpness`` against the dense Hessian's top eigenvalue, in float64."""
SMALLEST_CHANGE = 2.0
"""How much the sharpness has to fall or rise."""
ABOUT = 0.1
CHAOTIC = 0.01
"""Lyapunov exponent per step from which a run counts as chaotic."""
_LATE = 512
_LONGEST_PERIOD = 64
_SAME = 1e-6

Floats = NDArray[np.float64]


class Run(NamedTuple):
    """A behaviour of the model.

    Attributes:
        scale: Factor of the initial parameters.
        rate: Learning rate, as a share of ``sqrt(width) / y``.
    """

    scale: float
    rate: float


RUNS = {
    "sharpness reduction": Run(3.0, 0.02),
    "progressive sharpening": Run(0.2, 0.05),
    "edge of stability": Run(0.2, 1.1),
    "chaos": Run(0.2, 1.5),
}


def study(quick: bool) -> dict[str, Any]:
    """Return the four runs, the scan of learning rates, and what was reproduced."""
    runs = {name: _trajectory(run, 120 if quick else 300) for name, run in RUNS.items()}
    rates = np.linspace(0.9, 1.7, 201 if quick else 401)
    scanned = scan(rates, 2_000 if quick else 40_000)
    worst = max([run.pop("worst_error") for run in runs.values()] + [error_at(width) for width in (3, 17, 64)])
    return {
        "target": TARGET,
        "runs": runs,
        "scan": scanned,
        "worst_error": worst,
        "table": [_periods_in_words(scanned)],
        "findings": {
            f"large parameters: the sharpness falls to 1/{SMALLEST_CHANGE:g} and less at its lowest, always below 2/lr":
            reduced(runs["sharpness reduction"]),
            f"small ones: it rises {SMALLEST_CHANGE:g} times and more, and stays below 2/lr":
            sharpened(runs["progressive sharpening"]),
            f"past sqrt(width)/y it oscillates with period two, its mean within {ABOUT:.0%} of 2/lr":
            at_the_edge(runs["edge of stability"]),
            "as the rate grows the period doubles, 1, 2, 4, 8, and then there is chaos": doubles(scanned),
        },
        "bars": {
            f"worst error of hessian_sharpness on the UV model {worst:.1e}, below {LARGEST_ERROR:g}": worst
            < LARGEST_ERROR
        },
    }  # fmt: skip


def _periods_in_words(scanned: dict[str, Any]) -> str:
    counts = Counter(scanned["periods"])
    none = counts.pop(0, 0)
    each = ", ".join(f"{period} at {counts[period]}" for period in sorted(counts))
    return f"periods of the late sharpness over {len(scanned['periods'])} rates: {each}, none at {none}"


def _trajectory(run: Run, steps: int) -> dict[str, Any]:
    """Run gradient descent with both sharpnesses at every step."""
    model = UVModel(WEIGHT * run.scale, READOUT * run.scale, EXAMPLE, TARGET)
    lr = run.rate * UNIT_RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    exact, losses, worst, start = [], [], 0.0, None
    for _ in range(steps):
        loss = model.loss()
        dense = torch.linalg.eigvalsh(model.hessian())[-1].item()
        measured = hessian_sharpness(model.parameters(), loss, start=start)
        start = measured.eigenvector
        worst = max(worst, abs(measured - dense) / abs(dense))
        exact.append(dense)
        losses.append(loss.item())
        optimizer.zero_grad()
        torch.autograd.backward(model.loss())
        optimizer.step()
    found = regimes([(step, value, 2 / lr) for step, value in enumerate(exact)])
    return {"lr": lr, "sharpness": exact, "losses": losses, "worst_error": worst, "regimes": found}


def error_at(width: int) -> float:
    """Return relative error of ``hessian_sharpness`` for random parameters and inputs of half the width."""
    model = UVModel.random(width, (width + 1) // 2, TARGET, seed=width, dtype=torch.float64)
    dense: float = torch.linalg.eigvalsh(model.hessian())[-1].item()
    return abs(hessian_sharpness(model.parameters(), model.loss()) / dense - 1)


def reduced(run: dict[str, Any]) -> bool:
    """Return whether the sharpness fell by the factor, always below the edge."""
    values = run["sharpness"]
    return bool(values[0] >= SMALLEST_CHANGE * min(values) and max(values) < 2 / run["lr"])


def sharpened(run: dict[str, Any]) -> bool:
    """Return whether the sharpness rose by the factor from its lowest, and stayed below the edge."""
    values = run["sharpness"]
    return bool(values[-1] >= SMALLEST_CHANGE * min(values) and values[-1] < 2 / run["lr"])


def at_the_edge(run: dict[str, Any]) -> bool:
    """Return whether the last quarter oscillates about the edge."""
    late = np.array(run["sharpness"][-len(run["sharpness"]) // 4 :])
    return bool(abs(late.mean() * run["lr"] / 2 - 1) <= ABOUT and period(late) == 2)


def doubles(scanned: dict[str, Any]) -> bool:
    """Return whether periods 1, 2, 4, 8 come in this order as the rate grows, and chaos after them."""
    first = [scanned["periods"].index(count) if count in scanned["periods"] else -1 for count in (1, 2, 4, 8)]
    chaotic = [index for index, value in enumerate(scanned["lyapunov"]) if value > CHAOTIC]
    order = [-1, *first, *chaotic[:1]]
    return len(order) == 6 and all(one < other for one, other in itertools.pairwise(order))


def scan(rates: Floats, steps: int) -> dict[str, Any]:
    """Return late sharpness, its period (0: none up to 64) and the Lyapunov exponent at each rate, all rates at once.

    The exponent is the mean growth per step of a vector that each step's ``I - lr H`` turns, in natural logarithms.

    Args:
        rates: Learning rates, in units of ``UNIT_RATE``.
        steps: Steps of gradient descent.
    """
    lr = rates * UNIT_RATE
    scale = RUNS["edge of stability"].scale
    weight = np.tile(WEIGHT[:, 0].numpy() * scale, (len(lr), 1))
    readout = np.tile(READOUT.numpy() * scale, (len(lr), 1))
    root = math.sqrt(weight.shape[1])
    tangent = np.random.default_rng(0).standard_normal((len(lr), 2 * weight.shape[1]))
    late, growth = [], np.zeros(len(lr))
    for step in range(steps):
        error = (weight * readout).sum(1, keepdims=True) / root - TARGET
        if step >= steps - _LATE:
            hessian = _hessians(weight, readout, error, root)
            late.append(np.linalg.eigvalsh(hessian)[:, -1])
            tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
            tangent = tangent - lr[:, None] * np.einsum("bij,bj->bi", hessian, tangent)
            growth += np.log(np.linalg.norm(tangent, axis=1))
        change = lr[:, None] * error / root
        weight, readout = weight - change * readout, readout - change * weight
    sharpness = np.array(late).T
    return {
        "rates": rates.tolist(),
        "periods": [period(values) or 0 for values in sharpness],
        "lyapunov": (growth / _LATE).tolist(),
        "late_sharpness_over_the_edge": [sorted(set((values[-32:] * each / 2).round(4).tolist()))
                                         for values, each in zip(sharpness, lr, strict=True)],
    }  # fmt: skip


def _hessians(weight: Floats, readout: Floats, error: Floats, root: float) -> Floats:
    """Return :meth:`UVModel.hessian` for an example of one, ``[rates, 2 width, 2 width]``."""
    width = weight.shape[1]
    slope = np.concatenate([readout, weight], axis=1) / root
    mixed = error[:, :, None] / root * np.eye(width)
    whole: Floats = slope[:, :, None] * slope[:, None, :]
    whole[:, :width, width:] += mixed
    whole[:, width:, :width] += mixed
    return whole


def period(values: Floats) -> int | None:
    """Return the smallest period up to 64 with which values repeat themselves."""
    for candidate in range(1, min(_LONGEST_PERIOD, len(values) // 2) + 1):
        if np.abs(values[candidate:] - values[:-candidate]).max() <= _SAME * np.abs(values).max():
            return candidate
    return None
