"""How one parameter's second moment is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from slimadam.errors import PlanError, shown
from slimadam.roles import BIAS, NORM, ParameterRole, recommended_dims
from slimadam.snr import FACTORED, MAX_NDIM, Candidate

Dims = tuple[int, ...]
Form = Literal["full", "mean", "factored"]


@dataclass(frozen=True)
class Rule:
    """How one parameter's second moment is stored.

    Attributes:
        dims: Dimensions that share one value (``()`` unless ``form`` is ``"mean"``).
        form: ``"full"`` (as AdamW), ``"mean"`` (averaged over ``dims``) or ``"factored"`` (row and column
            averages, whose product stands in for the matrix).
        shape: Shape of the parameter, or None in rules that fit any shape.
        snr: The averaged SNR of each candidate that was measured.
        reason: Why, in words.
        role: What the parameter is.
    """

    dims: tuple[int, ...] = ()
    form: Form = "full"
    shape: tuple[int, ...] | None = None
    snr: Mapping[Candidate, float] = field(default_factory=dict)
    reason: str = ""
    role: str = ""

    def state_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the second-moment tensors for a parameter of the given shape.

        One tensor for ``"full"`` and ``"mean"`` (size 1 in ``dims``), two for ``"factored"``: the averages
        over all dimensions but the first, and over the first.
        """
        return tuple(reduced_shape(shape, dims) for dims in self.averaged_dims(len(shape)))

    def averaged_dims(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """For each second-moment tensor, the dimensions it is averaged over."""
        if self.form == FACTORED:
            return tuple(range(1, ndim)), (0,)
        return (self.dims,)

    def stored_elements(self, shape: tuple[int, ...]) -> int:
        """Second-moment elements kept for a parameter of the given shape."""
        return sum(math.prod(kept) for kept in self.state_shapes(shape))


def reduced_shape(shape: tuple[int, ...], dims: Iterable[int]) -> tuple[int, ...]:
    """``shape`` with size 1 in ``dims``."""
    dims = set(dims)
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


def paper_rule(shape: tuple[int, ...], role: ParameterRole) -> Rule:
    """The paper's recommendation for a role, where it has one and it saves anything."""
    dims = recommended_dims(role)
    if not dims:
        return Rule(shape=shape, role=role.role, reason=f"the paper has no rule for {role.role}")
    if math.prod(reduced_shape(shape, dims)) >= math.prod(shape):
        return Rule(shape=shape, role=role.role, reason="too small to save anything")
    return Rule(dims, "mean", shape, reason=f"the paper's rule for {role.role}", role=role.role)


def factored_rule(shape: tuple[int, ...], role: str) -> Rule:
    """The factored form where it saves anything, the full one elsewhere."""
    rule = Rule(form="factored", shape=shape, role=role, reason="every matrix factored, by choice")
    if len(shape) < 2 or role in (NORM, BIAS) or rule.stored_elements(shape) >= math.prod(shape):
        return Rule(shape=shape, role=role, reason="not a matrix that factoring makes smaller")
    return rule


def fit_rule(name: str, rule: Rule, shape: tuple[int, ...]) -> Rule:
    """``rule`` checked against a parameter's actual shape.

    Raises:
        PlanError: The rule was made for another shape, or names a dimension the parameter lacks.
    """
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
    if rule.shape is None:
        return
    ndim = len(rule.shape)
    if any(dim >= ndim for dim in rule.dims):
        raise PlanError(f"{name!r}: dims={rule.dims} is out of range for shape {rule.shape}; use 0..{ndim - 1}")
    if rule.form == FACTORED and ndim < 2:
        raise PlanError(f"{name!r}: form='factored' needs two dimensions, the shape is {rule.shape}; use 'full'")
