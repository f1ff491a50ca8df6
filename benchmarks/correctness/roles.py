"""Compare the roles of parameters with a table kept by hand: ``python -m benchmarks.roles``.

Compares :func:`slimadam.layers.roles.roles_of` with a table kept by hand, for toy sizes of published architectures and
for modules as people write them. Bar: no role or layout is wrong, and no matrix is without a role but those of which
the table says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import transformers

from benchmarks.harness import machine
from benchmarks.workloads.roles.architectures import ARCHITECTURES
from benchmarks.workloads.roles.expected_roles import Architecture, Finding, collapsed, findings
from benchmarks.workloads.roles.written_modules import MODULES


def table(found: list[Finding]) -> list[str]:
    """Return one line for the matrices that differ in nothing but their layer's number."""
    return list(dict.fromkeys(_line(finding) for finding in found if finding.is_matrix))


def _line(finding: Finding) -> str:
    shape = "x".join(str(size) for size in finding.shape)
    role = finding.found
    why = finding.expected.why if finding.expected else ""
    remark = why if finding.correct else f"WRONG, expected {finding.expected}"
    fans = f"{list(role.fan_in)!s:>10} {list(role.fan_out)!s:>8}"
    return f"{collapsed(finding.name):72s} {shape:>10s}  {role.role:22s}{fans}  {remark}".rstrip()


def count(found: list[Finding]) -> dict[str, int]:
    """Count matrices: all, with the right role, without one on purpose, wrong; and count wrong vectors."""
    matrices = [finding for finding in found if finding.is_matrix]
    return {
        "matrices": len(matrices),
        "named": sum(finding.correct and not finding.unnamed for finding in matrices),
        "unknown": sum(finding.correct and finding.unnamed for finding in matrices),
        "wrong": sum(not finding.correct for finding in matrices),
        "wrong_vectors": sum(not finding.correct for finding in found if not finding.is_matrix),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write ``results/roles.json``; exit 1 if anything is wrong."""
    out = machine.results_folder(__doc__, arguments)
    transformers.logging.set_verbosity_error()
    sources: dict[str, dict[str, Architecture]] = {"transformers": ARCHITECTURES, "written": MODULES}
    result: dict[str, Any] = {"transformers": metadata.version("transformers"), "architectures": []}
    everything: list[Finding] = []
    for source, architectures in sources.items():
        for label, architecture in architectures.items():
            found = findings(architecture)
            lines = table(found)
            print("", label, *(f"  {line}" for line in lines), sep="\n")
            compact = [" ".join(line.split()) for line in lines]
            result["architectures"].append({"name": label, "source": source, **count(found), "parameters": compact})
            everything += found
    total = count(everything)
    named = f"{total['named']} of {total['matrices']} matrices named"
    print(f"\n{named}, {total['unknown']} unknown, {total['wrong']} wrong")
    print("written:", machine.write("roles", {"total": total, **result}, out))
    if total["wrong"] or total["wrong_vectors"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
