"""Choosing a form for each second moment from the SNR that was measured: by a cutoff, or by a budget.

Source of the cutoff rule: arXiv 2503.01843 (the candidate with the highest averaged SNR, if strictly above a cutoff).
The budget is a knapsack with one choice for each matrix: save enough elements, lose as little as possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from slimadam.layers.name_patterns import BIAS, NORM, canonical_name, owner_of, role_from_name
from slimadam.measurement.history import SNRHistory
from slimadam.state.rule import FACTORED, FLOAT8, MAX_NDIM, Rule, Source

Forms = Literal["mean", "best", "closest"]

_MARGIN: Final = 3.0
"""Factor of the cutoff for averages where one byte for each element is the alternative.

Row and column averages of embeddings do with the cutoff itself (``python -m benchmarks.ablation``).
"""
_SMALLEST_SNR: Final = 1e-100
"""Nothing that loses more is chosen by budget."""
_LARGEST_FRONTIER: Final = 4096
"""Choices followed at a time, the most promising; where there are more, a slightly better one may be missed."""
_ROUNDING: Final = 1e-12


class _Option(NamedTuple):
    snr: float
    saved: int
    rule: Rule


def check_choice(cutoff: float, forms: str, budget: float | None = None) -> None:
    """Raise :class:`ValueError` where an argument that a plan is chosen by is out of range.

    Args:
        cutoff: SNR that a candidate must exceed.
        forms: ``"mean"``, ``"best"`` or ``"closest"``.
        budget: Share of second moments to save, if any.
    """
    if not _is_number(cutoff) or not 0 <= cutoff < math.inf:
        raise ValueError(f"cutoff={cutoff!r} must be a number >= 0")
    if forms not in get_args(Forms):
        raise ValueError(f"forms={forms!r} must be 'mean', 'best' or 'closest'")
    if budget is not None and not (_is_number(budget) and 0 <= budget <= 1):
        raise ValueError(f"budget={budget!r} must be a share in 0..1, or None")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_keep(keep: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of ``keep`` as a tuple; raise :class:`ValueError` if it is no sequence of texts."""
    patterns = tuple(keep) if isinstance(keep, Iterable) and not isinstance(keep, str) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"keep={keep!r} must be a list or tuple of patterns, such as ('*norm*',)")
    return patterns  # type: ignore[return-value]  # checked above


def choose(
    history: SNRHistory, cutoff: float, budget: float | None, forms: Forms, keep: Iterable[str]
) -> dict[str, Rule]:
    """Choose a rule for each key of a history.

    Args:
        history: The measurements.
        cutoff: As in :meth:`CompressionPlan.from_snr`, as are the errors.
        budget: As there.
        forms: As there.
        keep: As there.
    """
    check_choice(cutoff, forms, budget)
    keep = check_keep(keep)
    if not history:
        raise ValueError("the SNR history is empty: no Adam-like optimizer was measured")
    for pattern in idle_patterns(keep, history):
        raise ValueError(f"keep: no parameter has the name or role {pattern!r}; correct or remove the pattern")
    rules, undecided = _measured_rules(history), {}
    for key, rule in rules.items():
        kept = keep_full(rule, next((pattern for pattern in keep if _matches(pattern, key, rule, history)), None))
        if kept is None:
            undecided[key] = rule
        rules[key] = kept or rule
    if budget is None:
        return rules | {key: choose_by_cutoff(rule, cutoff, forms) for key, rule in undecided.items()}
    return rules | _choose_by_budget(undecided, sum(map(_elements, rules.values())), budget, forms)


def idle_patterns(keep: Iterable[str], history: SNRHistory) -> list[str]:
    """Return the patterns that name nothing measured.

    Args:
        keep: Patterns as in :meth:`CompressionPlan.from_snr`.
        history: The measurements.
    """
    rules = _measured_rules(history)
    return [pattern for pattern in keep if not any(_matches(pattern, key, rules[key], history) for key in rules)]


def _measured_rules(history: SNRHistory) -> dict[str, Rule]:
    return {
        key: Rule(
            shape=measured.shape,
            snr=measured.average(),
            role=measured.role or (measured.part.label if measured.part else role_from_name(key, len(measured.shape))),
            part=measured.part,
            batch_dims=measured.batch_dims,
            fan_in=measured.fan_in,
            source=Source.MEASURED,
        )
        for key, measured in history.items()
    }


def _matches(pattern: str, key: str, rule: Rule, history: SNRHistory) -> bool:
    """Match a pattern with a key, the names of its parameter, or its role; brackets at its end with a part's label."""
    names = {owner_of(key, rule.part), *history[key].all_names}
    if pattern in (*names, key, rule.role):
        return True
    pattern = canonical_name(pattern)
    owner_pattern, bracket, label_pattern = pattern.removesuffix("]").rpartition("[")
    if not bracket or not pattern.endswith("]"):
        return any(fnmatchcase(name, pattern) for name in (*names, key))
    named = any(fnmatchcase(name, owner_pattern) for name in names)
    return named and rule.part is not None and fnmatchcase(rule.part.label, label_pattern)


def keep_full(rule: Rule, kept: str | None) -> Rule | None:
    """Return a rule that stays in full whatever was measured, with the reason; None where the SNR decides.

    Args:
        rule: A rule in full.
        kept: The pattern of ``keep`` that names it, if any.
    """
    if kept is not None:
        return replace(rule, reason=f"kept in full as asked (keep={kept!r})", source=Source.USER)
    if len(rule.shape or ()) < 2:
        return replace(rule, reason="fewer than two dimensions: nothing worth saving", source=Source.DEFAULT)
    if rule.role in (NORM, BIAS):
        return replace(rule, reason=f"{rule.role}: never compressed by default", source=Source.DEFAULT)
    return None


def stays_full(key: str, rule: Rule, keep: Iterable[str], names: Sequence[str]) -> bool:
    """Return whether a parameter, or part, stays in full whatever is measured.

    Args:
        key: Its name.
        rule: Its rule, in full.
        keep: As in :meth:`CompressionPlan.from_snr`.
        names: All names of the parameter.
    """
    known = SNRHistory()
    known.add(0, key, rule, {}, names)
    return keep_full(rule, next((pattern for pattern in keep if _matches(pattern, key, rule, known)), None)) is not None


def choose_by_cutoff(rule: Rule, cutoff: float, forms: Forms) -> Rule:
    """Choose the measured candidate with the highest SNR, if it is strictly above the cutoff.

    With ``forms="closest"`` the factored form is chosen where its SNR is above three times the cutoff (of embeddings,
    the cutoff), else the best other candidate above three times the cutoff, else one byte for each element.

    Args:
        rule: A rule in full, with what was measured.
        cutoff: As in :meth:`CompressionPlan.from_snr`.
        forms: As there.
    """
    options = _options(rule, forms)
    if not options:
        return replace(rule, reason=_why_without_options(rule), source=Source.MEASURED)
    if forms == "closest":
        return _choose_closest(rule, cutoff, options)
    best = max(options, key=_rank)
    label = best.rule.stored_as.describe()
    if best.snr > cutoff:
        has = "have" if best.rule.form == FACTORED else "has"
        reason = f"{label} {has} the highest SNR, {best.snr:.3g}, above the cutoff {cutoff:g}"
        return replace(best.rule, reason=reason, source=Source.MEASURED)
    reason = f"the highest SNR, {best.snr:.3g} ({label}), is not above the cutoff {cutoff:g}"
    return replace(rule, reason=reason, source=Source.MEASURED)


def _choose_closest(rule: Rule, cutoff: float, options: Sequence[_Option]) -> Rule:
    """Choose row and column averages, else another average, else one byte for each element."""
    margin = margin_of(rule)
    factored = [one for one in options if one.rule.form == FACTORED]
    others = [one for one in options if one.rule.form != FACTORED]
    tried = []
    for some, factor in ((factored, margin), (others, _MARGIN)):
        if some:
            best = max(some, key=_rank)
            label = f"{best.rule.stored_as.describe()}, SNR {best.snr:.3g}"
            needed = f"above {factor * cutoff:g}" + (f" ({factor:g} x the cutoff {cutoff:g})" if factor != 1 else "")
            if best.snr > factor * cutoff:
                return replace(best.rule, reason=f"{label}: {needed}", source=Source.MEASURED)
            tried.append(f"{label}: not {needed}")
    return replace(rule, form=FLOAT8, reason="; ".join(["one byte for each element", *tried]), source=Source.MEASURED)


def margin_of(rule: Rule) -> float:
    """Return by what factor the SNR of row and column averages must exceed the cutoff with ``forms="closest"``."""
    return 1.0 if "embedding" in rule.role else _MARGIN


def _options(rule: Rule, forms: Forms) -> list[_Option]:
    """Return the measured candidates that save anything."""
    found = []
    for candidate, snr in rule.snr.items():
        if candidate != FACTORED or forms != "mean":
            option = rule.stored_by(candidate)
            found.append(_Option(snr, _elements(rule) - option.stored_elements(rule.shape or ()), option))
    return [option for option in found if option.saved > 0]


def _rank(option: _Option) -> tuple[float, int]:
    return option.snr, option.saved


def _elements(rule: Rule) -> int:
    return math.prod(rule.shape or ())


def _why_without_options(rule: Rule) -> str:
    if not rule.snr and rule.shape is not None and len(rule.shape) <= MAX_NDIM:
        return "nothing finite was measured: its second moment was NaN or infinite each time, or had no gradient"
    return "no candidate was measured that would save anything"


def _choose_by_budget(undecided: Mapping[str, Rule], elements: int, budget: float, forms: Forms) -> dict[str, Rule]:
    """Save at least a share of all second moments and lose the least.

    What a candidate loses is the noise it averages away, ``elements / SNR``. No plan by cutoff that saves as much loses
    less.
    """
    found = []
    for rule in undecided.values():
        options = [option for option in _options(rule, forms) if option.snr > _SMALLEST_SNR]
        found.append([_Option(math.inf, 0, rule), *options])  # the first: it stays in full
    needed = math.ceil(budget * elements - 1e-9)
    possible = sum(max(option.saved for option in options) for options in found)
    if possible < needed:
        share = possible / elements if elements else 0.0
        raise ValueError(f"budget={budget}: at most {share:.4f} of the second moments can be saved; ask for less")
    classes = [[(option.saved, _elements(option.rule) / option.snr) for option in options] for options in found]
    taken = least_loss(classes, needed, _by_highest_snr(found, needed))
    rules = {}
    for key, options, index in zip(undecided, found, taken, strict=True):
        snr, _, rule = options[index]
        if index:
            reason = f"{rule.stored_as.describe()}, SNR {snr:.3g}: part of the cheapest way to save {budget:.1%}"
        elif len(options) > 1:
            reason = f"stays in full: the budget of {budget:.1%} is met at less loss elsewhere"
        else:
            reason = _why_without_options(rule)
        rules[key] = replace(rule, reason=reason)
    return rules


def _by_highest_snr(found: Sequence[Sequence[_Option]], needed: int) -> list[list[int]]:
    """Return the choices by the highest cutoff at which enough is saved, if there is one."""
    best = [max(options[1:], key=_rank, default=options[0]) for options in found]
    taken, saved = [0] * len(found), 0
    for at in sorted(range(len(found)), key=lambda at: -best[at].snr):
        if saved < needed:
            taken[at] = found[at].index(best[at])
            saved += best[at].saved
    return [taken] if saved >= needed else []


def least_loss(
    classes: Sequence[Sequence[tuple[int, float]]], needed: int, known: Iterable[Sequence[int]] = ()
) -> list[int]:
    """Return the option of each class, by index, that together save at least ``needed`` and lose the least.

    Each element saved gets the smallest price at which every class, choosing the option of the lowest cost
    ``loss - price * saved`` for itself, saves enough. A choice loses ``bound + regret + price * (saved - needed)``,
    where ``regret`` is what its options cost more than the cheapest ones. The classes are gone through with all choices
    that no other dominates and whose regret leaves room below the best loss known.

    Args:
        classes: What each option saves and loses. One is ``(0, 0.0)``; all classes together can save what is needed.
        needed: What must be saved.
        known: Choices that save enough, which the result is at least as good as.
    """
    if not classes:
        return []
    rows = np.arange(len(classes))
    saved = np.zeros((len(classes), max(map(len, classes))))
    loss = np.full_like(saved, math.inf)  # of options that are missing
    for row, options in enumerate(classes):
        saved[row, : len(options)], loss[row, : len(options)] = zip(*options, strict=True)

    def cheapest(price: float) -> NDArray[np.int64]:
        cost = loss - price * saved
        indices: NDArray[np.int64] = np.where(cost <= cost.min(1, keepdims=True), saved, -1.0).argmax(1)
        return indices

    def total_loss(choice: Sequence[int]) -> float:
        return math.fsum(options[index][1] for options, index in zip(classes, choice, strict=True))

    price = 0.0
    if saved[rows, cheapest(price)].sum() < needed:
        price = 2 * loss[np.isfinite(loss)].max()  # one element more is worth more than any loss
        low = price * 1e-60
        while low * (1 + 1e-13) < price and low < (middle := math.sqrt(low) * math.sqrt(price)) < price:
            if saved[rows, cheapest(middle)].sum() >= needed:
                price = middle
            else:
                low = middle
    choice = cheapest(price)
    best = min([[*map(int, choice)], *map(list, known)], key=total_loss)

    cost = loss - price * saved
    regrets = cost - cost[rows, choice][:, None]
    gains = saved - saved[rows, choice][:, None]
    bound = cost[rows, choice].sum() + price * needed
    rounding = _ROUNDING * (abs(bound) + price * needed)
    limit = total_loss(best) - bound
    spare, regret = np.array([saved[rows, choice].sum() - needed]), np.zeros(1)
    path, length, at = [], 0, 0
    for row in np.argsort(np.sort(regrets)[:, :2].sum(1), kind="stable"):  # by the regret of the second cheapest
        possible = np.flatnonzero(regrets[row] <= limit + rounding)
        if len(possible) < 2:
            continue
        spare = (spare[:, None] + gains[row, possible]).ravel()
        regret = (regret[:, None] + regrets[row, possible]).ravel()
        excess = regret + price * spare
        order = np.lexsort((excess, -spare))
        order = order[regret[order] <= limit + rounding]
        kept = order[excess[order] < np.minimum.accumulate(np.append(math.inf, excess[order]))[:-1]]
        if len(kept) > _LARGEST_FRONTIER:
            kept = kept[np.argpartition(regret[kept], _LARGEST_FRONTIER)[:_LARGEST_FRONTIER]]
        spare, regret = spare[kept], regret[kept]
        path.append((row, kept // len(possible), possible[kept % len(possible)]))
        enough = np.where(spare >= 0, excess[kept], math.inf)
        if enough.min(initial=math.inf) < limit - rounding:
            limit, length, at = enough.min(), len(path), int(enough.argmin())
    if not length:
        return best
    for row, parents, options_taken in reversed(path[:length]):
        choice[row] = options_taken[at]
        at = int(parents[at])
    return [*map(int, choice)]
