"""The figures of ``docs/sharpness.md``, from their result files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.readme.markdown import origin, table

PARTS = ("uv", "edge", "tracking", "schedule", "regimes")


def section(part: str) -> Callable[[dict[str, Any]], str]:
    """Return a writer for one part of ``python -m benchmarks.sharpness``: each criterion, and the figures behind it."""

    def filled(result: dict[str, Any]) -> str:
        rows = [[finding, "yes" if held else "**no**"] for finding, held in result["findings"].items()]
        rows += [[bar, "pass" if passed else "**fail**"] for bar, passed in result["bars"].items()]
        lines = [f"- {line}" for line in result["table"]]
        command = f"`python -m benchmarks.sharpness {part}` {origin(result['machine'])}:"
        return "\n".join([command, "", table(["criterion", "reproduced"], rows), "", *lines])

    return filled


def cost(result: dict[str, Any]) -> str:
    """Return memory, forward passes and time of a measurement."""
    memory = [
        [row["optimizer"], f"`{row['memory']}`", f"{row['kept']:.2f}", f"{row['direction']:.2f}", f"{row['peak']:.2f}"]
        for row in result["memory"]
    ]
    time = [
        [row["optimizer"], f"`{row['memory']}`", str(row["interval"]), f"{row['forward_passes']:.1f}",
         f"{row['total_share']:.1%}"]
        for row in result["time"]
    ]  # fmt: skip
    return "\n".join(
        [
            f"`python -m benchmarks.sharpness_cost` {origin(result['machine'])}. Extra bytes per parameter over the "
            "shapes of GPT-2 124M in float32; on a CPU the host memory of `offload` is the same memory. "
            "`direction` is the largest parameter's, the token embedding's; the peak is the allocator's:",
            "",
            table(["", "memory", "kept", "direction", "peak"], memory),
            "",
            f"The demo's byte GPT, measured every so many of {result['steps']} steps: forward passes of a measurement "
            "after the first, and the time of all as a share of that of training:",
            "",
            table(["", "memory", "every", "forward passes", "time"], time),
        ]
    )


SECTIONS = {f"sharpness_{part}": section(part) for part in PARTS} | {"sharpness_cost": cost}
