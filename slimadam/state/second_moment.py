"""Second moments: the forms in which they are stored, and the state that holds them. A new form is a new class here."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from typing_extensions import override

from slimadam.kernels import float8
from slimadam.kernels.interface import Dims, second_moment_dtype
from slimadam.kernels.reference import initial_second_moment, reconstruct, relative_rows
from slimadam.state.first_moment import FIRST_MOMENTS

if TYPE_CHECKING:
    from slimadam.state.rule import Rule

SECOND_MOMENTS: Final = ("exp_avg_sq", "max_exp_avg_sq")
FormName = Literal["full", "mean", "factored", "float8"]
Candidate = tuple[int, ...] | Literal["factored"]
"""Dimensions to average over, or ``"factored"`` for row and column averages."""
FACTORED: Final = "factored"
FLOAT8: Final = "float8"
_EXPANDED_AT_ONCE: Final = 1 << 18
"""Elements of a second moment that are expanded at a time where its form changes."""


def reduced_shape(shape: Sequence[int], dims: Iterable[int]) -> tuple[int, ...]:
    """Return ``shape`` with size 1 in some dimensions.

    Args:
        shape: Any shape.
        dims: Dimensions of it.
    """
    dims = set(dims)
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


class Form(ABC):
    """A form in which the second moment of a tensor is stored.

    Attributes:
        name: Its name in plans.
        suffixes: For each stored tensor the end of its key in the state.
        is_coded: True if the tensors hold codes of one byte.
        known_snr: SNR of what is stored for the true second moment, where it need not be measured.
    """

    name: ClassVar[FormName]
    suffixes: ClassVar[tuple[str, ...]] = ("",)
    is_coded: ClassVar[bool] = False
    known_snr: ClassVar[float | None] = None

    @property
    @abstractmethod
    def candidate(self) -> Candidate:
        """The candidate that it is measured as; ``()`` for none."""

    @abstractmethod
    def describe(self) -> str:
        """Return how it averages, in words."""

    @abstractmethod
    def averaged_dims(self, ndim: int) -> tuple[Dims, ...]:
        """Return the dimensions that each stored tensor is averaged over."""

    @classmethod
    @abstractmethod
    def of(cls, dims: Dims, batch_dims: int) -> Form:
        """Return the form that a rule with these ``dims`` and ``batch_dims`` means.

        Args:
            dims: As in :class:`~slimadam.state.rule.Rule`.
            batch_dims: As there.
        """

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot have the form, or None where it can."""
        return None

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the stored tensors of a tensor of the given shape: size 1 where they are averaged."""
        return tuple(reduced_shape(shape, dims) for dims in self.averaged_dims(len(shape)))

    def dtype(self, param_dtype: torch.dtype) -> torch.dtype:
        """Return the precision of the stored tensors of a parameter in a precision."""
        return torch.uint8 if self.is_coded else second_moment_dtype(param_dtype)

    def compress(self, full: Tensor) -> list[Tensor]:
        """Return the stored tensors of a full second moment; complex ones average real and imaginary parts apart."""
        dims_of_each = self.averaged_dims(full.dim())
        return [full.mean(dims, keepdim=True) if dims else full.clone() for dims in dims_of_each]

    def expand(self, stored: Sequence[Tensor], ndim: int) -> Tensor:
        """Return the second moment that stored tensors stand for, broadcastable to the full one.

        Args:
            stored: The tensors.
            ndim: Number of dimensions of the full one.
        """
        dims = self.averaged_dims(ndim)
        if stored[0].is_complex():
            real = reconstruct([torch.view_as_real(one) for one in stored], dims)
            return torch.view_as_complex(real.contiguous())
        return reconstruct(stored, dims)

    def relative(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """Return stored tensors of which slices stand for slices of the second moment."""
        return list(stored)

    def expand_relative(self, slices: Sequence[Tensor]) -> Tensor:
        """Return the second moment that slices of :meth:`relative` stand for, broadcastable to the full one."""
        return self.expand(slices, slices[0].dim())

    def expand_to(self, target: Tensor, stored: Sequence[Tensor]) -> None:
        """Write the second moment that stored tensors stand for, without another tensor of its size where that can be.

        Args:
            target: A tensor of the full one's shape; written.
            stored: The tensors.
        """
        target.copy_(self.expand(stored, target.dim()))

    def start_from(self, grad: Tensor) -> list[Tensor]:
        """Return the stored tensors of a gradient's square (GI-Adam, arXiv 2406.09405)."""
        return [initial_second_moment(grad, dims) for dims in self.averaged_dims(grad.dim())]


class _Elementwise(Form):
    """One value for each element."""

    @classmethod
    @override
    def of(cls, dims: Dims, batch_dims: int) -> Form:
        return cls()

    @property
    @override
    def candidate(self) -> Candidate:
        return ()

    @override
    def averaged_dims(self, ndim: int) -> tuple[Dims, ...]:
        return ((),)


@dataclass(frozen=True)
class Full(_Elementwise):
    """One value for each element, as in AdamW."""

    name = "full"
    known_snr = math.inf

    @override
    def describe(self) -> str:
        return "no averaging"


@dataclass(frozen=True)
class Float8(_Elementwise):
    """One value for each element in one byte, see :mod:`slimadam.kernels.float8`."""

    name = FLOAT8
    suffixes = ("_codes",)
    is_coded = True
    # A step changes a moment by about its share 1 - beta2, and rounds it to a neighbour some 0.4 of it away: a variance
    # of 0.4 (1 - beta2) a step, of which the average over steps keeps 1 / (1 - beta2**2), so 0.2 at any beta2 near 1.
    known_snr: ClassVar[float] = 5.0

    @override
    def describe(self) -> str:
        return "one byte for each element"

    @override
    def compress(self, full: Tensor) -> list[Tensor]:
        return [float8.encode(full, full, torch.zeros(()))]

    @override
    def expand(self, stored: Sequence[Tensor], ndim: int) -> Tensor:
        return float8.decode(stored[0])

    @override
    def expand_to(self, target: Tensor, stored: Sequence[Tensor]) -> None:
        float8.decode_to(target, stored[0])

    @override
    def start_from(self, grad: Tensor) -> list[Tensor]:
        return self.compress(initial_second_moment(grad, ()))


@dataclass(frozen=True)
class Mean(Form):
    """One value for all elements along some dimensions (arXiv 2503.01843).

    Attributes:
        dims: The dimensions.
    """

    dims: Dims
    name = "mean"

    @classmethod
    @override
    def of(cls, dims: Dims, batch_dims: int) -> Form:
        return cls(dims)

    @property
    @override
    def candidate(self) -> Candidate:
        return self.dims

    @override
    def describe(self) -> str:
        return "averaging over dimension" + ("s " if len(self.dims) > 1 else " ") + ", ".join(map(str, self.dims))

    @override
    def averaged_dims(self, ndim: int) -> tuple[Dims, ...]:
        return (self.dims,)

    @override
    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if all(dim < len(shape) for dim in self.dims):
            return None
        return f"dims={self.dims} is out of range for shape {shape}; use 0..{len(shape) - 1}"


@dataclass(frozen=True)
class Factored(Form):
    """Row averages and column averages, whose product stands in for the matrix (arXiv 1804.04235).

    Rows are averaged over all dimensions after the first that is no batch dimension, columns over that one.

    Attributes:
        batch_dims: Number of leading dimensions that count separate matrices, each with averages of its own.
    """

    batch_dims: int = 0
    name = FACTORED
    suffixes = ("_row", "_col")

    @classmethod
    @override
    def of(cls, dims: Dims, batch_dims: int) -> Form:
        return cls(batch_dims)

    @property
    @override
    def candidate(self) -> Candidate:
        return FACTORED

    @override
    def describe(self) -> str:
        return "row and column averages"

    @override
    def averaged_dims(self, ndim: int) -> tuple[Dims, ...]:
        return tuple(range(self.batch_dims + 1, ndim)), (self.batch_dims,)

    @override
    def relative(self, stored: Sequence[Tensor]) -> list[Tensor]:
        rows, columns = stored
        return [relative_rows(rows, (self.batch_dims,)), columns]

    @override
    def expand_relative(self, slices: Sequence[Tensor]) -> Tensor:
        rows, columns = slices
        return rows * columns

    @override
    def expand_to(self, target: Tensor, stored: Sequence[Tensor]) -> None:
        if target.is_complex() or any(one.dtype != target.dtype for one in stored):
            super().expand_to(target, stored)
            return
        rows, columns = self.relative(stored)
        target.copy_(rows).mul_(columns)

    @override
    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) > 1 else f"form='factored' needs two dimensions, the shape is {shape}; use 'full'"


FORMS: Final[Mapping[str, type[Form]]] = {form.name: form for form in (Full, Mean, Factored, Float8)}
_SUFFIXES: Final = "|".join(suffix for form in FORMS.values() for suffix in form.suffixes if suffix)
_CODED_SUFFIXES: Final = "|".join(suffix for form in FORMS.values() if form.is_coded for suffix in form.suffixes)


def step_dtype() -> torch.dtype:
    """Return the precision in which torch counts steps."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def is_of_no_step(state: Mapping[str, Any]) -> bool:
    """Return whether a step of zero has made a parameter's state."""
    return "step" in state and not state["step"] > 0


def is_made(state: Mapping[str, Any]) -> bool:
    """Return whether a parameter has state beside entries that a user has put there before the first step."""
    return "step" in state


def keys_of(rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[str]:
    """Return the keys in a parameter's state of the tensors that its second moment is stored in.

    One ``exp_avg_sq`` in full or averaged, ``exp_avg_sq_row`` and ``exp_avg_sq_col`` if factored; each part of a fused
    weight has its own, such as ``exp_avg_sq[query]``.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    found = []
    for rule in rules:
        part = "" if rule.part is None else f"[{rule.part.label}]"
        found += [f"{kind}{suffix}{part}" for suffix in rule.stored_as.suffixes]
    return found


def moments_of(state: Mapping[str, Any], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[Tensor]:
    """Return the tensors that a parameter's second moment is stored in; none where the state lacks one.

    Args:
        state: The parameter's state.
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    keys = keys_of(rules, kind)
    return [state[key] for key in keys] if all(key in state for key in keys) else []


def by_key(moments: Sequence[Tensor], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> dict[str, Tensor]:
    """Return the entries of a state that hold a second moment; the opposite of :func:`moments_of`.

    Args:
        moments: The tensors of a second moment.
        rules: The parameter's rule, or one for each of its parts.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    return dict(zip(keys_of(rules, kind), moments, strict=True))


def exchange(
    state: MutableMapping[str, Any], before: Sequence[Rule], after: Sequence[Rule], moments: Sequence[Tensor], kind: str
) -> None:
    """Replace a second moment in a state by one that is stored by other rules.

    Args:
        state: The state; written.
        before: The rules that it is stored by.
        after: The other rules.
        moments: Its tensors by these.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    for key in keys_of(before, kind):
        del state[key]
    state.update(by_key(moments, after, kind))


def saved_moments(saved: Mapping[str, Any], rules: Sequence[Rule], kind: str = "exp_avg_sq") -> list[Tensor]:
    """Return the tensors of a saved second moment, in whatever format and under whatever rules it was saved.

    Args:
        saved: A parameter's entry in a state dict.
        rules: The rules whose order and keys are looked for first.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    keys = keys_of(rules, kind)
    if all(isinstance(saved.get(key), Tensor) for key in keys):
        return [saved[key] for key in keys]
    full_moment = saved.get(kind)
    if isinstance(full_moment, Tensor):
        return [full_moment]
    if isinstance(full_moment, Mapping):
        return [full_moment[str(index)] for index in range(len(full_moment))]
    if isinstance(full_moment, (list, tuple)):
        return list(full_moment)
    return [value for key, value in saved.items() if is_key_of(key, kind)]


def is_own(key: object) -> bool:
    """Return whether an entry of a state is the optimizer's, and not one that a user has put beside it."""
    return key == "step" or key in FIRST_MOMENTS or any(is_key_of(key, kind) for kind in SECOND_MOMENTS)


def written(param: Tensor, state: Mapping[str, Any], amsgrad: bool) -> list[Tensor]:
    """Return a parameter and the tensors of its state that a step changes.

    Args:
        param: The parameter.
        state: Its state; a user's own entries are left out.
        amsgrad: Whether the step uses running maxima.
    """
    own = (key for key in state if is_own(key) and (amsgrad or not is_key_of(key, "max_exp_avg_sq")))
    return [param, *(state[key] for key in own)]


def is_key_of(key: object, kind: str) -> bool:
    """Return whether an entry of a state holds a second moment, or some of it.

    Args:
        key: The key of the entry.
        kind: One of :data:`SECOND_MOMENTS`.
    """
    return isinstance(key, str) and re.fullmatch(rf"{kind}({_SUFFIXES})?(\[.*\])?", key) is not None


def is_key_of_codes(key: str) -> bool:
    """Return whether an entry of a state holds a second moment in codes."""
    return re.fullmatch(rf"({'|'.join(SECOND_MOMENTS)})({_CODED_SUFFIXES})(\[.*\])?", key) is not None


def by_rule(rules: Sequence[Rule], moments: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return the stored tensors of each rule of a parameter.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        moments: The tensors of its second moment.
    """
    found, start = [], 0
    for rule in rules:
        end = start + len(rule.stored_as.suffixes)
        found.append(moments[start:end])
        start = end
    return found


def dtypes_of(rules: Sequence[Rule], param_dtype: torch.dtype) -> list[torch.dtype]:
    """Return the precision of each tensor that a second moment is stored in.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        param_dtype: Precision of the parameter.
    """
    return [rule.stored_as.dtype(param_dtype) for rule in rules for _ in rule.stored_as.suffixes]


def fits(moments: Sequence[Tensor], rules: Sequence[Rule], shape: tuple[int, ...]) -> bool:
    """Return whether tensors have the shapes that rules store, and are codes where these are.

    Args:
        moments: The tensors of a second moment.
        rules: The parameter's rule, or one for each of its parts.
        shape: The shape of the parameter.
    """
    wanted = [rule.stored_as.is_coded for rule in rules for _ in rule.stored_as.suffixes]
    shapes = tuple(tuple(moment.shape) for moment in moments)
    return shapes == state_shapes(rules, shape) and list(map(float8.is_coded, moments)) == wanted


def state_shapes(rules: Sequence[Rule], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all tensors that a second moment is stored in.

    Args:
        rules: The parameter's rule, or one for each of its parts.
        shape: The shape of the parameter.
    """
    return tuple(kept for rule in rules for kept in rule.state_shapes(shape if rule.part is None else rule.part.shape))


def is_whole(rules: Sequence[Rule]) -> bool:
    """Return whether a second moment is stored in full and as one tensor."""
    return len(rules) == 1 and rules[0].is_full and rules[0].part is None


def average(full: Tensor, rules: Sequence[Rule], keep: bool = True) -> list[Tensor]:
    """Average a full second moment to the tensors that the rules of a parameter store.

    Args:
        full: Second moment of the parameter's shape; complex ones average real and imaginary parts apart.
        rules: The parameter's rule, or one for each of its parts.
        keep: Whether to return copies alone. False: it is ``full`` itself where all of it is stored.
    """
    if not keep and is_whole(rules):
        return [full]
    return [moment for rule in rules for moment in rule.stored_as.compress(rule.take(full))]


def expand(moments: Sequence[Tensor], rules: Sequence[Rule], shape: tuple[int, ...]) -> Tensor:
    """Return the full second moment, of the parameter's shape, from the stored tensors.

    Args:
        moments: The stored tensors.
        rules: The parameter's rule, or one for each of its parts.
        shape: The shape of the parameter.
    """
    wide = (torch.float32 if float8.is_coded(moment) else moment.dtype for moment in moments)
    full_moment = torch.empty(shape, dtype=reduce(torch.promote_types, wide), device=moments[0].device)
    for rule, stored in zip(rules, by_rule(rules, moments), strict=True):
        rule.stored_as.expand_to(rule.take(full_moment), stored)
    return full_moment


def convert(stored: Sequence[Tensor], before: Form, after: Form, shape: tuple[int, ...]) -> list[Tensor]:
    """Return what another form stores of a second moment, expanded a few MB at a time.

    Args:
        stored: The tensors of the second moment.
        before: The form that they have.
        after: The other form.
        shape: Shape of the parameter, or part.
    """
    if before == after:
        return list(stored)
    if stored[0].is_complex() or not shape or 0 in shape:
        return after.compress(before.expand(stored, len(shape)).expand(shape))
    stored = before.relative(stored)
    dim = max(range(len(shape)), key=shape.__getitem__)
    length = max(1, _EXPANDED_AT_ONCE * shape[dim] // math.prod(shape))
    made: list[Tensor] = []
    for start in range(0, shape[dim], length):
        some = min(length, shape[dim] - start)
        slices = [one if one.shape[dim] == 1 else one.narrow(dim, start, some) for one in stored]
        expanded = before.expand_relative(slices).expand(*shape[:dim], some, *shape[dim + 1 :])
        found = after.compress(expanded)
        made = made or [one.new_zeros(kept) for one, kept in zip(found, after.shapes(shape), strict=True)]
        for target, value in zip(made, found, strict=True):
            if target.shape[dim] < shape[dim]:
                target.add_(value, alpha=some / shape[dim])
            else:
                target.narrow(dim, start, some).copy_(value)
    return made


def converted(
    moments: Sequence[Tensor], before: Sequence[Rule], after: Sequence[Rule], shape: tuple[int, ...]
) -> list[Tensor]:
    """Return copies of a second moment as other rules store it.

    Args:
        moments: The stored tensors.
        before: The rules that they are stored by: the parameter's, or one for each of its parts.
        after: The other rules.
        shape: The shape of the parameter.
    """
    if is_whole(before) and moments[0].is_contiguous():
        return average(moments[0], after)
    return average(expand(moments, before, shape), after, keep=False)
