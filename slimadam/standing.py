"""A parameter group in which every parameter takes a step as it did before: what is checked is compared in lists.

Checks of one parameter after the other cost more than the update of a small one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from slimadam.rules import Rule
from slimadam.torch_private import is_zero_tensor

_DTYPE, _SHAPE, _GRAD = attrgetter("dtype"), attrgetter("shape"), attrgetter("grad")


class StandingGroup:
    """What the steps of a group rest on whose parameters all have a gradient. It keeps no gradient alive.

    Args:
        params: Its parameters.
        rules: For each those of its parts.
        options: The options that decide on implementations.
        states: The state of each.

    Attributes:
        holds_nothing_else: Whether all tensors are plain ones; else there is nothing to compare with.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rules: Sequence[list[Rule]],
        options: tuple[Any, ...],
        states: Sequence[Mapping[str, Any]],
    ) -> None:
        self._params, self._rules, self._options = list(params), list(rules), options
        self._values = _values(states)
        state = [value for value in self._values if isinstance(value, Tensor)]
        self._tensors = [*self._params, *state]
        grads = list(map(_GRAD, params))
        kinds = {type(tensor) for tensor in (*self._tensors, *grads)}
        self.holds_nothing_else = kinds <= {Tensor, Parameter} and not any(map(is_marked, grads))
        if self.holds_nothing_else:
            self._addresses = _addresses(self._tensors)
            self._layouts = layouts(self._tensors), layouts(grads)

    def gradients(
        self,
        params: Sequence[Tensor],
        rules: Iterable[list[Rule]],
        options: tuple[Any, ...],
        states: Iterable[Mapping[str, Any]],
    ) -> list[Tensor] | None:
        """The gradients of the step to take, or None if anything has changed that it rests on; arguments as above."""
        if len(params) != len(self._params) or not all(map(is_, params, self._params)) or options != self._options:
            return None
        grads, values = list(map(_GRAD, params)), _values(states)
        same = (
            set(map(type, grads)) == {Tensor}
            and not any(map(is_marked, grads))
            and len(values) == len(self._values)
            and all(map(is_, values, self._values))
            and all(map(is_, rules, self._rules))
            and _addresses(self._tensors) == self._addresses
            and (layouts(self._tensors), layouts(grads)) == self._layouts
        )
        return grads if same else None


def is_marked(grad: Tensor) -> bool:
    """Whether memory does not hold a gradient's values: it is negated when it is read, or zero without memory."""
    return grad.is_neg() or is_zero_tensor(grad)


def _values(states: Iterable[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(state.values() for state in states))


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def layouts(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Dtypes, shapes and strides."""
    return list(map(_DTYPE, tensors)), list(map(_SHAPE, tensors)), list(map(Tensor.stride, tensors))
