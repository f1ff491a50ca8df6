"""Stability of a training run: the threshold of an optimizer, and the regimes that the sharpness goes through."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import reference_lr, unwrapped
from slimadam.optim.slimadam import SlimAdam
from slimadam.utils.errors import shown

_FEWEST = 8
_SETTLED = 0.1  # a fall is over, and a rise begins, within this share of it from its lowest point, in logarithms
_NOISE = 10.0  # standard errors of the smoothed trace that a change has to exceed: the range of some hundred of them
_NORMAL_MAD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation
_FAR_ABOVE = 2.0  # a sharpness that stays this many times above the threshold is not about it

_Floats = NDArray[np.float64]


def edge_of_stability(optimizer: Optimizer) -> float | None:
    """Return the largest curvature at which the optimizer converges on a quadratic loss, its preconditioner constant.

    With learning rate ``lr``, momentum or first decay rate ``b``, dampening ``d`` and weight decay ``w``:

    ==============================  ===============================================
    gradient descent                ``2 / lr - w``
    SGD with momentum               ``(2 + 2 b) / ((1 - d) lr) - w``
    SGD with Nesterov's momentum    ``(2 + 2 b) / ((1 + 2 b) lr) - w``
    Adam                            ``(2 + 2 b) / ((1 - b) lr)``
    AdamW, SlimAdam                 ``(2 + 2 b) / ((1 - b) lr) - w``
    ==============================  ===============================================

    Those of SGD are for the top eigenvalue of the Hessian ``H`` (arXiv 2103.00065), those of Adam for that of
    ``P**(-1/2) H P**(-1/2)`` with ``P = sqrt(v_hat) + eps`` (arXiv 2207.14484):
    :func:`~slimadam.hessian_sharpness` with the optimizer as preconditioner. The critical and the directional
    sharpness, which look one step ahead, compare with ``2 / lr`` (arXiv 2601.16979).

    The last is arXiv 2601.16979's. Decoupled weight decay shrinks parameters beside the momentum, not through it, so
    that strictly it counts ``(1 + b) / (1 - b)`` times: on ``h / 2 theta**2`` with ``a = 1 - lr w`` the update
    ``theta' = a theta - lr m'``, ``m' = b m + (1 - b) h theta`` has the characteristic polynomial
    ``z**2 - (a + b - lr (1 - b) h) z + a b``, and the root ``z = -1`` at ``lr (1 - b) h = (1 + a) (1 + b)``. The
    difference is ``lr w b / (1 + b)`` of the threshold: 5e-5 of it at ``lr = 1e-3``, ``w = 0.1``.

    Args:
        optimizer: Any torch optimizer; its parameter group with the largest learning rate counts.

    Returns:
        The threshold, in units of one over the learning rate; infinity at ``lr = 0``. None where no formula is known
        (NAdam, RAdam, ...). Adam's own weight decay goes through the preconditioner and has no term.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: A group has no learning rate.
    """
    optimizer = unwrapped(optimizer)
    lr = reference_lr(optimizer)
    group = next(group for group in optimizer.param_groups if float(group["lr"]) == lr)
    if isinstance(optimizer, torch.optim.SGD):
        beta, decay = float(group["momentum"]), float(group["weight_decay"])
        factor = 1 + 2 * beta if group["nesterov"] else 1 - float(group["dampening"])
        factor = factor if beta else 1.0
    elif isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, SlimAdam)):
        is_coupled = type(optimizer) is torch.optim.Adam and not group.get("decoupled_weight_decay", False)
        beta, decay = float(group["betas"][0]), 0.0 if is_coupled else float(group["weight_decay"])
        factor = 1 - beta
    else:
        return None
    return (2 + 2 * beta) / (factor * lr) - decay if lr > 0 and factor > 0 else math.inf


class Regime(NamedTuple):
    """A stretch of a run.

    Attributes:
        label: ``"early transient"``, ``"intermediate saturation"``, ``"progressive sharpening"``,
            ``"edge of stability"``, or ``"late decline"``.
        first_step: Step of its first measurement.
        last_step: Step of its last measurement.
        reason: How the trace moves there, in words.
    """

    label: str
    first_step: int
    last_step: int
    reason: str


def regimes(
    trace: Iterable[Any], *, window: int | None = None, change: float = 1.25, margin: float = 0.2
) -> list[Regime]:
    """Label the four regimes of a run at one learning rate (arXiv 2302.12250) from measurements of its sharpness.

    Early transient: the sharpness falls from where it began (after a catapult it peaks first). Intermediate
    saturation: it stays low. Progressive sharpening: it rises. Edge of stability: it stays about the threshold, to the
    end or until it leaves for good; without thresholds there is none. Late decline, common with cross-entropy, follows;
    it is not in the paper. Regimes may be missing. Where the learning rate changes a lot, label each stretch by itself.

    The trace is smoothed by running medians of its logarithm. Only finite positive measurements count.

    Args:
        trace: Measurements in the order of steps: tuples ``(step, sharpness)`` or ``(step, sharpness, threshold)``, or
            mappings or objects with these names. The threshold is that of the same measure: ``2 / lr`` for the
            critical and the directional sharpness, :func:`~slimadam.edge_of_stability` for the Hessian's. Rows of a
            :class:`~slimadam.SharpnessLogger`, which have ``critical_lr`` and ``lr``, are taken against ``2 / lr``.
        window: Measurements in a running median, an even number; default: a thirtieth of them, at least 4.
        change: Factor by which the sharpness must fall or rise to count; more where it is noisy.
        margin: At the edge of stability the smoothed sharpness is at least ``(1 - margin)`` of the threshold.

    Returns:
        The regimes in order; each measurement that counts is in one.

    Raises:
        TypeError: A measurement is none of these.
        ValueError: Fewer than 8 measurements count, steps do not increase, or an option is out of range.
    """
    if window is not None and (window < 2 or window % 2):
        raise ValueError(f"window={window} must be an even number of measurements, at least 2")
    if not change > 1:
        raise ValueError(f"change={change} must be above 1, such as 1.25 for a quarter")
    if not 0 < margin < 1:
        raise ValueError(f"margin={margin} must lie between 0 and 1")
    steps, sharpness, threshold = _columns(trace)
    window = max(4, len(steps) // 60 * 2) if window is None else window
    raw = np.log(sharpness)
    smooth = _running_median(raw, window)
    spread = float(np.median(np.abs(raw - smooth))) * _NORMAL_MAD
    needed = max(math.log(change), _NOISE * spread / math.sqrt(window))
    ratio = smooth - np.log(threshold)  # infinite thresholds, at lr = 0, are never near
    edge, left = _edge(ratio, -math.log1p(-margin), window)
    found = _before_the_edge(smooth[:edge], needed, reaches_it=edge < left)
    if edge < left:
        median = math.exp(float(np.median(ratio[edge:left])))
        found.append(("edge of stability", edge, left, f"stays about the threshold, at the median {median:.2f} of it"))
    fall = math.exp(smooth[left - 1] - smooth[-1])
    reason = f"leaves the threshold for good, at the end {fall:.3g} times lower"
    found.append(("late decline", left, len(raw), reason))
    return [Regime(label, int(steps[a]), int(steps[b - 1]), reason) for label, a, b, reason in found if a < b]


def _edge(ratio: _Floats, margin: float, window: int) -> tuple[int, int]:
    """Return the first index at the threshold, and the first after it; the number of measurements twice if none is.

    ``ratio`` is the logarithm of the smoothed sharpness over the threshold, and ``margin`` how far below still counts.
    Stays shorter than ``window`` do not count; absences are overlooked up to twice as long, or a twentieth of the run.
    """
    near = np.flatnonzero(ratio >= -margin)
    overlooked = max(2 * window, len(ratio) // 20)
    stays = np.split(near, np.flatnonzero(np.diff(near) > overlooked) + 1)
    for stay in reversed(stays):
        if len(stay) < window:
            continue
        reached = stay[ratio[stay] <= margin]  # not the peak of a catapult before it
        first, left = int(reached[0]) if len(reached) else len(ratio), int(stay[-1]) + 1
        if left - first >= window and np.median(ratio[first:left]) <= math.log(_FAR_ABOVE):
            return first, left if len(ratio) - left > overlooked else len(ratio)
    return len(ratio), len(ratio)


def _before_the_edge(smooth: _Floats, needed: float, reaches_it: bool) -> list[tuple[str, int, int, str]]:
    """Return label, first index, first index after it and reason of each regime but the last."""
    if len(smooth) == 0:
        return []
    high = int((smooth - np.minimum.accumulate(smooth)).argmax())  # the end of the largest rise, and its start
    low = int(smooth[: high + 1].argmin())
    rise = smooth[high] - smooth[low]
    start = end = len(smooth)
    if rise < needed:
        low = int(smooth.argmin())
    else:
        start = low + int(np.flatnonzero(smooth[low : high + 1] <= smooth[low] + _SETTLED * rise)[-1])
        if not reaches_it and smooth[high] - smooth[-1] >= needed:
            end = high + 1
    peak = int(smooth[: low + 1].argmax())
    drop = smooth[peak] - smooth[low]
    settled = 0
    if drop >= needed:
        settled = peak + int(np.flatnonzero(smooth[peak : low + 1] <= smooth[low] + _SETTLED * drop)[0])
    # A steady rise is that long near its start, and a steady fall near its end.
    if start < len(smooth) and start - settled <= 2 * _SETTLED * (end - start):
        start = settled
    elif start == len(smooth) and start - settled <= 2 * _SETTLED * settled:
        settled = start
    flat = smooth[settled:start]
    width = math.exp(np.ptp(flat)) if len(flat) else 1.0
    return [
        ("early transient", 0, settled, f"falls to 1/{math.exp(drop):.3g} of its peak"),
        ("intermediate saturation", settled, start, f"stays within a factor of {width:.3g}"),
        ("progressive sharpening", start, end, f"rises {math.exp(rise):.3g} times"),
        ("late decline", end, len(smooth), f"falls to 1/{math.exp(smooth[end - 1] - smooth[-1]):.3g} of its highest"),
    ]


def _running_median(values: _Floats, window: int) -> _Floats:
    """Return the medians of ``window`` values about each; at the ends those of the first and the last window."""
    window = min(window, len(values))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    before = window // 2
    return np.pad(medians, (before, len(values) - len(medians) - before), mode="edge")


def _columns(trace: Iterable[Any]) -> tuple[_Floats, _Floats, _Floats]:
    """Return steps, sharpness and thresholds (infinite where there is none) of the measurements that count."""
    rows = np.array([_row(index, row) for index, row in enumerate(trace)], dtype=np.float64).reshape(-1, 3)
    rows = rows[np.isfinite(rows[:, 1]) & (rows[:, 1] > 0)]
    if len(rows) < _FEWEST:
        raise ValueError(f"trace has {len(rows)} finite positive measurements; regimes need at least {_FEWEST}")
    if not (np.diff(rows[:, 0]) > 0).all():
        raise ValueError("the steps of trace do not increase; give the measurements of one run in their order")
    if not (rows[:, 2] > 0).all():
        raise ValueError(f"trace has the threshold {rows[:, 2].min()}; thresholds must be positive, or None")
    return rows[:, 0], rows[:, 1], rows[:, 2]


def _row(index: int, row: Any) -> tuple[float, float, float]:
    try:
        if isinstance(row, (tuple, list)) and not hasattr(row, "sharpness"):
            step, sharpness, threshold = (*row, None)[:3]
        else:
            read = row.get if isinstance(row, Mapping) else partial(getattr, row)
            step, sharpness, threshold = (read(name, None) for name in ("step", "sharpness", "threshold"))
            if read("critical_lr", None) is not None and read("lr", None):
                threshold = 2 / float(read("lr", None))
        return float(step), float(sharpness), math.inf if threshold is None else float(threshold)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"trace[{index}]={shown(row)} must be (step, sharpness) or (step, sharpness, threshold), or have these "
            "as keys or attributes"
        ) from error
