"""Carries a plan to another model of the same family: by layer role, averaged over depth (arXiv 2503.01843)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from slimadam.layers.name_patterns import MATRIX_ROLES, UNKNOWN, canonical_name, key_of, names_of, role_from_name
from slimadam.layers.splits import Part, Piece, Split, pieces_of_target
from slimadam.measurement.snr import average_snr
from slimadam.plans.selection import Forms, choose_by_cutoff, keep_full
from slimadam.state.rule import FACTORED, FLOAT8, Rule, Source, full_rule
from slimadam.utils.errors import PlanError

_Kind = tuple[str, int]


def rules_for_model(
    rules: Mapping[str, Rule], cutoff: float | None, model: nn.Module, parts: Mapping[str, Split] | None
) -> dict[str, Rule]:
    """Make a rule for each logical matrix of a model, as :meth:`CompressionPlan.for_model` says.

    Layers of the same role and number of dimensions count as one kind; those of unknown role by their name without
    layer numbers. Parameters that somebody asked to keep in full, or to expand, stay in full under the same name.

    Args:
        rules: The rules to carry over, by key.
        cutoff: SNR cutoff that they were chosen with, if any.
        model: The model to carry them to.
        parts: The logical matrices in its parameters, where the model does not say.
    """
    found = pieces_of_target(model, parts)
    kinds: dict[_Kind, list[Rule]] = {}
    kept: dict[str, Rule] = {}
    for key, rule in rules.items():
        # Rules that fit any shape are taken to be for matrices.
        ndim = len(rule.shape) if rule.shape is not None else max([2, *(dim + 1 for dim in rule.dims)])
        kinds.setdefault(_kind(key, rule.role, ndim, rule.part), []).append(rule)
        if _asked_for(rule):
            kept[canonical_name(key)] = rule
    all_names, parameters = names_of(model), dict(model.named_parameters())
    carried = {}
    for name, pieces in found.items():
        names = all_names[parameters[name]]
        for piece in pieces:
            asked = next((kept[key] for key in (key_of(one, piece.part) for one in names) if key in kept), None)
            carried[key_of(name, piece.part)] = (
                full_rule(piece, asked.reason, asked.source) if asked else _carried(names, piece, kinds, cutoff)
            )
    matrices = [rule for rule in carried.values() if len(rule.shape or ()) > 1]
    if matrices and all(rule.source == Source.NO_COUNTERPART for rule in matrices):
        raise PlanError(
            f"the plan has no kind of layer in common with {type(model).__name__}; calibrate a model of its family"
        )
    return carried


def _asked_for(rule: Rule) -> bool:
    return rule.is_full and rule.source in (Source.USER, Source.EXPANDED)


def _kind(key: str, role: str, ndim: int, part: Part | None) -> _Kind:
    role = role or role_from_name(key, ndim)
    says_nothing = role == UNKNOWN if part is None else role not in MATRIX_ROLES  # a label may be any word
    return (re.sub(r"(?<![^.])\d+(?![^.])", "*", canonical_name(key)) if says_nothing else role), ndim


def _kinds_of(names: Sequence[str], piece: Piece) -> list[_Kind]:
    """Return the kinds that a matrix may count as, the best first: for a tied parameter, by each of its names."""
    ndim, role, part = len(piece.shape), piece.role.role, piece.part
    if part is None:
        return [_kind(names[0], role, ndim, None), *(_kind(name, "", ndim, None) for name in names[1:])]
    found = [_kind(key_of(name, part), role, ndim, part) for name in names]
    if part.view == part.of:
        found += [_kind(name, "", ndim, None) for name in names]  # rules for the weight as a whole
    return found


def _carried(names: Sequence[str], piece: Piece, kinds: Mapping[_Kind, Sequence[Rule]], cutoff: float | None) -> Rule:
    possible = _kinds_of(names, piece)
    kind = next((kind for kind in possible if kind in kinds), possible[0])
    words = kind[0].replace("_", " ")
    found = [_in_layout_of(piece, rule) for rule in kinds.get(kind, [])]
    empty = full_rule(piece, f"the plan has no {words}", Source.NO_COUNTERPART)
    kept = keep_full(empty, None)
    if kept is not None or not found:
        return kept or empty
    origin = f"carried over from {len(found)} {'matrix' if len(found) == 1 else 'matrices'} ({words})"
    if kept_count := sum(map(_asked_for, found)):
        origin += f" ({kept_count} of {len(found)} were kept in full as asked)"
    measured = replace(empty, snr=average_snr(rule.snr for rule in found), source=Source.CARRIED)
    if all(rule.is_full for rule in found):
        return replace(measured, reason=f"{origin}, all in full")
    if cutoff is not None and any(rule.snr for rule in found):
        chosen = choose_by_cutoff(measured, cutoff, _forms_of(rule for rules in kinds.values() for rule in rules))
        return replace(chosen, reason=f"{origin}: {chosen.reason}", source=Source.CARRIED)
    ((form, dims), count), *_ = Counter((rule.form, rule.dims) for rule in found).most_common()
    common = replace(measured, form=form, dims=dims, snr={}, reason=f"{origin}: the rule of {count} of them")
    if common.stored_elements(piece.shape) >= math.prod(piece.shape):
        return replace(common, form="full", dims=(), reason=f"{origin}, whose rule saves nothing here")
    return common


def _forms_of(rules: Iterable[Rule]) -> Forms:
    """Return the forms that a plan was chosen among."""
    rules = list(rules)
    if any(rule.form == FLOAT8 for rule in rules):
        return "closest"
    factored = [rule.snr for rule in rules if rule.form == FACTORED]
    if any(snr and max(snr.values()) > snr.get(FACTORED, math.inf) for snr in factored):
        return "closest"
    return "best" if factored else "mean"


def _in_layout_of(piece: Piece, rule: Rule) -> Rule:
    """Transpose the rule for a matrix that is stored the other way round, where both ways are known."""
    if not rule.fan_in or not piece.role.fan_in or rule.fan_in == piece.role.fan_in or rule.shape is None:
        return rule
    dims = range(rule.batch_dims, len(rule.shape))
    before, after = (
        [*fan_in, *(dim for dim in dims if dim not in fan_in)] for fan_in in (rule.fan_in, piece.role.fan_in)
    )
    if len(rule.fan_in) != len(piece.role.fan_in) or sorted(before) != sorted(after):
        return rule
    moved = dict(zip(before, after, strict=True))

    def move(candidate: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(moved.get(dim, dim) for dim in candidate))

    snr = {key if key == FACTORED else move(key): value for key, value in rule.snr.items()}
    return replace(rule, dims=move(rule.dims), snr=snr)
