"""Parts of fused weights whose shards end where no part does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.layers.splits import Part
from slimadam.optim.step import dispatch
from tests.distributed.test_step import STEPS, TOLERANCE, full, mesh_of, moments, sharded, train
from tests.ranks import on_ranks
from tests.reference import gradients

ROWS = {
    "query": Rule((1,), "mean"),
    "key": Rule((0,), "mean"),
    "value": Rule(form="factored"),
    "gate": Rule((0, 1), "mean"),
}
HEADS = {"query": Rule((3,), "mean"), "key": Rule((2, 3), "mean"), "value": Rule(form="factored", batch_dims=2)}
FULL = {"query": Rule((1,), "mean"), "value": Rule()}


def _plan(rules: dict[str, Rule], of: tuple[int, ...], view: tuple[int, ...], dim: int, sizes: list[int]) -> Any:
    from dataclasses import replace

    found, start = {}, 0
    for (label, rule), size in zip(rules.items(), sizes, strict=True):
        part = Part(label, of, view, dim, start, size)
        found[f"p[{label}]"] = replace(rule, part=part, shape=part.shape)
        start += size
    return CompressionPlan(found)


PLANS: dict[str, Any] = {
    "rows": ((19, 6), _plan(ROWS, (19, 6), (19, 6), 0, [7, 5, 5, 2])),
    "columns": ((6, 19), _plan(ROWS, (6, 19), (6, 19), 1, [7, 5, 5, 2])),
    "heads": ((24, 6), _plan(HEADS, (24, 6), (4, 3, 2, 6), 1, [1, 1, 1])),
    "full": ((19, 6), _plan(FULL, (19, 6), (19, 6), 0, [12, 7])),
}


def _difference(plan: str, mesh: Any, kinds: list[str], backend: str) -> float:
    dispatch.runs_triton = lambda device: backend == "triton"  # type: ignore[assignment]
    options = {"reference": {"foreach": False}}.get(backend, {})
    shape, rules = PLANS[plan]
    grads = [[grad.float()] for grad in gradients(shape, STEPS)]
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    one, other = nn.Parameter(tensor.clone()), nn.Parameter(sharded(tensor, mesh, kinds))
    alone = train({"p": one}, rules, grads, **options)
    together = train({"p": other}, rules, [[sharded(grad, mesh, kinds) for grad in step] for step in grads], **options)
    pairs = [(full(one), full(other)), *zip(moments(alone, one), moments(together, other), strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in pairs)


def _all_differences() -> dict[Any, float]:
    found = {}
    cases = [("rows", (4,), ["0"]), ("rows", (3,), ["0"]), ("rows", (2,), ["1"]), ("rows", (2, 2), ["0", "1"])]
    cases += [("columns", (3,), ["0"]), ("columns", (3,), ["1"]), ("columns", (2, 2), ["r", "1"])]
    cases += [("heads", (2,), ["0"]), ("heads", (4,), ["0"]), ("heads", (3,), ["1"]), ("full", (3,), ["1"])]
    for plan, shape, kinds in cases:
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is not None:
            names = ["reference", "compiled"]
            if (plan, shape) == ("rows", (3,)):
                names.append("triton")
            for backend in names:
                found[plan, shape, tuple(kinds), backend] = _difference(plan, mesh, kinds, backend)
        torch.distributed.barrier()
    return found


def test_parts_train_as_on_one_process(tmp_path: Path) -> None:
    for found in on_ranks(4, tmp_path, _all_differences):
        for case, worst in found.items():
            assert worst <= TOLERANCE, (case, worst)


def _refusals() -> list[str]:
    mesh = mesh_of((3,))
    said = []
    for plan in ("heads", "full"):
        shape, rules = PLANS[plan]
        param = nn.Parameter(sharded(torch.randn(shape), mesh, ["0"]))
        with pytest.raises(RuntimeError) as error:
            SlimAdam([("p", param)], plan=rules)
        said.append(str(error.value))
    return said


def test_what_shards_cannot_follow_is_refused(tmp_path: Path) -> None:
    for heads, whole in on_ranks(3, tmp_path, _refusals):
        assert heads.startswith("'p': its part 'query' cannot be followed through these shards: ")
        assert "cuts through its slices; shard it along another dimension" in heads
        assert "'value' cannot be followed through these shards: it keeps a second moment for each element" in whole
        assert "shard_placement_fn=lambda parameter: Shard(1)" in heads
