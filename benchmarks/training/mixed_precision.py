"""Pure bfloat16 training with stochastic rounding: ``python -m benchmarks.mixed_precision``.

Trains the demo's model three times on the same batches: float32, and with every parameter in bfloat16, rounded to
nearest or stochastically when written. Bar: stochastic rounding ends within 1% of float32's held-out loss, nearest
does not.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import machine
from slimadam import SlimAdam
from slimadam.demo.data import ByteData, load
from slimadam.demo.training import DemoSettings, Trainee, train

RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16, rounded to nearest": (torch.bfloat16, {}),
    "bfloat16, rounded stochastically": (torch.bfloat16, {"bf16_stochastic_round": True}),
}


def _held_out_losses(settings: DemoSettings, data: ByteData) -> dict[str, float]:
    """Return the held-out loss of each run, in nats per byte."""
    trainees = {}
    for label, (dtype, options) in RUNS.items():
        model = settings.new_model().to(dtype)
        optimizer = SlimAdam(model, lr=settings.lr, plan="rules", **options)
        trainees[label] = Trainee("SlimAdam", model, optimizer, lambda phase, step, loss: None)
    train(settings, data, tuple(trainees.values()))
    return {label: trainee.held_out_loss for label, trainee in trainees.items()}


def main() -> None:
    """Train, print a table, write ``results/mixed_precision.json``; exit 1 if the bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        settings = DemoSettings(seed=seed, steps=arguments.steps)
        losses = _held_out_losses(settings, load(None, settings.context))
        gaps = {label: loss / losses["float32"] - 1 for label, loss in losses.items()}
        runs.append({"seed": seed, "held_out_loss": losses, "gap": gaps})
        for label, loss in losses.items():
            print(f"seed {seed}  {label:34s} {loss:.4f}  {gaps[label]:+.2%}")
    print("written:", machine.write("mixed_precision", {"steps": arguments.steps, "runs": runs}, arguments.out))
    nearest, stochastic = (list(RUNS)[1], list(RUNS)[2])
    if any(run["gap"][stochastic] > 0.01 or run["gap"][nearest] <= 0.01 for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
