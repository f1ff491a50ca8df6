"""A fused query-key-value weight as one matrix, as three, and head by head: ``python -m benchmarks.parts``.

The demo's GPT with its three projections in one weight is calibrated once for each reading, all in the same run, and
then trained with each plan from the same initialisation on the same batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.harness import machine
from benchmarks.workloads.language import Bytes
from benchmarks.workloads.training import loss_with, recorded
from slimadam import CompressionPlan, Split
from slimadam.demo.model import Block, ByteGPT
from slimadam.demo.training import DemoSettings
from slimadam.plans.selection import Forms

SETTINGS = DemoSettings()
WIDTH, HEADS = SETTINGS.width, SETTINGS.heads
FUSED = "*.qkv_proj.weight"
READINGS: dict[str, Mapping[str, Split]] = {
    "one matrix": {FUSED: Split({"qkv": 3 * WIDTH})},
    "three matrices": {},
    "heads": {FUSED: Split({"qkv": 3 * HEADS}, view=(3 * HEADS, WIDTH // HEADS, WIDTH), batch_dims=1)},
}
FORMS: tuple[Forms, ...] = ("mean", "best")


class FusedAttention(nn.Module):
    """The demo's attention with query, key and value in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; shape ``[batch, length, width]`` in and out."""
        fused = self.qkv_proj(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(fused[0], fused[1], fused[2], is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


def fused_gpt(settings: DemoSettings) -> nn.Module:
    """Return the demo's model with fused attention, from the same initial numbers."""
    model = ByteGPT(settings.layers, settings.width, settings.heads, settings.context)
    for block in model.blocks:
        assert isinstance(block, Block)
        separate, fused = block.attention, FusedAttention()
        fused.qkv_proj.weight.data.copy_(torch.cat([separate.query.weight, separate.key.weight, separate.value.weight]))
        fused.out.weight.data.copy_(separate.out.weight)
        block.add_module("attention", fused)
    return model


def _compare(lr: float, steps: int, seed: int) -> dict[str, Any]:
    """Return SNR, second moments kept and held-out loss of each reading and choice of forms."""
    job = Bytes(fused_gpt)
    adamw = loss_with(job, None, lr, steps, seed)
    plans = {
        f"{label}, {forms}": CompressionPlan.from_snr(history, forms=forms)
        for label, history in recorded(job, lr, steps, seed, READINGS).items()
        for forms in FORMS
    }
    losses = {label: loss_with(job, plan, lr, steps, seed) for label, plan in plans.items()}
    return {
        "seed": seed,
        "adamw": adamw,
        "readings": {
            label: {
                "loss": losses[label],
                "gap": losses[label] / adamw - 1,
                "saved": plan.second_moments_saved,
                "chosen": {
                    key: {"form": rule.form, "dims": rule.dims, "snr": _best(rule.snr)}
                    for key, rule in plan.items()
                    if "qkv_proj" in key
                },
            }
            for label, plan in plans.items()
        },
    }


def _best(snr: Mapping[Any, float]) -> dict[str, float]:
    return {str(candidate): value for candidate, value in snr.items()}


def main() -> None:
    """Calibrate, train, print a table, write ``results/parts.json``."""
    parser = machine.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        run = _compare(arguments.lr, arguments.steps, seed)
        runs.append(run)
        for label, reading in run["readings"].items():
            print(f"seed {seed}  {label:22s} {reading['gap']:+.2%}  {reading['saved']:.1%} saved", flush=True)
    means = {label: statistics.mean(run["readings"][label]["gap"] for run in runs) for label in runs[0]["readings"]}
    for label, mean in means.items():
        print(f"{label}: {mean:+.2%} on average")
    settings = {"lr": arguments.lr, "steps": arguments.steps}
    print("written:", machine.write("parts", {**settings, "runs": runs, "mean_gap": means}, arguments.out))


if __name__ == "__main__":
    main()
