"""One optimizer per parameter that steps in the backward pass, on sharded parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimadam import SlimAdam
from tests.distributed.test_ddp import LR, PLANS, TOLERANCE, Network, batches, network, storage, train
from tests.distributed.test_step import full
from tests.ranks import on_ranks
from tests.versions import shards


def step_in_backward(model: nn.Module, **options: Any) -> dict[Tensor, SlimAdam]:
    """An optimizer for each parameter, which steps as soon as its gradient is there and lets go of it."""

    def step_and_free(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    optimizers = {param: SlimAdam([param], model=model, **options) for param in model.parameters()}
    for param in optimizers:
        param.register_post_accumulate_grad_hook(step_and_free)
    return optimizers


def by_rows(model: Network) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.attention, model.up, model):
        fully_shard(layer)


def replicated_and_by_rows(model: Network) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for layer in (model.attention, model.up, model):
        fully_shard(layer, mesh=mesh)


def tensor_parallel(model: Network) -> None:
    """Two ranks share out the matrices of each of two shares of the batch, which share out what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shares", "matrices"))
    parallelize_module(model, mesh["matrices"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for layer in (model.attention, model.up, model.down):
        fully_shard(layer, mesh=mesh["shares"])


MESHES = {"replicated and by rows": (replicated_and_by_rows, 4), "tensor parallel": (tensor_parallel, 2)}


def _train_on_meshes() -> list[dict[str, Any]]:
    return [_train_both(shard, ways, ("auto", "plan")) for shard, ways in MESHES.values()]


def _train_both(shard: Any, ways: int, plans: Sequence[str]) -> dict[str, Any]:
    """Errors and plans for each plan; ``ways`` is how many shares the batch is cut into."""
    found = {}
    for name, plan in ((name, PLANS[name]) for name in plans):
        alone, together = network(), network()
        slim = SlimAdam(alone, lr=LR, plan=plan())
        train(alone, slim, batches())
        shard(together)
        optimizers = step_in_backward(together, lr=LR, plan=plan())
        for batch in batches():
            share = torch.distributed.get_rank() * ways // torch.distributed.get_world_size()
            together(batch.chunk(ways)[share]).square().mean().backward()
            assert all(param.grad is None for param in together.parameters())
        pairs = zip(alone.parameters(), together.parameters(), strict=True)
        found[name] = {
            "worst": max(float((full(one) - full(other)).abs().max()) for one, other in pairs),
            "storage": [
                storage(slim.plan),
                {key: how for one in optimizers.values() for key, how in storage(one.plan).items()},
            ],
        }
    return found


@shards
def test_fully_sharded_training_equals_one_process(tmp_path: Path) -> None:
    for found in on_ranks(3, tmp_path, _train_both, by_rows, 3, tuple(PLANS)):
        _check(found)


@shards
def test_training_on_a_mesh_equals_one_process(tmp_path: Path) -> None:
    for of_meshes in on_ranks(4, tmp_path, _train_on_meshes):
        assert len(of_meshes) == len(MESHES)
        for found in of_meshes:
            _check(found)


def _check(found: dict[str, Any]) -> None:
    for name, of_plan in found.items():
        alone, together = of_plan["storage"]
        assert alone == together, name
        assert of_plan["worst"] <= TOLERANCE, name
