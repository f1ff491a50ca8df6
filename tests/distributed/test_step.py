"""The step on DTensors: the same training on every mesh as on one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.distributed import all_reduce
from slimadam.optim.step import dispatch
from tests.ranks import on_ranks
from tests.reference import first_moment, gradients, second_moments
from tests.versions import TORCH, shards

STEPS = 10
TOLERANCE = 2e-5
BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "compiled": {},
    "triton": {},
}
MESHES: dict[str, tuple[tuple[int, ...], list[str]]] = {
    "2 ranks, rows": ((2,), ["0"]),
    "2 ranks, columns": ((2,), ["1"]),
    "3 ranks, rows": ((3,), ["0"]),
    "3 ranks, columns": ((3,), ["1"]),
    "3 ranks, replicated": ((3,), ["r"]),
    "2x2, rows and columns": ((2, 2), ["0", "1"]),
    "2x2, columns and rows": ((2, 2), ["1", "0"]),
    "2x2, replicated and rows": ((2, 2), ["r", "0"]),
    "2x2, rows twice": ((2, 2), ["0", "0"]),
    "2x2, strided rows": ((2, 2), ["s", "0"]),
    "1x3, columns and rows": ((1, 3), ["1", "0"]),
}
FEW_MESHES = ("2 ranks, rows", "3 ranks, rows", "3 ranks, columns", "2x2, columns and rows")
"""Averages are made before any implementation runs, so that one of them goes through all meshes."""
MESHES_OF = {"compiled": tuple(MESHES), "triton": ("2 ranks, rows", "3 ranks, rows")}
"""Triton's interpreter is slow."""
SHAPES: list[tuple[tuple[int, ...], Any]] = [
    ((7,), ()),
    ((7,), (0,)),
    ((7, 5), ()),
    ((7, 5), (0,)),
    ((7, 5), (1,)),
    ((7, 5), (0, 1)),
    ((7, 5), "factored"),
    ((2, 5), (0,)),
    ((2, 5), "factored"),
    ((1, 1), (0,)),
    ((4, 3, 5), (1,)),
    ((4, 3, 5), (0, 2)),
    ((4, 3, 5), (1, 2)),
    ((4, 3, 5), "factored"),
    ((4, 3, 5), "stacked"),
    ((7, 5), "float8"),
    ((), ()),
]

FEW_SHAPES = [SHAPES[index] for index in (2, 3, 4, 6, 8, 10, 14, 15)]


def rule_of(dims: Any) -> Rule:
    if dims == "stacked":
        return Rule(form="factored", batch_dims=1)
    if dims == "float8":
        return Rule(form="float8")
    return Rule(form="factored") if dims == "factored" else Rule(dims, "mean" if dims else "full")


def named(shapes: Sequence[Any] = tuple(SHAPES)) -> tuple[dict[str, Tensor], CompressionPlan, list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    params = {f"p{index}": torch.randn(shape, generator=generator) for index, (shape, _) in enumerate(shapes)}
    plan = CompressionPlan({f"p{index}": rule_of(dims) for index, (_, dims) in enumerate(shapes)})
    grads = [gradients(shape, STEPS, seed=index) for index, (shape, _) in enumerate(shapes)]
    return params, plan, [list(step) for step in zip(*grads, strict=True)]


def placements_of(kinds: Sequence[str], ndim: int) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    made: list[Any] = []
    for kind in kinds:
        if kind == "r" or (kind in "01" and int(kind) >= ndim) or ndim == 0:
            made.append(Replicate())
        else:
            made.append(_StridedShard(0, split_factor=2) if kind == "s" else Shard(int(kind)))
    return made


def mesh_of(shape: tuple[int, ...]) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).reshape(shape))


def sharded(tensor: Tensor, mesh: Any, kinds: Sequence[str]) -> Any:
    from torch.distributed.tensor import distribute_tensor

    options: Any = {} if TORCH < (2, 7) else {"src_data_rank": None}  # before, the first rank's values are sent to all
    return distribute_tensor(tensor, mesh, placements_of(kinds, tensor.dim()), **options)


def train(params: Mapping[str, Tensor], plan: CompressionPlan, grads: Any, **options: Any) -> SlimAdam:
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **options}
    optimizer = SlimAdam(params.items(), plan=plan, **options)
    for step in grads:
        for param, grad in zip(params.values(), step, strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer


def full(tensor: Any) -> Tensor:
    """The global tensor of a DTensor, and any other as it is."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def moments(optimizer: SlimAdam, param: Tensor) -> list[Tensor]:
    state = optimizer.state[param]
    return [full(one) for one in (first_moment(state), *second_moments(state))]


def difference(
    kinds: Sequence[str],
    mesh: Any,
    options: dict[str, Any],
    shapes: Sequence[Any] = tuple(SHAPES),
    backend: str | None = None,
) -> dict[str, float]:
    """The largest error of each parameter and its state, against one process.

    That has the same implementation, or the plain reference where Triton's slow interpreter would run it.
    """
    tensors, plan, grads = named(shapes)
    plain = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    own = {"fused": False} if backend == "triton" else options
    alone = train(plain, plan, [[grad.float() for grad in step] for step in grads], **own)
    split = {name: nn.Parameter(sharded(tensor, mesh, kinds)) for name, tensor in tensors.items()}
    grads = [[sharded(grad.float(), mesh, kinds) for grad in step] for step in grads]
    together = train(split, plan, grads, **options)
    assert backend in (None, together.backend("p0"))
    found = {}
    for (name, one), other in zip(plain.items(), split.values(), strict=True):
        pairs = [(full(one), full(other)), *zip(moments(alone, one), moments(together, other), strict=True)]
        assert all(a.shape == b.shape for a, b in pairs)
        found[name] = max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in pairs)
    return found


def run_cases(backend: str, meshes: Sequence[str]) -> dict[str, Any]:
    dispatch.runs_triton = lambda device: backend == "triton"  # type: ignore[assignment]
    found = {}
    for name in meshes:
        shape, kinds = MESHES[name]
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is not None:
            shapes = FEW_SHAPES if backend == "triton" else SHAPES
            found[name] = difference(kinds, mesh, BACKENDS[backend], shapes, backend)
        torch.distributed.barrier()
    return found


@shards
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_training_agrees_with_one_process(backend: str, tmp_path: Path) -> None:
    meshes = MESHES_OF.get(backend, FEW_MESHES)
    for found in on_ranks(4, tmp_path, run_cases, backend, meshes):
        for case, by_parameter in found.items():
            assert max(by_parameter.values()) <= TOLERANCE, (case, by_parameter)


OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "gradient-initialised": {"variance_init": "gradient"},
    "maximize": {"maximize": True, "weight_decay": 0.0},
    "capturable": {"capturable": True},
    "one by one": {"foreach": False, "amsgrad": True},
    "by norms, as on accelerators": {},
    "lists": {"foreach": True, "amsgrad": True},
    "bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
}


def run_options() -> dict[tuple[str, str], Any]:
    add_squares = all_reduce.add_squares
    found = {}
    for name in ("2x2, rows and columns", "2 ranks, rows"):
        shape, kinds = MESHES[name]
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is not None:
            for option, given in OPTIONS.items():
                all_reduce.add_squares = all_reduce.write_norms if option.startswith("by norms") else add_squares
                shapes = [
                    one for one in SHAPES if not given.get("amsgrad") or one[1] not in ("factored", "stacked", "float8")
                ]
                found[name, option] = difference(kinds, mesh, given, shapes)
        torch.distributed.barrier()
    return found


def test_every_option_agrees_with_one_process(tmp_path: Path) -> None:
    for found in on_ranks(4, tmp_path, run_options):
        for (mesh, option), by_parameter in found.items():
            # A value may round the other way in bfloat16, and then differs by a part in 256.
            tolerance = 1e-3 if option == "bfloat16 momentum" else TOLERANCE
            assert max(by_parameter.values()) <= tolerance, (mesh, option, by_parameter)
