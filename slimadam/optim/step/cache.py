"""Cached steps of parameter groups: inputs that must not have changed are compared in lists.

Checks of one parameter after the other cost more than the update of a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, is_, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from slimadam.kernels.layout import is_marked, is_zero_tensor
from slimadam.optim.step.tasks import UpdateTask
from slimadam.state.rule import Rule
from slimadam.state.second_moment import is_own
from slimadam.utils.dtensor import local

_DTYPE, _GRAD, _LAYOUT = map(attrgetter, ("dtype", "grad", "layout"))
_VALUES = methodcaller("values")


_OPTIONS = (
    "amsgrad", "foreach", "fused", "capturable", "differentiable", "momentum_dtype", "bf16_stochastic_round",
)  # fmt: skip


class GroupCache:
    """Inputs that the last step of a group was built from. Holds no gradient.

    Args:
        group_params: All of its parameters.
        params: Those that have a gradient, in the same order.
        rules: For each of these those of its parts.
        options: The options that decide on implementations.
        states: The state of each of these.

    Attributes:
        holds_nothing_else: Whether all tensors are plain ones; else there is nothing to compare with.
    """

    def __init__(
        self,
        group_params: Sequence[Tensor],
        params: Sequence[Tensor],
        rules: Sequence[list[Rule]],
        options: tuple[Any, ...],
        states: Sequence[Mapping[str, Any]],
    ) -> None:
        self._group_params = list(group_params)
        self._moves = [grad is not None for grad in map(_GRAD, group_params)]
        self._params, self._rules, self._options, self._states = list(params), list(rules), options, list(states)
        self._values = _values(states)
        self._tensors = [*self._params, *(tensor for state in states for tensor in own_tensors(state))]
        grads = list(map(_GRAD, params))
        kinds = {type(tensor) for tensor in (*self._tensors, *grads)}
        self.holds_nothing_else = kinds <= {Tensor, Parameter} and not any(map(is_marked, grads))
        if self.holds_nothing_else:
            self._addresses = _addresses(self._tensors)
            self._layouts = layouts(self._tensors), layouts(grads)
            self._have_memory = _have_memory(grads)

    def gradients(
        self,
        group_params: Sequence[Tensor],
        rules: Iterable[list[Rule] | None],
        options: tuple[Any, ...],
    ) -> list[Tensor] | None:
        """Return the gradients of the step to take, or None if anything has changed that it rests on.

        Args:
            group_params: As above.
            rules: Those of each.
            options: As above. That the parameters' states are the very same has been seen to.
        """
        known = self._group_params
        if len(group_params) != len(known) or not all(map(is_, group_params, known)) or options != self._options:
            return None
        if [grad is not None for grad in map(_GRAD, group_params)] != self._moves:
            return None
        grads, values = list(map(_GRAD, self._params)), _values(self._states)
        same = (
            set(map(type, grads)) <= {Tensor}
            and set(map(_LAYOUT, grads)) <= {torch.strided}
            and not any(map(Tensor.is_neg, grads))
            and not any(map(is_zero_tensor, grads))
            and len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and all(map(is_, compress(rules, self._moves), self._rules))
            and _addresses(self._tensors) == self._addresses
            and (layouts(self._tensors), layouts(grads)) == self._layouts
            and _have_memory(grads) == self._have_memory
        )
        return grads if same else None


class StateIdentities:
    """The states of all parameters, when a step was last taken that other steps may repeat."""

    def __init__(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._params, self._states = list(states), list(states.values())

    def are(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Return whether the same parameters have the same states, whatever is in them."""
        return (
            len(states) == len(self._params)
            and all(map(is_, states, self._params))
            and all(map(is_, states.values(), self._states))
        )


def own_tensors(state: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a state that are the optimizer's, not those that a user has put beside them."""
    return [value for key, value in state.items() if is_own(key) and isinstance(value, Tensor)]


def _values(states: Iterable[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(_VALUES, states)))


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _have_memory(grads: Iterable[Tensor]) -> list[bool]:
    return list(map(bool, _addresses(grads)))


def layouts(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Dtypes, shapes and strides."""
    return list(map(_DTYPE, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))


class Prepared(NamedTuple):
    """Cached update tasks of a parameter and the inputs they were built from. Holds no gradient."""

    param: Tensor
    rules: list[Rule]
    options: tuple[Any, ...]
    address: int
    shape: torch.Size
    dtype: torch.dtype
    grad_dtype: torch.dtype
    grad_is_marked: bool
    grad_has_memory: bool
    stride: tuple[int, ...]
    grad_stride: tuple[int, ...]
    state: tuple[Any, ...]
    state_layouts: tuple[list[Any], ...]
    pieces: list[UpdateTask]
    supports_codes: bool
    counts_itself: bool

    def holds(
        self,
        param: Tensor,
        own: Tensor,
        grad: Tensor,
        rules: list[Rule],
        options: tuple[Any, ...],
        state: Mapping[str, Any],
    ) -> bool:
        """Return whether the tasks still fit their inputs.

        Args:
            param: The parameter.
            own: The local shard of it, or itself.
            grad: The gradient of that.
            rules: Its rules.
            options: The options that decide on implementations.
            state: Its state.
        """
        shape = param.shape
        return (
            self.param is param
            and self.rules is rules
            and len(state) == len(self.state)
            and all(map(is_, state.values(), self.state))
            and self.address == own.data_ptr()
            and self.stride == own.stride()
            and self.grad_stride == grad.stride()
            and self.shape == shape
            and grad.shape == (shape if own is param else own.shape)
            and self.grad_dtype is grad.dtype
            and self.grad_is_marked == is_marked(grad)
            and self.grad_has_memory == bool(grad.data_ptr())
            and self.dtype is param.dtype
            and self.options == options
            and self.state_layouts == state_layouts(state)
        )


def options_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the options of a group that decide on implementations."""
    of_tensors = type(group["lr"]), *map(type, group["betas"])
    return (torch.compiler.is_compiling(), *of_tensors, *[group[option] for option in _OPTIONS])


def state_layouts(state: Mapping[str, Any]) -> tuple[list[Any], ...]:
    """Return dtypes, shapes, strides and addresses of the optimizer's tensors in a state."""
    tensors = own_tensors(state)
    return *layouts(tensors), [local(tensor).data_ptr() for tensor in tensors]
