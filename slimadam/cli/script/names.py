"""One set of parameter names over all optimizers of a script, the same in ``calibrate`` and in ``run``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from torch import Tensor

from slimadam.layers.names import owning_modules
from slimadam.layers.roles import class_name


def prefix_of(parameters: Iterable[Tensor]) -> str:
    """Return the class of the outermost module that owns parameters, which tells optimizers' parameters apart."""
    roots = owning_modules(list(parameters))
    if not roots:
        return "optimizer"
    module = roots[0]
    while len(inner := dict(module.named_children())) == 1 and inner.keys() <= {"module", "_orig_mod"}:
        [module] = inner.values()
    return class_name(module)


def prefixed(prefix: str, name: str) -> Iterator[str]:
    """Yield ``Critic.fc.weight``, ``Critic#2.fc.weight``, ... without end.

    Args:
        prefix: As :func:`prefix_of` gives it.
        name: The parameter's name.
    """
    yield f"{prefix}.{name}"
    yield from (f"{prefix}#{number}.{name}" for number in itertools.count(2))
