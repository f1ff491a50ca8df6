"""The figures of ``docs/sharpness.md``, from their result files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.readme_calibration import origin, table

PARTS = ("uv", "edge", "tracking", "schedule", "regimes")


def section(part: str) -> Callable[[dict[str, Any]], str]:
    """What a part of ``python -m benchmarks.sharpness`` found: each criterion, and the figures behind it."""

    def filled(result: dict[str, Any]) -> str:
        rows = [[finding, "yes" if held else "**no**"] for finding, held in result["findings"].items()]
        rows += [[bar, "pass" if passed else "**fail**"] for bar, passed in result["bars"].items()]
        lines = [f"- {line}" for line in result["table"]]
        command = f"`python -m benchmarks.sharpness {part}` {origin(result['machine'])}:"
        return "\n".join([command, "", table(["criterion", "reproduced"], rows), "", *lines])

    return filled


SECTIONS = {f"sharpness_{part}": section(part) for part in PARTS}
