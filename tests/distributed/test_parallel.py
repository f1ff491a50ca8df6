"""Tensor parallelism, alone and under FSDP2, and hybrid sharding, as torch itself lays parameters out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, Rule, SlimAdam
from tests.distributed.test_step import full
from tests.ranks import on_ranks
from tests.versions import shards

PLANS = {
    "inputs": {"0.weight": Rule((1,), "mean"), "2.weight": Rule((1,), "mean")},
    "outputs": {"0.weight": Rule((0,), "mean"), "2.weight": Rule((0,), "mean"), "0.bias": Rule((0,), "mean")},
    "factored": {"0.weight": Rule(form="factored"), "2.weight": Rule(form="factored")},
}
STEPS = 10


def _model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 7))


def _parallel(kind: str) -> tuple[nn.Module, int, int]:
    """The model as the kind says, the number of shares of a batch, and which this rank takes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, layout = _model(), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if kind == "tensor parallel":
        return parallelize_module(model, init_device_mesh("cpu", (4,)), layout), 1, 0
    names = ("data", "tensor") if kind == "FSDP2 and tensor parallel" else ("replicas", "data")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    if names[1] == "tensor":
        parallelize_module(model, mesh["tensor"], layout)
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh["data"])
        return model, 2, mesh.get_local_rank("data")
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model, 4, torch.distributed.get_rank()


def _train(model: nn.Module, plan: dict[str, Rule], shares: int = 1, share: int = 0, **options: Any) -> None:
    optimizer = SlimAdam(model.named_parameters(), lr=1e-2, plan=CompressionPlan(plan), **options)
    generator = torch.Generator().manual_seed(6)
    for _ in range(STEPS):
        batch = torch.randn(12, 9, generator=generator).chunk(shares)[share]
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def _differences(kind: str) -> dict[str, float]:
    found = {}
    for name, plan in PLANS.items():
        alone = _model()
        together, shares, share = _parallel(kind)
        _train(alone, plan)
        _train(together, plan, shares, share)
        pairs = zip(alone.parameters(), together.parameters(), strict=True)
        found[name] = max(float((full(one) - full(other)).abs().max()) for one, other in pairs)
    return found


@shards
@pytest.mark.parametrize("kind", ["FSDP2 and tensor parallel", "hybrid", "tensor parallel"])
def test_training_agrees_with_one_process(kind: str, tmp_path: Path) -> None:
    for found in on_ranks(4, tmp_path, _differences, kind):
        assert max(found.values()) <= 2e-5, found
