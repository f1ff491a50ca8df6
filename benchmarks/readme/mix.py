"""The table of the mixing study for the docs."""

from __future__ import annotations

from typing import Any

from benchmarks.readme.markdown import origin, table


def mix(result: dict[str, Any]) -> str:
    """Return the advice of each seed, and the losses of fine-tuning at it and at both ends."""
    rows = []
    for run in result["runs"]:
        share, (low, high) = run["advice"]["weights"]["prose"], run["advice"]["intervals"]["prose"]
        worse = run["worse_change"]
        rows.append(
            [
                str(run["seed"]),
                "none" if share is None else f"{share:.1f} ({low:.1f} to {high:.1f})",
                "–" if share is None else f"{run['worse_change_at_advised']:+.3f}",
                f"{worse[0]:+.3f}",
                f"{worse[-1]:+.3f}",
                f"{run['best_share']:.1f} ({min(worse):+.3f})",
            ]
        )
    header = ["seed", "advised share of prose", "there", "code alone", "prose alone", "fine-tuning's own best"]
    settings, count = result["settings"], len(result["runs"])
    return "\n".join(
        [
            "Change of the held-out loss, in nats per byte, of the task that fares worse, after "
            f"{settings['finetuning_steps']} steps at learning rate {settings['finetuning_lr']:g} "
            f"{origin(result['machine'])}:",
            "",
            table(header, rows),
            "",
            *(
                f"- {condition}: {sum(run['criterion'][condition] for run in result['runs'])} of {count} seeds"
                for condition in result["runs"][0]["criterion"]
            ),
            "",
            f"All of it at every seed: {'yes' if result['confirmed'] else 'no'}. The share at which fine-tuning itself "
            f"was best lies in the interval of the advice in {result['best_in_interval']} of {count} seeds.",
        ]
    )
