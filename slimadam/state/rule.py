"""The rule of a parameter: how its second moment is stored, and where that comes from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final

from torch import Tensor

from slimadam.kernels.interface import Dims as Dims
from slimadam.layers.roles import BIAS, NORM, ParameterRole, recommended_dims
from slimadam.layers.splits import Part, Piece, check_parts, owner_of
from slimadam.state.second_moment import FACTORED as FACTORED
from slimadam.state.second_moment import FLOAT8 as FLOAT8
from slimadam.state.second_moment import FORMS, Form, reduced_shape
from slimadam.state.second_moment import Candidate as Candidate
from slimadam.state.second_moment import FormName as FormName
from slimadam.utils.errors import PlanError, shown

NO_ELEMENTS: Final = "no elements"

MAX_NDIM = 8


class Source(str, Enum):
    """Origin of a rule. Plan files and checkpoints hold the value."""

    OTHER = "other"
    DEFAULT = "default"  # in full as all vectors, norm scales and biases
    MEASURED = "measured"  # chosen by SNR, or in full because no measured candidate saves anything
    PAPER = "paper"  # recommended for the role, or in full where the recommendation saves nothing
    NO_RULE = "no_rule"  # in full: the paper recommends nothing for the role
    FACTORED = "factored"  # every matrix factored, and in full what that makes no smaller
    USER = "user"  # in full because a pattern of keep names the parameter
    EXPANDED = "expanded"  # in full since a call of expand()
    MEASURING = "measuring"  # in full, or with row and column averages, while plan="auto" measures
    ABSENT = "absent"  # in full: the plan has no entry for the parameter
    CARRIED = "carried"  # carried over from the layers of another model
    NO_COUNTERPART = "no_counterpart"  # in full: the plan that was carried over has no such layer


_REASONS_OF_OLD: Final = (
    ("fewer than two dimensions", Source.DEFAULT),
    ("norm: never compressed by default", Source.DEFAULT),
    ("bias: never compressed by default", Source.DEFAULT),
    ("averaging over dimension", Source.MEASURED),
    ("row and column averages", Source.MEASURED),
    ("the highest SNR, ", Source.MEASURED),
    ("stays in full: the budget", Source.MEASURED),
    ("the paper's rule for ", Source.PAPER),
    ("too small to save anything", Source.PAPER),
    ("the paper has no rule for ", Source.NO_RULE),
    ("every matrix factored, by choice", Source.FACTORED),
    ("not a matrix that factoring makes smaller", Source.FACTORED),
    ("kept in full as asked", Source.USER),
    ("returned to a full second moment by expand()", Source.EXPANDED),
    ("plan='auto' is still measuring", Source.MEASURING),
    ("not in the plan", Source.ABSENT),
    ("carried over from ", Source.CARRIED),
    ("the plan has no ", Source.NO_COUNTERPART),
)


def source_of_reason(reason: str) -> Source:
    """Return the source that a reason meant in plans, checkpoints and pickles that were written without one."""
    return next((source for start, source in _REASONS_OF_OLD if reason.startswith(start)), Source.OTHER)


@dataclass(frozen=True)
class Rule:
    """How one parameter's second moment is stored.

    Attributes:
        dims: Dimensions that share one value (``()`` unless ``form`` is ``"mean"``).
        form: ``"full"`` (as AdamW), ``"mean"`` (averaged over ``dims``), ``"factored"`` (row and column
            averages, whose product stands in for the matrix) or ``"float8"`` (each element in one byte).
        shape: Shape of the parameter, or of the part; None in rules that fit any shape.
        snr: The averaged SNR of each candidate that was measured.
        reason: Why, in words for people.
        role: What the parameter is.
        part: Part of the parameter that the rule is for; None for all of it.
        batch_dims: Number of leading dimensions that count separate matrices (experts, heads): the factored form
            keeps row and column averages of each.
        fan_in: Dimensions that the forward pass sums over, where known: how the parameter is stored.
        source: Where the rule comes from.
    """

    dims: tuple[int, ...] = ()
    form: FormName = "full"
    shape: tuple[int, ...] | None = None
    snr: Mapping[Candidate, float] = field(default_factory=dict)
    reason: str = ""
    role: str = ""
    part: Part | None = None
    batch_dims: int = 0
    fan_in: tuple[int, ...] = ()
    source: Source = field(default=Source.OTHER, compare=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"source": source_of_reason(state["reason"]), **state})

    @property
    def stored_as(self) -> Form:
        """The form, as an object that computes with it."""
        return FORMS[self.form].of(self.dims, self.batch_dims)

    @property
    def is_full(self) -> bool:
        """True if every element keeps its second moment, as in AdamW."""
        return self.form == "full"

    def stored_by(self, candidate: Candidate) -> Rule:
        """Return the rule with the form that a candidate means."""
        if candidate == FACTORED:
            return replace(self, form="factored", dims=())
        return replace(self, form="mean", dims=candidate)

    @property
    def storage(self) -> tuple[Form, Part | None]:
        """All that decides how a second moment is stored."""
        return self.stored_as, self.part

    def averaged_dims(self, ndim: int) -> tuple[Dims, ...]:
        """Return the dimensions that each second-moment tensor is averaged over."""
        return self.stored_as.averaged_dims(ndim)

    def state_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the second-moment tensors for a parameter of the given shape."""
        return self.stored_as.shapes(shape)

    def stored_elements(self, shape: tuple[int, ...]) -> int:
        """Count the second-moment elements kept for a parameter of the given shape; four codes count as one."""
        elements = sum(math.prod(kept) for kept in self.state_shapes(shape))
        return math.ceil(elements / 4) if self.stored_as.is_coded else elements

    @property
    def owner_shape(self) -> tuple[int, ...] | None:
        """Shape of the whole parameter."""
        return self.shape if self.part is None else self.part.of

    @property
    def piece(self) -> Piece:
        """The parameter, or part of one, that the rule is for."""
        shape = self.shape or ()
        fan_out = tuple(dim for dim in range(self.batch_dims, len(shape)) if self.fan_in and dim not in self.fan_in)
        return Piece(shape, ParameterRole(self.role, self.fan_in, fan_out), self.part, self.batch_dims)

    def take(self, tensor: Tensor) -> Tensor:
        """Return the view of a tensor of the parameter's shape that the rule is for."""
        return tensor if self.part is None else self.part.take(tensor)


def full_rule(piece: Piece, reason: str, source: Source = Source.OTHER) -> Rule:
    """Keep the second moment as AdamW does.

    Args:
        piece: The parameter, or part of one, that the rule is for.
        reason: Why, in words.
        source: Where the rule comes from.
    """
    return Rule(
        shape=piece.shape,
        reason=reason,
        role=piece.role.role,
        part=piece.part,
        batch_dims=piece.batch_dims,
        fan_in=piece.role.fan_in,
        source=source,
    )


def rule_of_whole(rules: Sequence[Rule], reason: str = "") -> Rule:
    """Return one rule that keeps a parameter as AdamW does, in the place of those of its parts.

    Args:
        rules: Those of the parameter, all in full.
        reason: Why, in words; without it, the reason and source of the first.
    """
    first = rules[0]
    if first.part is not None:
        first = Rule(shape=first.owner_shape, reason=first.reason, source=first.source)
    return replace(first, reason=reason, source=Source.OTHER) if reason else first


def paper_rule(piece: Piece) -> Rule:
    """Follow the paper's recommendation for a role, where it has one and it saves anything."""
    role, dims = piece.role.role, recommended_dims(piece.role)
    if not dims:
        return full_rule(piece, f"the paper has no rule for {role}", Source.NO_RULE)
    if math.prod(reduced_shape(piece.shape, dims)) >= math.prod(piece.shape):
        return full_rule(piece, "too small to save anything", Source.PAPER)
    return replace(full_rule(piece, f"the paper's rule for {role}", Source.PAPER), dims=dims, form="mean")


def factored_rule(piece: Piece) -> Rule:
    """Factor the second moment where that saves anything, and keep it in full elsewhere."""
    rule = replace(full_rule(piece, "every matrix factored, by choice", Source.FACTORED), form="factored")
    is_matrix = len(piece.shape) >= piece.batch_dims + 2 and piece.role.role not in (NORM, BIAS)
    if is_matrix and rule.stored_elements(piece.shape) < math.prod(piece.shape):
        return rule
    return full_rule(piece, "not a matrix that factoring makes smaller", Source.FACTORED)


def resized_rule(rule: Rule, shape: tuple[int, ...]) -> Rule:
    """Return the rule of a whole parameter for another size of it. A choice that the size decides is made anew.

    Args:
        rule: The rule for the present size.
        shape: The new size.
    """
    piece = replace(rule, shape=shape, part=None).piece
    if rule.source == Source.FACTORED:
        return factored_rule(piece)
    if not rule.is_full and 0 in shape:
        return full_rule(piece, NO_ELEMENTS)
    if rule.source == Source.PAPER and rule.is_full:
        return paper_rule(piece)
    return replace(rule, shape=shape)


def fit_rules(name: str, rules: Sequence[Rule], shape: tuple[int, ...]) -> list[Rule]:
    """Check the rules of one parameter (several if it falls into parts) against its actual shape.

    Args:
        name: The parameter's name, for errors.
        rules: One rule, or one for each part.
        shape: The parameter's shape.

    Returns:
        The rules with that shape, in the order of the parts.

    Raises:
        PlanError: The rules were made for another shape, or name a dimension the parameter lacks.
    """
    rule = rules[0]
    if rule.part is not None:
        check_parts(name, [rule.part for rule in rules if rule.part is not None], shape)
        return in_order(rules)
    if rule.shape is not None and rule.shape != shape:
        raise PlanError(
            f"{name!r}: the plan is for shape {rule.shape}, the parameter has {shape}; "
            "calibrate this model, or carry the plan over with plan.for_model(model)"
        )
    fitted = replace(rule, shape=shape)
    check_rule(name, fitted)
    return [fitted]


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """Sort the rules of one parameter as its parts lie in it, which is the order of its state."""
    return sorted(rules, key=lambda rule: rule.part.start if rule.part else 0)


def check_rule(name: str, rule: Rule) -> None:
    """Check that a rule does not contradict itself.

    Args:
        name: The name it has in the plan, for errors.
        rule: The rule.

    Raises:
        PlanError: A dimension is out of range, or the form needs another shape.
    """
    if rule.form not in FORMS:
        raise PlanError(f"{name!r}: form={shown(rule.form)} must be 'full', 'mean', 'factored' or 'float8'")
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
    if rule.batch_dims > max(0, len(rule.shape) - 2):
        raise PlanError(f"{name!r}: batch_dims={rule.batch_dims} leaves less than a matrix of shape {rule.shape}")
    misfit = rule.stored_as.misfit(rule.shape)
    if misfit:
        raise PlanError(f"{name!r}: {misfit}")


def dimension_subsets(ndim: int) -> list[tuple[int, ...]]:
    """Return all non-empty subsets of ``range(ndim)``, smallest first.

    Example:
        >>> dimension_subsets(2)
        [(0,), (1,), (0, 1)]
    """
    dims = range(ndim)
    return [subset for size in range(1, ndim + 1) for subset in itertools.combinations(dims, size)]


def normalize_candidate(dims: object, ndim: int) -> Candidate:
    """Return ``dims`` as a sorted tuple of non-negative dimensions, or ``"factored"``.

    Args:
        dims: A dimension, several, or ``"factored"``.
        ndim: Number of dimensions of the tensor.

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
