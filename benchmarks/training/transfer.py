"""A plan calibrated on a narrow, shallow model against one of the large model's own: ``python -m benchmarks.transfer``.

Both are calibrated at a tenth of the learning rate; then the large model trains with each, from the same
initialisation on the same batches. Bar: the carried plan's held-out loss is at most 0.5% above that of the own plan
(mean of the seeds).
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness import machine
from benchmarks.workloads.language import Bytes
from benchmarks.workloads.training import loss_with, recorded
from slimadam import CompressionPlan
from slimadam.demo.model import ByteGPT
from slimadam.plans.selection import Forms

SMALL, LARGE = {"layers": 2, "width": 64, "heads": 2}, {"layers": 4, "width": 128, "heads": 4}
FORMS: tuple[Forms, ...] = ("mean", "best")
BAR = 0.005


def task(size: dict[str, int]) -> Bytes:
    """Return the demo's job with a byte GPT of the given size."""
    return Bytes(lambda settings: ByteGPT(size["layers"], size["width"], size["heads"], settings.context))


def _compare(lr: float, steps: int, seed: int) -> dict[str, Any]:
    """Return held-out losses of the large model with AdamW and, for each choice of forms, with both plans."""
    small, large = task(SMALL), task(LARGE)
    histories = {
        origin: recorded(job, lr, steps, seed, {origin: {}})[origin]
        for origin, job in (("own", large), ("carried", small))
    }
    found: dict[str, Any] = {"seed": seed, "adamw": loss_with(large, None, lr, steps, seed)}
    for forms in FORMS:
        plans = {origin: CompressionPlan.from_snr(history, forms=forms) for origin, history in histories.items()}
        plans["carried"] = plans["carried"].for_model(large.new_model(seed))
        losses = {origin: loss_with(large, plan, lr, steps, seed) for origin, plan in plans.items()}
        found[forms] = {
            "loss": losses,
            "saved": {origin: plan.second_moments_saved for origin, plan in plans.items()},
            "agree": _agreement(plans["own"], plans["carried"]),
            "difference": losses["carried"] / losses["own"] - 1,
        }
    return found


def _agreement(a: CompressionPlan, b: CompressionPlan) -> float:
    """Return the share of the matrices that two plans store alike."""
    matrices = [name for name, rule in a.items() if len(rule.shape or ()) > 1]
    alike = [name for name in matrices if (a[name].form, a[name].dims) == (b[name].form, b[name].dims)]
    return len(alike) / len(matrices)


def main() -> None:
    """Calibrate, carry over, train; print a table, write ``results/transfer.json``; exit 1 if the bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        run = _compare(arguments.lr, arguments.steps, seed)
        runs.append(run)
        for forms in FORMS:
            own, carried = run[forms]["loss"]["own"], run[forms]["loss"]["carried"]
            print(
                f"seed {seed}  {forms:4s}  AdamW {run['adamw']:.4f}  own plan {own:.4f}  carried {carried:.4f} "
                f"({run[forms]['difference']:+.2%})  {run[forms]['agree']:.0%} of matrices alike",
                flush=True,
            )
    means = {forms: statistics.mean(run[forms]["difference"] for run in runs) for forms in FORMS}
    for forms, mean in means.items():
        print(f"{forms}: {mean:+.2%} on average, bar {BAR:.1%}")
    settings = {"lr": arguments.lr, "steps": arguments.steps, "small": SMALL, "large": LARGE}
    print("written:", machine.write("transfer", {**settings, "runs": runs, "mean_difference": means}, arguments.out))
    if any(mean > BAR for mean in means.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
