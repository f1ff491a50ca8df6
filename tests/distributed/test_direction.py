"""The direction of a pending update on DTensors: that of one process, and where the next step goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from slimadam import CompressionPlan
from slimadam.curvature.probe.directions import pending_directions
from slimadam.utils.dtensor import local
from tests.distributed.test_splits import PLANS
from tests.distributed.test_step import MESHES, mesh_of, named, sharded, train
from tests.ranks import on_ranks
from tests.versions import shards

LR = 1e-2
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "gradient-initialised": {"variance_init": "gradient"},
    "maximize": {"maximize": True, "betas": (torch.tensor(0.8), torch.tensor(0.95))},
    "bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
}
STEPS = (0, 3)


def snapshot(optimizer: Any) -> list[Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [[param, param.grad, *optimizer.state.get(param, {}).values()] for param in params]
    return [[(one.data_ptr(), one.clone()) for one in map(local, found)] for found in tensors]


def same(before: list[Any], after: list[Any]) -> bool:
    return [len(one) for one in before] == [len(one) for one in after] and all(
        at == now and torch.equal(value, other)
        for one, two in zip(before, after, strict=True)
        for (at, value), (now, other) in zip(one, two, strict=True)
    )


def _errors(alone: Any, together: Any, mesh: Any, kinds: Sequence[str], grads: Sequence[Tensor]) -> dict[str, Any]:
    """How far the directions of both optimizers lie apart, and from where the next step goes."""
    for optimizer, own in ((alone, grads), (together, [sharded(grad, mesh, kinds) for grad in grads])):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param, grad in zip(params, own, strict=True):
            param.grad = grad
    before = snapshot(together)
    with mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as sent:
        found = list(pending_directions(together))
    if any(together.state.values()):
        assert sent.call_count == mesh.ndim, "one for each process group"
    assert same(before, snapshot(together)), "asking for the direction has changed something"
    wanted = list(pending_directions(alone))
    assert all(
        direction.placements == param.placements and direction.shape == param.shape for param, direction in found
    )
    shards = [local(sharded(direction, mesh, kinds)) for _, direction in wanted]
    apart = [((local(one) - two) / (1 + two.abs())) for (_, one), two in zip(found, shards, strict=True)]
    ends = [local(param).detach() - LR * local(direction) for param, direction in found]
    together.step()
    missed = [end - local(param) for (param, _), end in zip(found, ends, strict=True)]
    return {"apart": _largest(apart), "missed": _largest(missed)}


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)


def _slimadam(name: str) -> dict[Any, Any]:
    shape, kinds = MESHES[name]
    mesh = mesh_of(shape)
    results: dict[Any, Any] = {}
    if mesh.get_coordinate() is None:
        return results
    tensors, plan, steps = named()
    steps = [[grad.float() for grad in step] for step in steps]
    for option, given in OPTIONS.items():
        if option == "amsgrad":
            rules = {key: rule for key, rule in plan.items() if rule.form not in ("factored", "float8")}
            own = CompressionPlan({key: rules.get(key, plan["p0"]) for key in tensors})
        else:
            own = plan
        for done in STEPS:
            pair = []
            for split in (False, True):
                place = (lambda value: sharded(value, mesh, kinds)) if split else torch.clone
                params = {key: nn.Parameter(place(tensor)) for key, tensor in tensors.items()}
                grads = [[place(grad) for grad in step] for step in steps[:done]]
                pair.append(train(params, own, grads, lr=LR, **given))
            results[name, option, done] = _errors(*pair, mesh, kinds, steps[done])
    return results


def _parts(name: str, kinds: Sequence[str]) -> dict[Any, Any]:
    mesh = mesh_of((3,))
    results: dict[Any, Any] = {}
    if mesh.get_coordinate() is not None:
        shape, plan = PLANS[name]
        tensor, *grads = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3))
        pair = []
        for split in (False, True):
            place = (lambda value: sharded(value, mesh, kinds)) if split else torch.clone
            pair.append(train({"p": nn.Parameter(place(tensor))}, plan, [[place(grads[0])]], lr=LR))
        results[name] = _errors(*pair, mesh, kinds, [grads[1]])
    return results


def _all() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in ("2 ranks, rows", "3 ranks, rows", "3 ranks, columns", "2x2, columns and rows", "2x2, strided rows"):
        found |= _slimadam(name)
        torch.distributed.barrier()
    for name, kinds in (("rows", ["0"]), ("columns", ["1"]), ("heads", ["1"])):
        found |= _parts(name, kinds)
        torch.distributed.barrier()
    return found


@shards
def test_slimadams_direction_is_that_of_one_process_and_of_its_next_step(tmp_path: Path) -> None:
    of_ranks = on_ranks(4, tmp_path, _all)
    assert len(of_ranks[0]) == 5 * len(OPTIONS) * len(STEPS) + 3
    for found in of_ranks:
        for case, errors in found.items():
            assert errors["apart"] <= 1e-5, (case, errors)
            assert errors["missed"] <= 1e-6, (case, errors)
