"""Training on shards against one process: ``python -m benchmarks.distributed``.

Ten float32 steps with each implementation on 2 and 3 ranks, whose shards are uneven and some empty: the largest
difference of a parameter or moment from the same training on one process, and how many all-reduces each step sends.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.harness import machine
from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.utils.dtensor import full_tensor

STEPS = 10
LARGEST_DIFFERENCE = 2e-5
BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "compiled": {},
}
SHAPES = ((7, 5), (2, 5), (1, 1), (4, 3, 5))
RULES = (Rule(), Rule((0,), "mean"), Rule((1,), "mean"), Rule(form="factored"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print a table and write ``results/distributed.json``; 1 if a bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args(arguments)
    rows = [row for ranks in options.ranks for row in _on_ranks(ranks, options.backends)]
    missed = []
    for row in rows:
        sent = row["all_reduces_per_step"]
        print(
            f"{row['ranks']} ranks  {row['backend']:10s} shards of dimension {row['sharded']}  largest difference "
            f"{row['difference']:.1e} (bar {LARGEST_DIFFERENCE:.0e})  all-reduces a step {sent} (bar {row['expected']})"
        )
        if not row["difference"] <= LARGEST_DIFFERENCE or sent != [row["expected"]]:
            missed.append(f"FAIL {row['ranks']} ranks, {row['backend']}, dimension {row['sharded']}")
    print("\n".join([*missed, f"written: {machine.write('distributed', {'steps': STEPS, 'rows': rows}, options.out)}"]))
    return 1 if missed else 0


def _on_ranks(ranks: int, backends: Sequence[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (ranks, list(backends), folder), nprocs=ranks)  # type: ignore[no-untyped-call]
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _rank(rank: int, ranks: int, backends: Sequence[str], folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = [{"ranks": ranks, **_compared(backend, dim)} for backend in backends for dim in (0, 1)]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def _compared(backend: str, sharded: int) -> dict[str, Any]:
    """Train once in full and once in shards of one dimension, and compare."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    cases = [(shape, rule) for shape in SHAPES for rule in RULES]
    plan = CompressionPlan({f"p{index}": rule for index, (_, rule) in enumerate(cases)})
    alone = [nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in cases]
    split = [
        nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(sharded)], src_data_rank=None)) for param in alone
    ]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "plan": plan, **BACKENDS[backend]}
    optimizers = [
        SlimAdam([(f"p{index}", param) for index, param in enumerate(params)], **settings) for params in (alone, split)
    ]
    used = optimizers[1].backend("p0")
    if used != backend:
        raise SystemExit(f"{backend} does not run here, but {used}; leave it out by --backends")
    sent = set()
    for _ in range(STEPS):
        for one, other in zip(alone, split, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = distribute_tensor(one.grad, mesh, [Shard(sharded)], src_data_rank=None)
        optimizers[0].step()
        with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
            optimizers[1].step()
        sent.add(sum(counted.get_comm_counts().values()))
    difference = max(
        float((full_tensor(a.detach()) - full_tensor(b.detach())).abs().max())
        for one, other in zip(alone, split, strict=True)
        for a, b in zip(_tensors(optimizers[0], one), _tensors(optimizers[1], other), strict=True)
    )
    return {
        "backend": backend,
        "sharded": sharded,
        "difference": difference,
        "all_reduces_per_step": sorted(sent),
        "expected": 1,
    }


def _tensors(optimizer: SlimAdam, param: Tensor) -> list[Tensor]:
    state = optimizer.state[param]
    return [param, *(value for key, value in state.items() if key.startswith("exp_avg"))]


if __name__ == "__main__":
    raise SystemExit(main())
