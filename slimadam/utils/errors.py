"""The exception that slimadam raises for wrong plans, and helpers for error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class PlanError(ValueError):
    """A compression plan, or a file that should hold one, does not fit.

    The message names the parameter or file, the value found, and what to do about it.
    """


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"did you mean 'weight'?"`` for a name that looks like a slip, else an empty text.

    Args:
        name: The unknown name.
        known: The known names.
        cutoff: Least similarity, as in ``difflib``.
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return ``repr`` for an error message, at most 80 characters of it, however large or deep the value is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
