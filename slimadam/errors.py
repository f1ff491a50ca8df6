"""The exceptions that slimadam raises for wrong input."""

from __future__ import annotations


class PlanError(ValueError):
    """A compression plan, or a file that should hold one, does not fit.

    The message names the parameter or file, the value found, and what to do about it.
    """
