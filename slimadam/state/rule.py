"""How one parameter's second moment is stored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, get_args

from torch import Tensor

from slimadam.layers.roles import BIAS, NORM, ParameterRole, recommended_dims
from slimadam.layers.splits import Part, Piece, check_parts, owner_of
from slimadam.utils.errors import PlanError, shown

NO_RULE: Final = "the paper has no rule for"
TOO_SMALL: Final = "too small to save anything"
BY_CHOICE: Final = "every matrix factored, by choice"
NOT_SMALLER: Final = "not a matrix that factoring makes smaller"
NO_ELEMENTS: Final = "no elements"

Dims = tuple[int, ...]
Form = Literal["full", "mean", "factored"]


Candidate = tuple[int, ...] | Literal["factored"]
"""Dimensions to average over, or ``"factored"`` for row and column averages."""
FACTORED: Final = "factored"
MAX_NDIM = 8


@dataclass(frozen=True)
class Rule:
    """How one parameter's second moment is stored.

    Attributes:
        dims: Dimensions that share one value (``()`` unless ``form`` is ``"mean"``).
        form: ``"full"`` (as AdamW), ``"mean"`` (averaged over ``dims``) or ``"factored"`` (row and column
            averages, whose product stands in for the matrix).
        shape: Shape of the parameter, or of the part; None in rules that fit any shape.
        snr: The averaged SNR of each candidate that was measured.
        reason: Why, in words.
        role: What the parameter is.
        part: Which part of a parameter the rule is for; None for all of it.
        batch_dims: Number of leading dimensions that count separate matrices (experts, heads): the factored form
            keeps row and column averages of each.
        fan_in: Dimensions that the forward pass sums over, where known: how the parameter is stored.
    """

    dims: tuple[int, ...] = ()
    form: Form = "full"
    shape: tuple[int, ...] | None = None
    snr: Mapping[Candidate, float] = field(default_factory=dict)
    reason: str = ""
    role: str = ""
    part: Part | None = None
    batch_dims: int = 0
    fan_in: tuple[int, ...] = ()

    def state_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the second-moment tensors for a parameter of the given shape.

        One tensor for ``"full"`` and ``"mean"`` (size 1 in ``dims``), two for ``"factored"``: the averages of the
        rows, over all dimensions after the first that is no batch dimension, and of the columns, over that one.
        """
        return tuple(reduced_shape(shape, dims) for dims in self.averaged_dims(len(shape)))

    def averaged_dims(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """For each second-moment tensor, the dimensions it is averaged over."""
        if self.form == FACTORED:
            return tuple(range(self.batch_dims + 1, ndim)), (self.batch_dims,)
        return (self.dims,)

    def stored_elements(self, shape: tuple[int, ...]) -> int:
        """Second-moment elements kept for a parameter of the given shape."""
        return sum(math.prod(kept) for kept in self.state_shapes(shape))

    @property
    def storage(self) -> tuple[Form, Dims, Part | None, int]:
        """What decides how a second moment is stored, without what explains it."""
        return self.form, self.dims, self.part, self.batch_dims

    @property
    def owner_shape(self) -> tuple[int, ...] | None:
        """Shape of the whole parameter."""
        return self.shape if self.part is None else self.part.of

    def take(self, tensor: Tensor) -> Tensor:
        """What the rule is for, of a tensor of the parameter's shape: all of it, or a view of the part."""
        return tensor if self.part is None else self.part.take(tensor)


def reduced_shape(shape: tuple[int, ...], dims: Iterable[int]) -> tuple[int, ...]:
    """``shape`` with size 1 in ``dims``."""
    dims = set(dims)
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


def full_rule(piece: Piece, reason: str) -> Rule:
    """The second moment as AdamW keeps it."""
    return Rule(
        shape=piece.shape,
        reason=reason,
        role=piece.role.role,
        part=piece.part,
        batch_dims=piece.batch_dims,
        fan_in=piece.role.fan_in,
    )


def rule_of_whole(rules: Sequence[Rule], reason: str) -> Rule:
    """One rule that keeps a parameter as AdamW does, in the place of those of its parts."""
    if rules[0].part is None:
        return replace(rules[0], reason=reason)
    return Rule(shape=rules[0].owner_shape, reason=reason)


def paper_rule(piece: Piece) -> Rule:
    """The paper's recommendation for a role, where it has one and it saves anything."""
    dims = recommended_dims(piece.role)
    if not dims:
        return full_rule(piece, f"{NO_RULE} {piece.role.role}")
    if math.prod(reduced_shape(piece.shape, dims)) >= math.prod(piece.shape):
        return full_rule(piece, TOO_SMALL)
    return replace(full_rule(piece, f"the paper's rule for {piece.role.role}"), dims=dims, form="mean")


def factored_rule(piece: Piece) -> Rule:
    """The factored form where it saves anything, the full one elsewhere."""
    shape = piece.shape
    rule = replace(full_rule(piece, BY_CHOICE), form="factored")
    if (
        len(shape) < piece.batch_dims + 2
        or piece.role.role in (NORM, BIAS)
        or rule.stored_elements(shape) >= math.prod(shape)
    ):
        return full_rule(piece, NOT_SMALLER)
    return rule


def resized_rule(rule: Rule, shape: tuple[int, ...]) -> Rule:
    """Return the rule of a whole parameter for another size of it; what the size has decided is decided anew."""
    fan_out = tuple(dim for dim in range(rule.batch_dims, len(shape)) if rule.fan_in and dim not in rule.fan_in)
    piece = Piece(shape, ParameterRole(rule.role, rule.fan_in, fan_out), None, rule.batch_dims)
    if rule.reason in (BY_CHOICE, NOT_SMALLER):
        return factored_rule(piece)
    if rule.form != "full" and 0 in shape:
        return full_rule(piece, NO_ELEMENTS)
    return paper_rule(piece) if rule.reason == TOO_SMALL else replace(rule, shape=shape)


def check_together(name: str, rules: Sequence[Rule]) -> None:
    """Refuse the rules of one parameter that are not exactly one for the whole, or one for each of its parts.

    Raises:
        PlanError: Says which part does not fit, and how.
    """
    parts = [rule.part for rule in rules if rule.part is not None]
    if parts and len(parts) != len(rules):
        raise PlanError(f"{name!r}: the plan has a rule for the whole parameter and one for its part; remove one")
    if parts:
        check_parts(name, parts, parts[0].of)


def fit_rules(name: str, rules: Sequence[Rule], shape: tuple[int, ...]) -> list[Rule]:
    """The rules of one parameter (several if it falls into parts) checked against its actual shape.

    Raises:
        PlanError: The rules were made for another shape, or name a dimension the parameter lacks.
    """
    if rules[0].part is None:
        return [_fit_rule(name, rules[0], shape)]
    check_parts(name, [rule.part for rule in rules if rule.part is not None], shape)
    return in_order(rules)


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """The rules of one parameter in the order in which its parts lie in it, which is that of its state."""
    return sorted(rules, key=lambda rule: rule.part.start if rule.part else 0)


def _fit_rule(name: str, rule: Rule, shape: tuple[int, ...]) -> Rule:
    if rule.shape is not None and rule.shape != shape:
        raise PlanError(
            f"{name!r}: the plan is for shape {rule.shape}, the parameter has {shape}; "
            "calibrate this model, or carry the plan over with plan.for_model(model)"
        )
    fitted = replace(rule, shape=shape)
    check_rule(name, fitted)
    return fitted


def check_rule(name: str, rule: Rule) -> None:
    """Refuse a rule that contradicts itself.

    Raises:
        PlanError: A dimension is out of range, or the form needs another shape.
    """
    if rule.form not in get_args(Form):
        raise PlanError(f"{name!r}: form={shown(rule.form)} must be 'full', 'mean' or 'factored'")
    if bool(rule.dims) != (rule.form == "mean"):
        raise PlanError(f"{name!r}: form={rule.form!r} with dims={rule.dims}; only form='mean' has dims, and needs one")
    if any(not isinstance(dim, int) or isinstance(dim, bool) or not 0 <= dim < MAX_NDIM for dim in rule.dims):
        raise PlanError(f"{name!r}: dims={shown(rule.dims)} must be dimensions in 0..{MAX_NDIM - 1}")
    if len(set(rule.dims)) != len(rule.dims):
        raise PlanError(f"{name!r}: dims={rule.dims} names a dimension twice")
    if any(not 0 <= dim < MAX_NDIM for dim in rule.fan_in):
        raise PlanError(f"{name!r}: fan_in={shown(rule.fan_in)} must be dimensions in 0..{MAX_NDIM - 1}")
    if rule.batch_dims < 0:
        raise PlanError(f"{name!r}: batch_dims={rule.batch_dims} must be >= 0")
    if rule.part is not None and (rule.shape != rule.part.shape or owner_of(name, rule.part) == name):
        raise PlanError(
            f"{name!r}: a part {rule.part.label!r} of shape {rule.part.shape} needs that shape, not {rule.shape}, and "
            f"a name that ends in '[{rule.part.label}]'"
        )
    if rule.shape is None:
        return
    ndim = len(rule.shape)
    if any(dim >= ndim for dim in rule.dims):
        raise PlanError(f"{name!r}: dims={rule.dims} is out of range for shape {rule.shape}; use 0..{ndim - 1}")
    if rule.batch_dims > max(0, ndim - 2):
        raise PlanError(f"{name!r}: batch_dims={rule.batch_dims} leaves less than a matrix of shape {rule.shape}")
    if rule.form == FACTORED and ndim < 2:
        raise PlanError(f"{name!r}: form='factored' needs two dimensions, the shape is {rule.shape}; use 'full'")


def dimension_subsets(ndim: int) -> list[tuple[int, ...]]:
    """All non-empty subsets of ``range(ndim)``, smallest first.

    Example:
        >>> dimension_subsets(2)
        [(0,), (1,), (0, 1)]
    """
    dims = range(ndim)
    return [subset for size in range(1, ndim + 1) for subset in itertools.combinations(dims, size)]


def normalize_candidate(dims: object, ndim: int) -> Candidate:
    """``dims`` as a sorted tuple of non-negative dimensions, or ``"factored"``.

    Raises:
        ValueError: ``dims`` is not a non-empty set of dimensions of an ``ndim``-dimensional tensor.
    """
    if dims == FACTORED:
        if ndim < 2:
            raise ValueError(f"dims='factored' needs at least two dimensions, the tensor has {ndim}")
        return FACTORED
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = (dims,)
    if not isinstance(dims, Sequence) or isinstance(dims, str) or not dims:
        raise ValueError(f"dims={shown(dims)} must be a dimension, a non-empty sequence of them, or 'factored'")
    for dim in dims:
        if not isinstance(dim, int) or isinstance(dim, bool) or not -ndim <= dim < ndim:
            raise ValueError(f"dims={shown(dims)}: {shown(dim)} is not a dimension of a {ndim}-dimensional tensor")
    subset = tuple(sorted(dim % ndim for dim in dims))
    if len(set(subset)) != len(subset):
        raise ValueError(f"dims={shown(dims)} names a dimension twice")
    return subset
