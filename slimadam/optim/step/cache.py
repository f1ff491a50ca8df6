"""The inputs of a cached step, compared in lists.

Checks of one parameter after the other cost more than the update of a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, ValuesView
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from slimadam.kernels.interface import Gradients, addresses_of
from slimadam.kernels.layout import is_marked, is_zero_tensor
from slimadam.state.rule import Rule
from slimadam.state.second_moment import is_own
from slimadam.utils.dtensor import is_dtensor, local
from slimadam.utils.torch_private import layout_check

_DTYPE, _GRAD, _LAYOUT = map(attrgetter, ("dtype", "grad", "layout"))
_END = object()
_OPTIONS = (
    "amsgrad", "foreach", "fused", "capturable", "differentiable", "momentum_dtype", "bf16_stochastic_round",
)  # fmt: skip


class StepInputs:
    """Inputs that the step of some parameters was built from, to see whether it can be repeated. Holds no gradient.

    Args:
        params: The parameters.
        grads: This rank's gradient of each, or None.
        rules: The rules of each that has a gradient.
        options: The options that decide on implementations.
        states: The state of each that has a gradient.

    Attributes:
        are_plain: True if all tensors are of torch's own class.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        rules: Sequence[Sequence[Rule]],
        options: tuple[Any, ...],
        states: Sequence[Mapping[str, Any]],
    ) -> None:
        self._params, self._rules, self._options = list(params), list(rules), options
        self._have_gradient = [grad is not None for grad in grads]
        self._entries = _entries(states)
        self._values = [*chain.from_iterable(self._entries), _END]
        moved = compress(params, self._have_gradient)
        # A count of steps that several parameters share is there once.
        self._tensors = tuple(dict.fromkeys([*moved, *(tensor for state in states for tensor in own_tensors(state))]))
        self._is_sharded = any(map(is_dtensor, self._tensors))
        present = [grad for grad in grads if grad is not None]
        self._grad_types = set(map(type, present))
        self._is_marked = any(map(is_marked, present))
        types = set(map(type, self._tensors)) | self._grad_types
        self.are_plain = types <= {Tensor, Parameter} and not self._is_marked
        self._addresses, self._have_memory = addresses_of(self._own()), list(map(bool, addresses_of(present)))
        self._layouts = _layouts(self._own()), _layouts(present)
        self._are_alike = layout_check(self._tensors) if self.are_plain else _never
        self._are_grads_alike = layout_check(present) if self.are_plain else _never

    def gradients(
        self,
        params: Sequence[Tensor],
        rules: Iterable[Sequence[Rule] | None],
        options: tuple[Any, ...],
        grads: Sequence[Tensor | None] | None = None,
        states: Sequence[Mapping[str, Any]] | None = None,
    ) -> Gradients | None:
        """Return the gradients of the step to take, or None if any of the inputs has changed.

        Args:
            params: The parameters.
            rules: Those of each, with a gradient or without.
            options: The options that decide on implementations.
            grads: This rank's gradients; None: those of the parameters.
            states: The states of those that have a gradient; None: the same objects as before.
        """
        if len(params) != len(self._params) or not all(map(is_, params, self._params)) or options != self._options:
            return None
        found: Sequence[Any] = list(map(_GRAD, params)) if grads is None else grads
        if [grad is not None for grad in found] != self._have_gradient:
            return None
        present = Gradients(compress(found, self._have_gradient))
        values = chain(chain.from_iterable(self._entries if states is None else _entries(states)), (_END,))
        same = (
            all(map(is_, values, self._values))
            and all(map(is_, compress(rules, self._have_gradient), self._rules))
            and self._same_layouts(present)
        )
        return present if same else None

    def _same_layouts(self, grads: Gradients) -> bool:
        """Return whether own tensors and gradients lie as they did, the former at their addresses."""
        own = self._own()
        if not (self._are_alike(*own) and self._are_grads_alike(*grads)) and not (
            set(map(type, grads)) == self._grad_types
            and set(map(_LAYOUT, grads)) <= {torch.strided}
            and (any(map(Tensor.is_neg, grads)) or any(map(is_zero_tensor, grads))) == self._is_marked
            and (_layouts(own), _layouts(grads)) == self._layouts
        ):
            return False
        return addresses_of(own) == self._addresses and list(map(bool, grads.addresses)) == self._have_memory

    def _own(self) -> Sequence[Tensor]:
        return tuple(map(local, self._tensors)) if self._is_sharded else self._tensors


def _never(*_: Tensor) -> bool:
    return False


def own_tensors(state: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a state that are the optimizer's, not those that a user has put beside them."""
    return [value for key, value in state.items() if is_own(key) and isinstance(value, Tensor)]


def _entries(states: Iterable[Mapping[str, Any]]) -> list[ValuesView[Any]]:
    """Return views of what is in each state, which change with it."""
    return [state.values() for state in states]


def _layouts(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    return list(map(_DTYPE, tensors)), list(map(Tensor.size, tensors)), list(map(Tensor.stride, tensors))


def options_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the options of a group that decide on implementations."""
    of_tensors = type(group["lr"]), *map(type, group["betas"])
    return (torch.compiler.is_compiling(), *of_tensors, *[group[option] for option in _OPTIONS])
