"""Carrying a plan to another model of the same family: by layer role, averaged over depth (arXiv 2503.01843)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import nn

from slimadam.choosing import Forms, choose_by_cutoff, keep_full
from slimadam.errors import PlanError
from slimadam.fused import pieces_of, refuse_unmatched
from slimadam.parts import Parts, Piece, key_of
from slimadam.roles import UNKNOWN, canonical_name, role_from_name
from slimadam.rules import Rule, full_rule
from slimadam.snr import FACTORED, average_snr

NO_COUNTERPART: Final = "the plan has no "

Kind = tuple[str, int]


def rules_for_model(
    rules: Mapping[str, Rule], cutoff: float | None, model: nn.Module, parts: Mapping[str, Parts]
) -> dict[str, Rule]:
    """A rule for each logical matrix of a model, from rules that were chosen for another.

    Layers of the same role and number of dimensions count as one kind; those of unknown role by their name without
    layer numbers. With a cutoff, the SNR of each candidate is averaged over the layers of a kind and decides anew;
    without one (chosen by budget, or not measured) the most common rule of the kind holds.

    Args:
        rules: The rules to carry over, by key.
        cutoff: SNR cutoff that they were chosen with, if any.
        model: The model to carry them to.
        parts: What its parameters are made of, where the model does not say.

    Raises:
        PlanError: Nothing carries over, or a pattern of ``parts`` matches nothing.
    """
    kinds: dict[Kind, list[Rule]] = {}
    for key, rule in rules.items():
        kinds.setdefault(_kind(key, rule.role, _ndim(key, rule)), []).append(rule)
    found = pieces_of(model, parts)
    refuse_unmatched(parts, found)
    carried = {
        key_of(name, piece.part): _carried(name, piece, kinds, cutoff)
        for name, pieces in found.items()
        for piece in pieces
    }
    matrices = [rule for rule in carried.values() if len(rule.shape or ()) > 1]
    if matrices and all(rule.reason.startswith(NO_COUNTERPART) for rule in matrices):
        raise PlanError(
            f"the plan has no kind of layer in common with {type(model).__name__}; calibrate a model of its family"
        )
    return carried


def _ndim(key: str, rule: Rule) -> int:
    """Number of dimensions; rules that fit any shape are taken to be for matrices."""
    return len(rule.shape) if rule.shape is not None else max([2, *(dim + 1 for dim in rule.dims)])


def _kind(key: str, role: str, ndim: int) -> Kind:
    role = role or role_from_name(key, ndim)
    return (re.sub(r"(?<![^.])\d+(?![^.])", "*", canonical_name(key)) if role == UNKNOWN else role), ndim


def _carried(name: str, piece: Piece, kinds: Mapping[Kind, Sequence[Rule]], cutoff: float | None) -> Rule:
    key, ndim = key_of(name, piece.part), len(piece.shape)
    kind = _kind(key, piece.role.role, ndim)
    if piece.part is not None and piece.part.view == piece.part.of and kind not in kinds:
        kind = _kind(name, "", ndim)  # rules for the weight as a whole
    empty = full_rule(piece, f"{NO_COUNTERPART}{kind[0].replace('_', ' ')}")
    found = [_in_layout_of(piece, rule) for rule in kinds.get(kind, [])]
    kept = keep_full(empty, None)
    if kept is not None or not found:
        return kept or empty
    origin = f"carried over from {len(found)} {kind[0].replace('_', ' ')}"
    if all(rule.form == "full" for rule in found):
        return replace(empty, snr=average_snr(rule.snr for rule in found), reason=f"{origin}, all in full")
    if cutoff is None or not any(rule.snr for rule in found):
        return _most_common(empty, found, origin)
    forms: Forms = "best" if any(rule.form == FACTORED for rules in kinds.values() for rule in rules) else "mean"
    chosen = choose_by_cutoff({key: replace(empty, snr=average_snr(rule.snr for rule in found))}, cutoff, forms)[key]
    return replace(chosen, reason=f"{origin}: {chosen.reason}")


def _in_layout_of(piece: Piece, rule: Rule) -> Rule:
    """The rule for a matrix that is stored the other way round, where both ways are known."""
    if not rule.fan_in or not piece.role.fan_in or rule.fan_in == piece.role.fan_in or rule.shape is None:
        return rule
    dims = range(rule.batch_dims, len(rule.shape))
    before = [*rule.fan_in, *(dim for dim in dims if dim not in rule.fan_in)]
    after = [*piece.role.fan_in, *(dim for dim in dims if dim not in piece.role.fan_in)]
    if len(rule.fan_in) != len(piece.role.fan_in) or sorted(before) != sorted(after):
        return rule
    moved = dict(zip(before, after, strict=True))

    def move(candidate: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(moved.get(dim, dim) for dim in candidate))

    snr = {key if key == FACTORED else move(key): value for key, value in rule.snr.items()}
    return replace(rule, dims=move(rule.dims), snr=snr)


def _most_common(empty: Rule, found: Sequence[Rule], origin: str) -> Rule:
    ((form, dims), count), *_ = Counter((rule.form, rule.dims) for rule in found).most_common()
    rule = replace(empty, form=form, dims=dims, reason=f"{origin}: the rule of {count} of them")
    shape = empty.shape or ()
    if rule.stored_elements(shape) >= math.prod(shape):
        return replace(empty, reason=f"{origin}, whose rule saves nothing here")
    return rule
