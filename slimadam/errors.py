"""The exceptions that slimadam raises for wrong input, and how they show it."""

from __future__ import annotations


class PlanError(ValueError):
    """A compression plan, or a file that should hold one, does not fit.

    The message names the parameter or file, the value found, and what to do about it.
    """


def shown(value: object) -> str:
    """``repr`` for an error message, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
