"""Clipping and gradient scaling on sharded gradients: as on one process, and every rank leaves out the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import SlimAdam
from tests.distributed.test_step import MESHES, SHAPES, TOLERANCE, full, mesh_of, moments, named, sharded
from tests.ranks import on_ranks

SHARDED = ("2 ranks, rows", "2x2, rows and columns", "2x2, replicated and rows", "3 ranks, columns")
LARGEST_NORM = 0.5
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

Step = Callable[[SlimAdam, list[nn.Parameter]], None]


class Pair:
    """The same parameters on one process and sharded, with an optimizer each."""

    def __init__(self, mesh: Any, kinds: Sequence[str], shapes: Sequence[Any], **options: Any) -> None:
        tensors, plan, grads = named(shapes)
        self.grads = [[grad.float() for grad in step] for step in grads]
        self._shard = lambda tensor: sharded(tensor, mesh, kinds)
        plain = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
        split = {name: nn.Parameter(self._shard(tensor)) for name, tensor in tensors.items()}
        self.params = [list(params.values()) for params in (plain, split)]
        self.optimizers = [SlimAdam(params.items(), plan=plan, **OPTIONS, **options) for params in (plain, split)]

    def step(self, grads: Sequence[Tensor], steps: Sequence[Step]) -> None:
        """Take a step of each, by the first and the second way."""
        for params, optimizer, step, split in zip(self.params, self.optimizers, steps, (False, True), strict=True):
            for param, grad in zip(params, grads, strict=True):
                param.grad = self._shard(grad) if split else grad.clone()
            step(optimizer, params)

    def worst(self) -> float:
        """The largest difference between the two."""
        pairs = zip(*self.params, strict=True)
        return max(float((full(one) - full(other)).abs().max()) for one, other in pairs)


def _clipped(optimizer: SlimAdam, params: list[nn.Parameter]) -> None:
    assert full(nn.utils.clip_grad_norm_(params, LARGEST_NORM)) > LARGEST_NORM
    optimizer.step()


def _clips_itself(optimizer: SlimAdam, params: list[nn.Parameter]) -> None:
    directions = {param: full(direction) for param, direction in optimizer.update_direction()}
    before = [full(param).clone() for param in params]
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm > LARGEST_NORM
    for param, was in zip(params, before, strict=True):
        torch.testing.assert_close(full(param), was - OPTIONS["lr"] * directions[param], rtol=0, atol=TOLERANCE)


def _train_clipped(inside: bool) -> dict[str, float]:
    found = {}
    for name in SHARDED:
        shape, kinds = MESHES[name]
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is not None:
            pair = Pair(mesh, kinds, SHAPES, variance_init="gradient" if inside else "zeros")
            if inside:
                pair.optimizers[1].max_grad_norm = LARGEST_NORM
            for grads in pair.grads:
                pair.step(grads, (_clipped, _clips_itself if inside else _clipped))
            found[name] = pair.worst()
        torch.distributed.barrier()
    return found


@pytest.mark.parametrize("inside", [False, True])
def test_clipped_training_equals_one_process(tmp_path: Path, inside: bool) -> None:
    for found in on_ranks(4, tmp_path, _train_clipped, inside):
        assert found
        for case, error in found.items():
            assert error <= TOLERANCE, case


def _norm_on_several_meshes() -> list[float]:
    """Parameters on meshes of one and of two dimensions, replicated ones, and one that is no DTensor."""
    grads = [torch.full((4, 6), 1.0), torch.full((8,), 2.0), torch.full((3, 5), 3.0), torch.full((2,), 4.0)]
    line, square = mesh_of((4,)), mesh_of((2, 2))
    params = [
        nn.Parameter(sharded(torch.zeros(4, 6), square, ("0", "1"))),
        nn.Parameter(sharded(torch.zeros(8), line, ("0",))),
        nn.Parameter(sharded(torch.zeros(3, 5), square, ("r", "0"))),
        nn.Parameter(torch.zeros(2)),
    ]
    layouts = [(square, ("0", "1")), (line, ("0",)), (square, ("r", "0"))]
    for param, grad, (mesh, kinds) in zip(params, grads, layouts, strict=False):
        param.grad = sharded(grad, mesh, kinds)
    params[3].grad = grads[3]
    optimizer = SlimAdam(params, plan=None, max_grad_norm=math.inf)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return [float(optimizer.grad_norm), math.sqrt(sum(float(grad.square().sum()) for grad in grads))]


def test_the_norm_over_several_meshes(tmp_path: Path) -> None:
    for found, expected in on_ranks(4, tmp_path, _norm_on_several_meshes):
        assert found == pytest.approx(expected, rel=1e-6)


def _scaled(scaler: Any, unscales: bool) -> Step:
    def step(optimizer: SlimAdam, params: list[nn.Parameter]) -> None:
        for param in params:
            assert param.grad is not None
            param.grad *= scaler.scale(torch.ones(()))
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return step


def _with_infinity(grads: Sequence[Tensor]) -> list[Tensor]:
    """One element of the last matrix, which one rank has, is infinite."""
    spoilt = [grad.clone() for grad in grads]
    next(grad for grad in reversed(spoilt) if grad.dim() == 2)[-1, -1] = math.inf
    return spoilt


def _train_with_both_scalers() -> dict[Any, Any]:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    makes = {False: torch.amp.GradScaler, True: ShardedGradScaler}
    return {
        (mesh, asks_all, unscales): _train_scaled(mesh, make, unscales)
        for mesh in ("2x2, rows and columns", "2x2, replicated and rows")
        for asks_all, make in makes.items()
        for unscales in (False, True)
    }


def _train_scaled(mesh: str, make: Any, unscales: bool) -> str | tuple[float, bool, list[float]]:
    """The error that is raised, or: the largest difference, whether a step was left out, and the scales then."""
    shape, kinds = MESHES[mesh]
    # Vectors, which come first, are not sharded over the columns' ranks.
    pair = Pair(mesh_of(shape), kinds, SHAPES[:6])
    scalers = [scaler("cpu", init_scale=8.0) for scaler in (torch.amp.GradScaler, make)]
    steps = [_scaled(scaler, unscales) for scaler in scalers]
    pair.step(pair.grads[0], steps)
    before = _values(pair)
    try:
        pair.step(_with_infinity(pair.grads[1]), steps)
    except RuntimeError as error:
        return str(error)
    kept = all(map(torch.equal, _values(pair), before))
    for grads in pair.grads[2:5]:
        pair.step(grads, steps)
    return pair.worst(), kept, [scaler.get_scale() for scaler in scalers]


def _values(pair: Pair) -> list[Tensor]:
    """Copies of the sharded parameters and their state."""
    state = [pair.optimizers[1].state[param] for param in pair.params[1]]
    seconds = [one for param in pair.params[1] for one in moments(pair.optimizers[1], param)]
    return [one.clone() for one in (*map(full, pair.params[1]), *seconds, *(own["step"] for own in state))]


def test_an_infinite_gradient_on_one_rank_leaves_out_the_step_on_all(tmp_path: Path) -> None:
    for found in on_ranks(4, tmp_path, _train_with_both_scalers):
        assert len(found) == 8
        for (mesh, asks_all, unscales), outcome in found.items():
            if mesh == "2x2, rows and columns" and not (asks_all and unscales):
                assert "not finite on some ranks only" in outcome
                assert "use ShardedGradScaler" in outcome
            else:
                error, kept, scales = outcome
                assert error <= TOLERANCE
                assert kept
                assert scales == [4.0, 4.0]
