"""The exceptions that slimadam raises for wrong input, and how they show it."""

from __future__ import annotations

import reprlib


class PlanError(ValueError):
    """A compression plan, or a file that should hold one, does not fit.

    The message names the parameter or file, the value found, and what to do about it.
    """


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """``repr`` for an error message, at most 80 characters of it, however large or deep the value is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
