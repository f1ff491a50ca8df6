"""Numbers as text for people."""

from __future__ import annotations


def format_bytes(count: int) -> str:
    """Return a number of bytes with a decimal unit."""
    if count < 1000:
        return f"{count} B"
    size, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:,.0f} {units[0]}"


def format_shape(shape: tuple[int, ...] | None) -> str:
    """Return a shape as sizes joined by ``×``."""
    if shape is None:
        return "unknown"
    return " × ".join(map(str, shape)) if shape else "scalar"
