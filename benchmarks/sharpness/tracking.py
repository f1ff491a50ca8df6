"""Critical, directional and Hessian sharpness side by side along runs, and on quadratics, where the first two agree.

On all digits, with gradient descent and with Adam, whose Hessian is preconditioned. Each is shown as a share of the
value at which the optimizer stops being stable: ``2/lr``, and for Adam's Hessian ``38/lr``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.workloads.full_batch import FullBatch
from slimadam import CriticalSharpness, SlimAdam, directional_sharpness, edge_of_stability, hessian_sharpness

TOLERANCE = 1 / 16
LARGEST_ERROR = 0.07
"""Bar: relative, of the critical against the directional sharpness on quadratics at that tolerance."""
CLOSELY = 0.9
"""Correlation of logarithms from which one counts as tracking the other."""
FACTOR = 1.25
"""Most that the median ratio of critical to directional sharpness may differ from 1."""
EDGE = 0.9
"""Share of the threshold from which the Hessian's counts as at the edge."""
QUADRATICS = ((1,), (7,), (3, 5), (33, 2), (129,))
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "gradient descent": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "SlimAdam": lambda params: SlimAdam(params, lr=0.01, plan="factored"),
}


def study(quick: bool) -> dict[str, Any]:
    """Return both runs' rows and agreement, and the worst error on quadratics."""
    steps, every = (60, 5) if quick else (1600, 10)
    runs = {
        "gradient descent": _rows_of(lambda params: torch.optim.SGD(params, lr=0.4), False, steps, every),
        "Adam": _rows_of(lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.99)), True, steps, every),
    }
    found = {name: summary(rows) for name, rows in runs.items()}
    worst = max(quadratic_errors(1 if quick else 10))
    return {
        "runs": runs,
        "agreement": found,
        "table": [line for name, one in found.items() for line in _lines(name, one)],
        "worst_error_on_quadratics": worst,
        "findings": {finding: held for name, one in found.items() for finding, held in _findings(name, one).items()},
        "bars": {
            f"worst error of critical sharpness on quadratics {worst:.2%}, below {LARGEST_ERROR:.0%}":
            worst < LARGEST_ERROR
        },
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return agreement over the whole run, and before and after the Hessian's sharpness first meets its threshold."""
    reached = next((row["step"] for row in rows if row["hessian"] >= EDGE), math.inf)
    found = [row for row in rows if row["status"] == "found"]
    return {
        "all": agreement(found),
        "before the edge": agreement([row for row in found if row["step"] < reached]),
        "at the edge": agreement([row for row in found if row["step"] >= reached]),
    }


def _findings(name: str, found: dict[str, dict[str, float]]) -> dict[str, bool]:
    """Return whether critical sharpness tracks the others."""
    whole = found["all"]
    held = {
        f"{name}: critical tracks directional sharpness (correlation {CLOSELY:g})":
        whole.get("correlation_with_directional", math.nan) >= CLOSELY,
        f"{name}: critical tracks Hessian sharpness (correlation {CLOSELY:g})":
        whole.get("correlation_with_hessian", math.nan) >= CLOSELY,
    }  # fmt: skip
    for stretch in ("before the edge", "at the edge"):
        for other in ("directional", "hessian"):
            ratio = found[stretch].get(f"median_of_{other}", math.nan)
            what = f"{name}: {stretch} of stability critical is {other} sharpness at the median (factor {FACTOR:g})"
            held[what] = 1 / FACTOR <= ratio <= FACTOR
    return held


def _lines(name: str, found: dict[str, dict[str, float]]) -> list[str]:
    whole = found["all"]
    positive = f"{whole.get('positive_directional', 0)} of {whole['measurements']} measurements"
    lines = [
        f"{name}: {whole['forward_passes']:.1f} forward passes; the directional one is positive, and compared, at "
        f"{positive}"
    ]
    for other in ("directional", "hessian"):
        ratios = ", ".join(f"{one.get(f'median_of_{other}', math.nan):.2f} {stretch.replace('all', 'in all')}"
                           for stretch, one in found.items())  # fmt: skip
        correlation = whole.get(f"correlation_with_{other}", math.nan)
        lines.append(f"{name}: critical over {other} at the median {ratios}; correlation {correlation:.3f}")
    return lines


def _rows_of(
    make: Callable[[list[nn.Parameter]], Optimizer], preconditioned: bool, steps: int, every: int
) -> list[dict[str, Any]]:
    """Measure all three at every ``every``-th step of a full-batch run, as shares of their thresholds."""
    workload = FullBatch()
    model = workload.new_model(seed=0)
    closure = workload.closure(model)
    optimizer = make(list(model.parameters()))
    probe = CriticalSharpness(optimizer, tol=TOLERANCE, modules=[model])
    rows, start = [], None
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = closure()
        torch.autograd.backward(loss, retain_graph=step % every == 0)
        if step % every == 0:
            measured = probe.measure(closure)
            hessian = hessian_sharpness(
                model.parameters(), loss, preconditioner=optimizer if preconditioned else None, start=start, tol=1e-3
            )
            start = hessian.eigenvector
            rows.append({
                "step": step,
                "status": measured.status,
                "forward_passes": measured.forward_passes,
                "critical": measured.sharpness * measured.lr / 2,
                "directional": directional_sharpness(optimizer, loss) * measured.lr / 2,
                "hessian": hessian / (edge_of_stability(optimizer) or math.nan),
            })  # fmt: skip
        optimizer.step()
    return rows


def agreement(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return correlations of logarithms, and median ratios of the critical sharpness to the others where positive."""
    found: dict[str, float] = {
        "measurements": len(rows),
        "forward_passes": fmean(row["forward_passes"] for row in rows) if rows else math.nan,
    }
    for other in ("directional", "hessian"):
        pairs = [(row["critical"], row[other]) for row in rows if row.get(other, math.nan) > 0]
        if len(pairs) > 1:
            found[f"positive_{other}"] = len(pairs)
            found[f"correlation_with_{other}"] = float(np.corrcoef(np.log(np.array(pairs)).T)[0, 1])
            found[f"median_of_{other}"] = median_of(one / two for one, two in pairs)
    return found


def median_of(values: Iterable[float]) -> float:
    """Return the median; NaN where there are no values."""
    found = list(values)
    return median(found) if found else math.nan


def quadratic_errors(seeds: int) -> list[float]:
    """Return relative differences of both on random convex quadratics in float64, a few steps into a run."""
    errors = []
    for make in OPTIMIZERS.values():
        for shape in QUADRATICS:
            for seed in range(seeds):
                theta, closure = _quadratic(shape, seed)
                optimizer = make([theta])
                for _ in range(3):
                    optimizer.zero_grad()
                    torch.autograd.backward(closure())
                    optimizer.step()
                optimizer.zero_grad()
                loss = closure()
                torch.autograd.backward(loss, retain_graph=True)
                exact = directional_sharpness(optimizer, loss)
                measured = CriticalSharpness(optimizer, tol=TOLERANCE, modules=[]).measure(closure)
                if exact > 0 and measured.status == "found":
                    errors.append(abs(measured.sharpness / exact - 1))
                elif not (math.isnan(exact) and measured.status == "no descent"):
                    errors.append(math.inf)  # one sees a descent, the other none
    return errors


def _quadratic(shape: tuple[int, ...], seed: int) -> tuple[nn.Parameter, Callable[[], Tensor]]:
    """Return ``(theta - c)^T A (theta - c) / 2`` with eigenvalues over two decades."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    eigenvalues = torch.logspace(-1, 1, size, dtype=torch.float64)
    centre = torch.randn(shape, generator=generator, dtype=torch.float64)
    theta = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def closure() -> Tensor:
        turned = basis @ (theta - centre).flatten()
        loss: Tensor = (eigenvalues * turned.square()).sum() / 2
        return loss

    return theta, closure
