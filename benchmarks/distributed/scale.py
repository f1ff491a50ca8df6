"""Memory and traffic of a GPU under FSDP2, computed without one: ``python -m benchmarks.scale``.

Nothing is timed, and no figure is measured. A model's parameters on the meta device are sharded by ``fully_shard``
among ranks that do not exist (PyTorch's fake process group), and SlimAdam takes a step on them: bytes of state are
what ``optimizer.memory()`` says for those shards, numbers sent what the step hands to its all-reduce. Rank 0 is
looked at, whose shards are the largest.

Weights, gradients and sums are float32, as FSDP2's mixed precision keeps shards, and so is momentum unless said.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.distributed.plot import draw
from benchmarks.harness import machine
from benchmarks.workloads.shapes import MODELS, Shapes, elements
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam
from slimadam.distributed.sharded_rules import LocalRule, local_rules
from slimadam.state.first_moment import stored_first_moment
from slimadam.state.rule import Dims
from slimadam.utils.dtensor import local

DOCS = Path(__file__).resolve().parents[2] / "docs"
RANKS = (8, 64, 256, 512)
ADAMW = "AdamW"
WAYS: dict[str, dict[str, Any]] = {
    ADAMW: {"plan": None},
    "rules": {"plan": "rules"},
    "factored": {"plan": "factored"},
    "rules, bfloat16 momentum": {"plan": "rules", "momentum_dtype": torch.bfloat16},
    "factored, bfloat16 momentum": {"plan": "factored", "momentum_dtype": torch.bfloat16},
}
FLOAT = 4
WEIGHT = 2
"""Bytes of a number that FSDP2 sends: bfloat16, the least that is usual."""
PASSES_OVER_THE_BUFFER = 6
"""Zeroed; read and written with the sums; read and written with their weight; read into the second moments."""


@dataclass(frozen=True)
class Cost:
    """Sizes of what a rank's optimizer keeps, moves and sends, in bytes unless said otherwise.

    Attributes:
        elements: Number of parameter elements on the rank.
        state: All of the optimizer's state.
        second_moments: The second moments in it.
        buffers: Kept beside the state: sums of squares, and rows over their mean.
        moved: Between memory and processor in a step, each tensor as often as it must be.
        numbers_sent: Size of the all-reduce in numbers, one entry for each all-reduce.
    """

    elements: int
    state: int
    second_moments: int
    buffers: int
    moved: int
    numbers_sent: list[int]


@contextmanager
def pretended(ranks: int, rank: int = 0) -> Iterator[None]:
    """Enter a process group of ranks that do not exist, but for this one; collectives return at once.

    Args:
        ranks: Size of the group.
        rank: Number of this process.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(shapes: Shapes, device: str = "meta") -> nn.Module:
    """Return a model's parameters as ``fully_shard`` lays them out, with gradients of zero.

    Args:
        shapes: Shapes by qualified name.
        device: Device of the shards; on ``"meta"`` they take no memory.
    """
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    model = skeleton(shapes, device)
    fully_shard(model, mesh=mesh)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    return model


def optimizer_of(model: nn.Module, way: str) -> SlimAdam:
    """Return SlimAdam in one of the ways, without samples for ``snr_check()``.

    Args:
        model: Model whose parameters are trained.
        way: A key of :data:`WAYS`.
    """
    return SlimAdam(model, monitor=False, **WAYS[way])


def cost(optimizer: SlimAdam) -> Cost:
    """Take a step with the pending gradients, and count."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    with mock.patch.object(dist, "all_reduce", counted):
        optimizer.step()
    told = optimizer.memory()
    held = list(_held(optimizer))
    rows = sum(math.prod(rule.stored_shape(dims[0])) for _, rule, dims in held if len(dims) == 2 and _asks(rule, dims))
    moved = sum(_moved(param, rule, dims, stored_first_moment(optimizer.state[param])) for param, rule, dims in held)
    return Cost(
        elements=sum(local(param).numel() for param, _, _ in held),
        state=told.total,
        second_moments=told.exp_avg_sq,
        buffers=FLOAT * (sum(sent) + 2 * rows),
        moved=moved + FLOAT * PASSES_OVER_THE_BUFFER * sum(sent),
        numbers_sent=sent,
    )


def _held(optimizer: SlimAdam) -> Iterator[tuple[Tensor, LocalRule, Sequence[Dims]]]:
    """Yield each parameter with its rule on this rank, and the averaged dimensions of each of its second moments."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, (name, rule) in zip(params, optimizer.plan.items(), strict=True):
        (here,) = local_rules(name, [rule], param)
        yield param, here, rule.averaged_dims(param.dim())


def _asks(rule: LocalRule, averaged: Sequence[Dims]) -> bool:
    """Return whether a second moment needs other ranks."""
    return any(rule.summed_over(dims) for dims in averaged)


def _moved(param: Tensor, rule: LocalRule, averaged: Sequence[Dims], exp_avg: Tensor) -> int:
    """Return the bytes of a step: weight and moments read and written, the gradient read, twice for averages."""
    gradient = 2 if _asks(rule, averaged) else 1
    momentum = 2 * exp_avg.dtype.itemsize
    moments = sum(math.prod(rule.stored_shape(dims)) for dims in averaged)
    return local(param).numel() * (FLOAT * (2 + gradient) + momentum) + 2 * FLOAT * moments


def on_wire(numbers: int, ranks: int) -> float:
    """Return the bytes that each rank sends in a ring's all-reduce of float32 numbers.

    Args:
        numbers: Numbers that are reduced.
        ranks: Size of the ring.
    """
    return 2 * FLOAT * numbers * (ranks - 1) / ranks


def fsdp_on_wire(parameters: int, ranks: int) -> float:
    """Return the bytes that each rank sends for a forward and a backward pass.

    Weights are gathered twice and gradients scattered once.

    Args:
        parameters: Elements of the model.
        ranks: Size of the group.
    """
    return 3 * WEIGHT * parameters * (ranks - 1) / ranks


def _figures_of(shapes: Shapes, ranks: int) -> dict[str, Any]:
    """Return the cost of each way to train a model on a number of ranks."""
    found: dict[str, Any] = {"fsdp_on_wire": fsdp_on_wire(elements(shapes), ranks), "ways": {}}
    with pretended(ranks):
        model = sharded(shapes)
        for label in WAYS:
            optimizer = optimizer_of(model, label)
            counted = cost(optimizer)
            wire = on_wire(sum(counted.numbers_sent), ranks)
            found["ways"][label] = {**asdict(counted), "on_wire": wire}
        found["adamw_state"] = optimizer.memory().adamw_total
    return found


def wrong(models: dict[str, Any]) -> list[str]:
    """Return a line wherever ``plan=None`` does not count as AdamW does, or a step sends more than one all-reduce."""
    found = []
    for model, by_ranks in models.items():
        for ranks, figures in by_ranks["ranks"].items():
            place = f"FAIL {model}, {ranks} ranks"
            if figures["ways"][ADAMW]["state"] != figures["adamw_state"] or figures["ways"][ADAMW]["numbers_sent"]:
                found.append(f"{place}: plan=None is not AdamW")
            for label, way in figures["ways"].items():
                if label != ADAMW and len(way["numbers_sent"]) != 1:
                    found.append(f"{place}, {label}: {len(way['numbers_sent'])} all-reduces")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute, print, write ``results/scale.json`` and ``docs/scale.png``; 1 if the accounting contradicts itself."""
    parser = machine.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-8b", "llama-70b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the picture")
    options = parser.parse_args(arguments)
    models: dict[str, Any] = {}
    for model in options.models:
        shapes = MODELS[model]()
        models[model] = {"parameters": elements(shapes), "ranks": {}}
        for ranks in options.ranks:
            figures = models[model]["ranks"][str(ranks)] = _figures_of(shapes, ranks)
            for label, way in figures["ways"].items():
                print(
                    f"{model:10s} {ranks:4d} ranks  {label:28s} state {way['state'] / 1e9:8.3f} GB  "
                    f"moved {way['moved'] / 1e9:8.3f} GB  sent {sum(way['numbers_sent']):>10,} numbers",
                    flush=True,
                )
    failures = wrong(models)
    print("\n".join([*failures, f"written: {machine.write('scale', {'models': models}, options.out)}"]))
    print("written:", draw(models, options.docs / "scale.png"))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
