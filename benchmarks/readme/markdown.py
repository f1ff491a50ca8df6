"""Markdown that the sections share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def origin(machine: dict[str, Any]) -> str:
    """Return in one line where and when a result was measured."""
    versions = f"Python {machine['python']}, torch {machine['versions']['torch']}"
    return f"({machine['processor']}, {machine['cores']} cores, {versions}, {machine['date']})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
    """
    head, *body = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *body])
