"""Choosing a form for each second moment from the SNR that was measured.

Source of the cutoff rule: arXiv 2503.01843 (the candidate with the highest averaged SNR, if strictly above a cutoff).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from slimadam.layers.roles import BIAS, NORM, canonical_name, role_from_name
from slimadam.layers.splits import owner_of
from slimadam.measurement.history import ParameterSNR, SNRHistory
from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, Rule

Forms = Literal["mean", "best"]

KEPT: Final = "kept in full as asked"
EXPANDED: Final = "returned to a full second moment by expand()"

SMALLEST_SNR: Final = 1e-100
"""Nothing that loses more is chosen by budget."""


Choice = tuple[int, float, Rule]
LARGEST_FRONTIER: Final = 4096
"""Choices followed at a time, the most promising; where there are more, a slightly better one may be missed."""
_ROUNDING: Final = 1e-12
Option = tuple[int, float]
"""What it saves, and what it loses."""
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def check_choice(cutoff: float, forms: str, budget: float | None = None) -> None:
    """Check what a plan is chosen by.

    Raises:
        ValueError: An option is out of range.
    """
    if not isinstance(cutoff, (int, float)) or isinstance(cutoff, bool) or not 0 <= cutoff < math.inf:
        raise ValueError(f"cutoff={cutoff!r} must be a number >= 0")
    if forms not in get_args(Forms):
        raise ValueError(f"forms={forms!r} must be 'mean' or 'best'")
    if budget is not None and (
        not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 <= budget <= 1
    ):
        raise ValueError(f"budget={budget!r} must be a share in 0..1, or None")


def measured_rules(history: SNRHistory) -> dict[str, Rule]:
    """Everything measured, with its averaged SNRs, before anything is decided."""
    return {
        key: Rule(
            shape=measured.shape,
            snr=measured.average(),
            role=measured.role or _role_by_key(key, measured),
            part=measured.part,
            batch_dims=measured.batch_dims,
            fan_in=measured.fan_in,
        )
        for key, measured in history.items()
    }


def _role_by_key(key: str, measured: ParameterSNR) -> str:
    return measured.part.label if measured.part else role_from_name(key, len(measured.shape))


def applicable(keep: Iterable[str], history: SNRHistory) -> tuple[str, ...]:
    """The patterns that name something measured."""
    idle = idle_patterns(keep, history)
    return tuple(pattern for pattern in keep if pattern not in idle)


def check_keep(keep: Iterable[str]) -> tuple[str, ...]:
    """The patterns of what stays in full, as a tuple.

    Raises:
        ValueError: It is no sequence of texts.
    """
    listed = isinstance(keep, Iterable) and not isinstance(keep, str)
    patterns = tuple(keep) if listed else ()
    if not listed or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"keep={keep!r} must be a list or tuple of patterns, such as ('*norm*',)")
    return patterns


def keeps(pattern: str, key: str, rule: Rule, all_names: Iterable[str] = ()) -> bool:
    """Whether a pattern names a piece: by its key, by a name of its parameter, or by its role.

    Brackets at the end of a pattern are those of a key, ``"*.c_attn.weight[key]"``: what is in them is matched with the
    label of a part.

    Args:
        pattern: The pattern, with or without wrapper prefixes.
        key: What the piece goes by.
        rule: Says what it is, and which part.
        all_names: The names of its parameter, where it has several.
    """
    names = {owner_of(key, rule.part), *all_names}
    if pattern in (*names, key, rule.role):
        return True
    pattern = canonical_name(pattern)
    owner_pattern, bracket, label_pattern = pattern.removesuffix("]").rpartition("[")
    if not bracket or not pattern.endswith("]"):
        return any(fnmatchcase(name, pattern) for name in (*names, key))
    named = any(fnmatchcase(name, owner_pattern) for name in names)
    return named and rule.part is not None and fnmatchcase(rule.part.label, label_pattern)


def idle_patterns(keep: Iterable[str], history: SNRHistory) -> list[str]:
    """The patterns that name nothing measured."""
    rules = measured_rules(history)
    return [
        pattern
        for pattern in keep
        if not any(keeps(pattern, key, rule, history[key].all_names) for key, rule in rules.items())
    ]


def check_patterns_match(keep: Iterable[str], history: SNRHistory) -> None:
    """Refuse patterns that name nothing.

    Raises:
        ValueError: Names the pattern.
    """
    for pattern in idle_patterns(keep, history):
        raise ValueError(f"keep: no parameter has the name or role {pattern!r}; correct or remove the pattern")


def choose_by_cutoff(undecided: Mapping[str, Rule], cutoff: float, forms: Forms) -> dict[str, Rule]:
    """For each parameter the candidate with the highest SNR, if it is strictly above the cutoff."""
    return {name: _choose(rule, cutoff, forms) for name, rule in undecided.items()}


def keep_full(rule: Rule, kept: str | None) -> Rule | None:
    """The rule with the reason why it stays in full whatever was measured, or None."""
    if kept is not None:
        return replace(rule, reason=f"{KEPT} (keep={kept!r})")
    if len(rule.shape or ()) < 2:
        return replace(rule, reason="fewer than two dimensions: nothing worth saving")
    if rule.role in (NORM, BIAS):
        return replace(rule, reason=f"{rule.role}: never compressed by default")
    return None


def asked_for(rule: Rule) -> bool:
    """Whether a rule is in full because somebody asked for it."""
    return rule.form == "full" and rule.reason.startswith((KEPT, EXPANDED))


def _choose(rule: Rule, cutoff: float, forms: Forms) -> Rule:
    options = _options(rule, forms)
    if not options:
        return replace(rule, reason=_why_without_options(rule))
    shape = rule.shape or ()
    value, best = max(options, key=lambda option: (option[0], -option[1].stored_elements(shape)))
    label = _describe_rule(best)
    if value > cutoff:
        has = "have" if best.form == FACTORED else "has"
        return replace(best, reason=f"{label} {has} the highest SNR, {value:.3g}, above the cutoff {cutoff:g}")
    return replace(rule, reason=f"the highest SNR, {value:.3g} ({label}), is not above the cutoff {cutoff:g}")


def _why_without_options(rule: Rule) -> str:
    if not rule.snr and rule.shape is not None and len(rule.shape) <= MAX_NDIM:
        return "nothing finite was measured: its second moment was NaN or infinite each time, or had no gradient"
    return "no candidate was measured that would save anything"


def _options(rule: Rule, forms: Forms) -> list[tuple[float, Rule]]:
    """SNR and rule of each measured candidate that saves anything."""
    shape = rule.shape or ()
    found = [
        (value, _rule_for_candidate(rule, candidate))
        for candidate, value in rule.snr.items()
        if forms == "best" or candidate != FACTORED
    ]
    return [option for option in found if option[1].stored_elements(shape) < math.prod(shape)]


def choose_by_budget(undecided: Mapping[str, Rule], elements: int, budget: float, forms: Forms) -> dict[str, Rule]:
    """Save at least a share of all second moments and lose the least.

    What a candidate loses is the noise it averages away, ``elements / SNR``, so that halving the SNR of a large
    matrix weighs more than that of a small one. No plan by cutoff that saves as much loses less.

    Args:
        undecided: Rules of the parameters that may be compressed, with what was measured.
        elements: Second-moment elements of all parameters, those that stay in full included.
        budget: Share to save, in 0..1.
        forms: As in :meth:`CompressionPlan.from_snr`.

    Raises:
        ValueError: Not even the smallest forms save so much; says how much they do.
    """
    choices = {name: _choices(rule, forms) for name, rule in undecided.items()}
    needed = math.ceil(budget * elements - 1e-9)
    possible = sum(max(saved for saved, _, _ in found) for found in choices.values())
    if possible < needed:
        share = possible / elements if elements else 0.0
        raise ValueError(f"budget={budget}: at most {share:.4f} of the second moments can be saved; ask for less")
    classes = [[(saved, loss) for saved, loss, _ in found] for found in choices.values()]
    taken = least_loss(classes, needed, _by_highest_snr(list(choices.values()), needed))
    return {
        name: _with_reason(rule, found[index], budget, len(found) > 1)
        for (name, rule), found, index in zip(undecided.items(), choices.values(), taken, strict=True)
    }


def _with_reason(rule: Rule, choice: Choice, budget: float, could_save: bool) -> Rule:
    _, loss, best = choice
    if best is rule:
        elsewhere = f"stays in full: the budget of {budget:.1%} is met at less loss elsewhere"
        return replace(rule, reason=elsewhere if could_save else _why_without_options(rule))
    value = _elements(rule) / loss if loss else math.inf
    reason = f"{_describe_rule(best)}, SNR {value:.3g}: part of the cheapest way to save {budget:.1%}"
    return replace(best, reason=reason)


def _elements(rule: Rule) -> int:
    return math.prod(rule.shape or ())


def _choices(rule: Rule, forms: Forms) -> list[Choice]:
    """``(saved, loss, rule)`` of staying in full, then of each candidate."""
    total = _elements(rule)
    found: list[Choice] = [(0, 0.0, rule)]
    for value, option in _options(rule, forms):
        if value > SMALLEST_SNR:
            found.append((total - option.stored_elements(rule.shape or ()), total / value, option))
    return found


def _by_highest_snr(choices: Sequence[Sequence[Choice]], needed: int) -> list[list[int]]:
    """What the highest cutoff chooses at which enough is saved, if there is one."""
    best = [min(range(len(found)), key=lambda i: (i == 0, found[i][1], -found[i][0])) for found in choices]
    noise = [found[index][1] / max(1, _elements(found[0][2])) for found, index in zip(choices, best, strict=True)]
    taken, saved = [0] * len(choices), 0
    for at in sorted(range(len(choices)), key=noise.__getitem__):
        if saved < needed:
            taken[at] = best[at]
            saved += choices[at][best[at]][0]
    return [taken] if saved >= needed else []


def _describe_rule(rule: Rule) -> str:
    return describe_candidate(FACTORED if rule.form == FACTORED else rule.dims)


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in words, for reports and reasons."""
    if candidate == FACTORED:
        return "row and column averages"
    return "averaging over dimension" + ("s " if len(candidate) > 1 else " ") + ", ".join(map(str, candidate))


def _rule_for_candidate(rule: Rule, candidate: Candidate) -> Rule:
    if candidate == FACTORED:
        return replace(rule, form="factored", dims=())
    return replace(rule, form="mean", dims=candidate)


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
