"""The figures of ``docs/scale.md``, from their result file."""

from __future__ import annotations

from typing import Any

from benchmarks.readme.markdown import origin, table

ADAMW = "AdamW"
CARD = 80
"""Memory of the GPU that savings are compared with, GB."""
SENDS = ("rules", "factored")
"""One of each plan: momentum is not sent."""


def scale(result: dict[str, Any]) -> str:
    """Return memory, bytes moved and bytes sent of each model, by number of ranks."""
    lines = [f"Computed, not measured: `python -m benchmarks.scale` {origin(result['machine'])}.", ""]
    for model, found in result["models"].items():
        lines += [f"### {model}: {found['parameters'] / 1e9:.1f} billion parameters", ""]
        lines += ["On the GPU that holds most, GB:", "", _memory(found["ranks"]), ""]
        lines += ["Moved between memory and processor in a step, GB:", "", _moved(found["ranks"]), ""]
        lines += ["Sent by each GPU:", "", _sent(found["ranks"]), ""]
    return "\n".join(lines[:-1])


def _memory(by_ranks: dict[str, Any]) -> str:
    rows = [["weights and gradients", *(_gb(8 * found["ways"][ADAMW]["elements"]) for found in by_ranks.values())]]
    for way in _ways(by_ranks):
        rows.append([f"state, {way}", *(_gb(found["ways"][way]["state"]) for found in by_ranks.values())])
    for way in SENDS:
        saved = [found["ways"][ADAMW]["state"] - _kept(found["ways"][way]) for found in by_ranks.values()]
        rows.append([f"saved by {way}, of {CARD} GB", *(f"{_gb(one)} ({one / CARD / 1e9:.1%})" for one in saved)])
    for way in SENDS:
        kept = [
            found["ways"][way]["second_moments"] / found["ways"][ADAMW]["second_moments"] for found in by_ranks.values()
        ]
        rows.append([f"second moments kept, {way}", *(f"{share:.2%}" for share in kept)])
    return table(_header(by_ranks), rows)


def _moved(by_ranks: dict[str, Any]) -> str:
    rows = []
    for way in _ways(by_ranks):
        cells = []
        for found in by_ranks.values():
            moved = found["ways"][way]["moved"]
            ratio = "" if way == ADAMW else f" ({moved / found['ways'][ADAMW]['moved']:.2f})"
            cells.append(f"{_gb(moved)}{ratio}")
        rows.append([way, *cells])
    return table(_header(by_ranks), rows)


def _sent(by_ranks: dict[str, Any]) -> str:
    rows = [["FSDP2, one forward and backward pass, GB", *(_gb(found["fsdp_on_wire"]) for found in by_ranks.values())]]
    for way in SENDS:
        ways = [found["ways"][way] for found in by_ranks.values()]
        rows.append([f"{way}: numbers in the all-reduce", *(f"{sum(one['numbers_sent']):,}" for one in ways)])
        rows.append([f"{way}: MB in a ring", *(f"{one['on_wire'] / 1e6:.1f}" for one in ways)])
        shares = [found["ways"][way]["on_wire"] / found["fsdp_on_wire"] for found in by_ranks.values()]
        rows.append([f"{way}: of FSDP2's", *(f"{share:.4%}" for share in shares)])
    return table(_header(by_ranks), rows)


def _kept(way: dict[str, Any]) -> int:
    """Return the bytes of the state and of the buffers beside it."""
    kept: int = way["state"] + way["buffers"]
    return kept


def _ways(by_ranks: dict[str, Any]) -> list[str]:
    return list(next(iter(by_ranks.values()))["ways"])


def _header(by_ranks: dict[str, Any]) -> list[str]:
    return ["", *(f"{ranks} GPUs" for ranks in by_ranks)]


def _gb(count: float) -> str:
    """Return gigabytes with three digits, without an exponent."""
    value = count / 1e9
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


SECTIONS = {"scale": scale}
