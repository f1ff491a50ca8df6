"""Compare a parameter's role with one row of a table kept by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from slimadam.layers.roles import UNKNOWN, ParameterRole, roles_of


class Expected(NamedTuple):
    """The role and layout that a parameter should be given.

    Attributes:
        role: The role.
        layout: One letter for each stored dimension: ``i`` is summed over, ``o`` indexes outputs, anything else is
            neither. ``"oi"`` is how Linear and Embedding store, ``"eoi"`` a stack of experts.
        why: Reason why no role fits, for ``"unknown"``.
    """

    role: str
    layout: str = "oi"
    why: str = ""

    def as_found(self) -> ParameterRole:
        """Return the role that :func:`slimadam.layers.roles.roles_of` should return."""
        fans = (tuple(dim for dim, letter in enumerate(self.layout) if letter == fan) for fan in "io")
        return ParameterRole(self.role, *fans)


class Architecture(NamedTuple):
    """A model and the roles of its parameters, by name, or by name with ``*`` for layer numbers.

    Norms' scales and biases of one dimension need no row (:data:`VECTORS`).
    """

    build: Callable[[], nn.Module]
    roles: Mapping[str, Expected]


class Finding(NamedTuple):
    """The role found for one parameter; ``expected`` is None if the table lacks it."""

    name: str
    shape: tuple[int, ...]
    found: ParameterRole
    expected: Expected | None

    @property
    def correct(self) -> bool:
        """Return whether role and layout are as expected."""
        return self.expected is not None and self.found == self.expected.as_found()

    @property
    def is_matrix(self) -> bool:
        """Return whether it is one of those that a rule can save memory on."""
        return len(self.shape) > 1

    @property
    def unnamed(self) -> bool:
        """Return whether no role was found."""
        return self.found.role == UNKNOWN


VECTORS = {
    "*bias*": Expected("bias", ""),
    "*norm*.weight": Expected("norm", ""),
    "*bn.weight": Expected("norm", ""),
    "*ln_*.weight": Expected("norm", ""),
}


def rows(template: str, layout: str = "oi", /, **roles: str) -> dict[str, Expected]:
    """Return rows whose names differ in one component: ``{}`` in the template.

    Args:
        template: Name of the parameters, with ``{}``.
        layout: A letter for each dimension, ``i`` for inputs and ``o`` for outputs.
        **roles: Role by the component's name.
    """
    return {template.format(name): Expected(role, layout) for name, role in roles.items()}


def collapsed(name: str) -> str:
    """Return a name with ``*`` for layer numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def findings(architecture: Architecture) -> list[Finding]:
    """Return what is found for every parameter of an architecture."""
    model = architecture.build()
    found = roles_of(model)
    return [
        Finding(name, tuple(parameter.shape), found[name], _expected(architecture, name, parameter.dim()))
        for name, parameter in model.named_parameters()
    ]


def stale_rows(architecture: Architecture, found: Iterable[Finding]) -> set[str]:
    """Return names in the table that the model does not have.

    Args:
        architecture: The model and its table.
        found: Findings of the model.
    """
    names = {finding.name for finding in found}
    return set(architecture.roles) - names - {collapsed(name) for name in names}


def _expected(architecture: Architecture, name: str, ndim: int) -> Expected | None:
    row = architecture.roles.get(name) or architecture.roles.get(collapsed(name))
    if row is not None or ndim > 1:
        return row
    return next((row for pattern, row in VECTORS.items() if fnmatchcase(name.lower(), pattern)), None)
