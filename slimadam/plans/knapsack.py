"""The multiple-choice knapsack: one option of each class, so that enough is saved at the least loss.

Dynamic programming over undominated choices, pruned by the Lagrangian bound; the classes in which leaving the relaxed
choice costs least come first (as in Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

LARGEST_FRONTIER: Final = 4096
"""Choices followed at a time, the most promising; where there are more, a slightly better one may be missed."""

_ROUNDING: Final = 1e-12

Option = tuple[int, float]
"""What it saves, and what it loses."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def least_loss(classes: Sequence[Sequence[Option]], needed: int, known: Iterable[Sequence[int]] = ()) -> list[int]:
    """The option of each class, by index, that together save at least ``needed`` and lose the least.

    Args:
        classes: The options, of which one is ``(0, 0.0)``; all classes together can save what is needed.
        needed: What must be saved.
        known: Choices that meet the need, which the result is at least as good as.
    """
    if not classes:
        return []
    saved, loss = _table(classes)
    price, relaxed = _relaxed(saved, loss, needed)
    best = min([relaxed, *map(list, known)], key=lambda choice: _loss(classes, choice))
    return best if price == 0 else _improved(classes, needed, price, relaxed, best)


def _loss(classes: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return math.fsum(options[index][1] for options, index in zip(classes, choice, strict=True))


def _table(classes: Sequence[Sequence[Option]]) -> tuple[Floats, Floats]:
    """What each option saves and loses, a row for each class; missing ones lose infinitely."""
    saved = np.zeros((len(classes), max(map(len, classes))))
    loss = np.full_like(saved, math.inf)
    for row, options in enumerate(classes):
        saved[row, : len(options)], loss[row, : len(options)] = zip(*options, strict=True)
    return saved, loss


def _relaxed(saved: Floats, loss: Floats, needed: int) -> tuple[float, list[int]]:
    """The smallest price of what is saved at which every class, choosing for itself, saves enough; and the choices."""

    def chosen(price: float) -> tuple[Indices, float]:
        cost = loss - price * saved
        cheapest = cost <= cost.min(1, keepdims=True)
        choice = np.where(cheapest, saved, -1.0).argmax(1)
        return choice, saved[np.arange(len(saved)), choice].sum()

    choice, enough = chosen(0.0)
    if enough >= needed:
        return 0.0, choice.tolist()
    high = 2 * loss[np.isfinite(loss)].max()  # one element more is worth more than any loss
    low = high * 1e-60
    while high > low * (1 + 1e-13):
        middle = math.sqrt(low) * math.sqrt(high)
        if not low < middle < high:
            break
        low, high = (low, middle) if chosen(middle)[1] >= needed else (middle, high)
    return high, chosen(high)[0].tolist()


def _improved(
    classes: Sequence[Sequence[Option]], needed: int, price: float, relaxed: list[int], best: list[int]
) -> list[int]:
    """The best choice that leaves the relaxed one in some classes.

    A choice loses ``bound + regret + price * (saved - needed)``, where ``regret`` is what its options lose more than
    the relaxed ones at the given price.
    """
    saved, loss = _table(classes)
    rows = np.arange(len(classes))
    cost = loss - price * saved
    regrets = cost - cost[rows, relaxed][:, None]
    gains = saved - saved[rows, relaxed][:, None]
    bound = cost[rows, relaxed].sum() + price * needed
    rounding = _ROUNDING * (abs(bound) + price * needed)
    slack = _loss(classes, best) - bound
    others = regrets.copy()
    others[rows, relaxed] = math.inf
    spare, regret = np.array([saved[rows, relaxed].sum() - needed]), np.zeros(1)
    path: list[tuple[int, Indices, Indices]] = []
    found: tuple[int, int] | None = None
    for row in np.argsort(others.min(1), kind="stable").tolist():
        possible = np.flatnonzero(regrets[row] <= slack + rounding)
        if len(possible) < 2:
            continue
        spare = (spare[:, None] + gains[row, possible]).ravel()
        regret = (regret[:, None] + regrets[row, possible]).ravel()
        kept = _undominated(spare, regret + price * spare, regret, slack + rounding)
        spare, regret = spare[kept], regret[kept]
        path.append((row, kept // len(possible), possible[kept % len(possible)]))
        excess = np.where(spare >= 0, regret + price * spare, math.inf)
        if len(excess) and excess.min() < slack - rounding:
            found = len(path), int(excess.argmin())
            slack = float(excess.min())
    return best if found is None else _followed(path[: found[0]], found[1], relaxed)


def _undominated(spare: Floats, excess: Floats, regret: Floats, limit: float) -> Indices:
    """Which choices lose less than all that save as much, and may still become the best."""
    order = np.lexsort((excess, -spare))
    order = order[regret[order] <= limit]
    least_before = np.minimum.accumulate(np.append(math.inf, excess[order]))[:-1]
    kept = order[excess[order] < least_before]
    if len(kept) > LARGEST_FRONTIER:
        kept = kept[np.argpartition(regret[kept], LARGEST_FRONTIER)[:LARGEST_FRONTIER]]
    return kept


def _followed(path: Sequence[tuple[int, Indices, Indices]], at: int, relaxed: list[int]) -> list[int]:
    """The choice at the end of a path."""
    choice = list(relaxed)
    for row, parents, options in reversed(path):
        choice[row] = int(options[at])
        at = int(parents[at])
    return choice
