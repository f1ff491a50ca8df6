"""DistributedDataParallel: each rank has a share of the batch, and the training is that of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam
from tests.ranks import on_ranks

STEPS = 10
MEASURED = 4
TOLERANCE = 2e-5
LR = 1e-2


class Network(nn.Module):
    """An attention, whose query, key and value are one weight, and two matrices of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        # A bias of the key has no gradient but rounding, which Adam makes steps of.
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
        self.up = nn.Linear(6, 18)
        self.down = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.attention(x, x, x, need_weights=False)[0])))


def network() -> Network:
    torch.manual_seed(1)
    return Network()


def batches(first: int = 0, end: int = STEPS) -> list[Tensor]:
    """A batch for each of some steps; 2, 3 and 4 ranks get equal shares of one."""
    return [torch.randn(12, 3, 6, generator=torch.Generator().manual_seed(step)) for step in range(first, end)]


def shares(of: Iterable[Tensor]) -> list[Tensor]:
    """What this rank gets of each batch."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return [batch.chunk(ranks)[rank] for batch in of]


def train(model: nn.Module, optimizer: Any, data: Iterable[Tensor]) -> None:
    for batch in data:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


PLANS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "rules": lambda: "rules",
    "factored": lambda: "factored",
    "plan": lambda: CompressionPlan(
        {
            "up.weight": Rule((0,), "mean"),
            "down.weight": Rule(form="factored"),
            "attention.out_proj.weight": Rule((1,), "mean"),
        }
    ),
    "auto": lambda: AutoPlan(calibration_steps=MEASURED, measurements=2, cutoff=0.01),
}


def storage(plan: CompressionPlan) -> dict[str, Any]:
    """How each parameter of a plan is stored."""
    return {key: (rule.form, rule.dims) for key, rule in plan.items()}


def worst(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two models' parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _train_both() -> dict[str, Any]:
    found = {}
    for name, plan in PLANS.items():
        alone, together = network(), network()
        slim = SlimAdam(alone, lr=LR, plan=plan())
        train(alone, slim, batches())
        ddp = nn.parallel.DistributedDataParallel(together)
        shared = SlimAdam(ddp, lr=LR, plan=plan())
        train(ddp, shared, shares(batches()))
        found[name] = {
            "worst": worst(alone, together),
            "storage": [storage(slim.plan), storage(shared.plan)],
            "snr": [[rule.snr for rule in one.plan.values()] for one in (slim, shared)],
            "weights": [param.tolist() for param in together.parameters()],
        }
    return found


def test_training_equals_one_process(tmp_path: Path) -> None:
    of_ranks = on_ranks(3, tmp_path, _train_both)  # on two those of ZeRO-1
    for name in PLANS:
        for found in of_ranks:
            alone, together = found[name]["storage"]
            assert alone == together
            assert any(form != "full" for form, _ in together.values()) == (name != "None")
            assert found[name]["worst"] <= TOLERANCE, name
            # Every rank steps and decides alone; nothing but equal numbers keeps them together.
            assert found[name]["weights"] == of_ranks[0][name]["weights"]
            assert found[name]["snr"][1] == of_ranks[0][name]["snr"][1]
