"""Check the properties of PyTorch's own optimizer suite: ``python -m benchmarks.torch_properties``.

Runs each property of ``tests/optim/torch_properties.py`` on AdamW (which shows that the property is one) and on
SlimAdam with and without compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import machine
from tests.optim.torch_properties import CANNOT_APPLY, NOT_ON_A_CPU, NOT_YET, PROPERTIES, VARIANTS, check

PASSES, FAILS, NOT_BUILT, CANNOT = "passes", "fails", "not yet", "cannot apply"


def outcome(name: str, variant: str) -> tuple[str, str]:
    """Return whether one property holds for one variant, and the reason if it does not.

    Args:
        name: A key of ``PROPERTIES``.
        variant: A key of ``VARIANTS``.
    """
    if (name, variant) in CANNOT_APPLY:
        return CANNOT, CANNOT_APPLY[name, variant]
    if (name, variant) in NOT_YET:
        return NOT_BUILT, NOT_YET[name, variant]
    try:
        check(name, VARIANTS[variant])
    except Exception as error:
        return FAILS, f"{type(error).__name__}: {error}".splitlines()[0]
    return PASSES, ""


def share(outcomes: dict[str, str]) -> dict[str, Any]:
    """Return how many of the properties that apply to a variant hold."""
    applicable = [name for name, result in outcomes.items() if result != CANNOT]
    passed = [name for name in applicable if outcomes[name] == PASSES]
    return {"passed": len(passed), "applicable": len(applicable), "share": len(passed) / len(applicable)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write ``results/torch_properties.json``; exit 1 if a property fails."""
    out = machine.results_folder(__doc__, arguments)
    torch.set_num_threads(1)
    table = {name: {variant: outcome(name, variant) for variant in VARIANTS} for name in PROPERTIES}
    print(f"{'':50s}" + "".join(f"{variant:>28s}" for variant in VARIANTS))
    for name, row in table.items():
        print(f"{name:50s}" + "".join(f"{row[variant][0]:>28s}" for variant in VARIANTS))
    reasons = {
        f"{name}, {variant}": reason for name, row in table.items() for variant, (_, reason) in row.items() if reason
    }
    for where, reason in {**reasons, **NOT_ON_A_CPU}.items():
        print(f"{where}: {reason}")
    outcomes = {variant: {name: row[variant][0] for name, row in table.items()} for variant in VARIANTS}
    shares = {variant: share(results) for variant, results in outcomes.items()}
    for variant, figures in shares.items():
        print(f"{variant}: {figures['passed']} of {figures['applicable']} properties hold ({figures['share']:.1%})")
    figures = {"shares": shares, "outcomes": outcomes, "reasons": reasons, "not_on_a_cpu": dict(NOT_ON_A_CPU)}
    print("written:", machine.write("torch_properties", figures, out))
    if any(result == FAILS for results in outcomes.values() for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
