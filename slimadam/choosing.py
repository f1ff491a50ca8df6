"""Choosing a form for each second moment from the SNR that was measured.

Source of the cutoff rule: arXiv 2503.01843 (the candidate with the highest averaged SNR, if strictly above a cutoff).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Final, Literal, get_args

from slimadam.history import ParameterSNR, SNRHistory
from slimadam.parts import owner_of
from slimadam.roles import BIAS, NORM, canonical_name, role_from_name
from slimadam.rules import Rule
from slimadam.snr import FACTORED, MAX_NDIM, Candidate

Forms = Literal["mean", "best"]

KEPT: Final = "kept in full as asked"
EXPANDED: Final = "returned to a full second moment by expand()"


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


def refuse_idle(keep: Iterable[str], history: SNRHistory) -> None:
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
        return replace(best, reason=f"{label} has the highest SNR, {value:.3g}, above the cutoff {cutoff:g}")
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
    matrix weighs more than that of a small one. This is a knapsack with one choice for each parameter: the
    steps along each parameter's convex hull of loss against saving are taken from the cheapest on, and the last
    is exchanged for the cheapest single change that also meets the budget.

    Args:
        undecided: Rules of the parameters that may be compressed, with what was measured.
        elements: Second-moment elements of all parameters, those that stay in full included.
        budget: Share to save, in 0..1.
        forms: As in :meth:`CompressionPlan.from_snr`.

    Raises:
        ValueError: Not even the smallest forms save so much; says how much they do.
    """
    curves = {name: _curve(rule, forms) for name, rule in undecided.items()}
    needed = math.ceil(budget * elements - 1e-9)
    possible = sum(curve[-1][0] for curve in curves.values())
    if possible < needed:
        share = possible / elements if elements else 0.0
        raise ValueError(f"budget={budget}: at most {share:.4f} of the second moments can be saved; ask for less")
    taken = _greedy(curves, needed)
    chosen = {}
    for name, rule in undecided.items():
        _, loss, best = curves[name][taken[name]]
        if best is rule:
            chosen[name] = replace(
                rule, reason=f"stays in full: the budget of {budget:.1%} is met at less loss elsewhere"
            )
        else:
            value = _elements(rule) / loss if loss else math.inf
            label = _describe_rule(best)
            reason = f"{label}, SNR {value:.3g}: part of the cheapest way to save {budget:.1%}"
            chosen[name] = replace(best, reason=reason)
    return chosen


Point = tuple[int, float, Rule]


def _elements(rule: Rule) -> int:
    return math.prod(rule.shape or ())


def _curve(rule: Rule, forms: Forms) -> list[Point]:
    """``(saved, loss, rule)`` along the lower convex hull, from nothing saved on."""
    total = _elements(rule)
    points: list[Point] = [(0, 0.0, rule)]
    for value, option in _options(rule, forms):
        loss = 0.0 if math.isinf(value) else total / value if value > 0 else math.inf
        if math.isfinite(loss):
            points.append((total - option.stored_elements(rule.shape or ()), loss, option))
    points.sort(key=lambda point: (point[0], point[1]))
    hull: list[Point] = []
    for point in points:
        if hull and point[0] == hull[-1][0]:
            continue
        while hull and point[1] <= hull[-1][1] and len(hull) > 1:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: Point, second: Point) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def _greedy(curves: Mapping[str, list[Point]], needed: int) -> dict[str, int]:
    """How far to go along each curve."""
    taken = dict.fromkeys(curves, 0)
    saved = 0
    steps = [(_slope(curve[0], curve[1]), name) for name, curve in curves.items() if len(curve) > 1]
    heapq.heapify(steps)
    while saved < needed:
        _, name = heapq.heappop(steps)
        curve, at = curves[name], taken[name]
        gain = curve[at + 1][0] - curve[at][0]
        if saved + gain >= needed:
            name, to = _cheapest_finish(curves, taken, needed - saved)
            taken[name] = to
            break
        taken[name] = at + 1
        saved += gain
        if at + 2 < len(curve):
            heapq.heappush(steps, (_slope(curve[at + 1], curve[at + 2]), name))
    return taken


def _cheapest_finish(curves: Mapping[str, list[Point]], taken: Mapping[str, int], missing: int) -> tuple[str, int]:
    """The single change that saves what is still missing at the least loss."""
    options = [
        (point[1] - curve[taken[name]][1], name, index)
        for name, curve in curves.items()
        for index, point in enumerate(curve)
        if point[0] - curve[taken[name]][0] >= missing
    ]
    _, name, index = min(options)
    return name, index


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
