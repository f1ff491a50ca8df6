"""``snr_check()`` on sharded parameters: the numbers of one process, each rank tracking what it holds of a sample."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam
from slimadam.measurement.slices import within
from tests.distributed.test_step import MESHES, mesh_of, moments, sharded
from tests.ranks import on_ranks
from tests.versions import shards

INTERVAL = 40
SHAPES: dict[str, tuple[tuple[int, ...], Rule]] = {
    "inputs": ((601, 61), Rule((1,), "mean")),
    "outputs": ((61, 601), Rule((0,), "mean")),
    "all": ((301, 97), Rule((0, 1), "mean")),
    "factored": ((601, 61), Rule(form="factored")),
    "stacked": ((5, 97, 61), Rule(form="factored", batch_dims=1)),
}
LEFT_OUT = {"3 ranks, columns": {"all"}, "2x2, columns and rows": {"all"}, "2x2, strided rows": set(SHAPES)}
NOT_FOLLOWED = "cannot be monitored through these shards"
ALMOST_NOTHING = 1e-30


def _trained(place: Any, plan: Any, steps: int) -> SlimAdam:
    generator = torch.Generator().manual_seed(2)
    sizes = {name: torch.rand(shape, generator=generator) for name, (shape, _) in SHAPES.items()}
    params = {name: nn.Parameter(place(size)) for name, size in sizes.items()}
    optimizer = SlimAdam(params.items(), lr=1e-3, plan=plan, betas=(0.9, 0.9))
    assert optimizer._registry.monitor is not None
    optimizer._registry.monitor._shortest_interval = INTERVAL
    for _ in range(steps):
        for name, param in params.items():
            grad = torch.randn(sizes[name].shape, generator=generator) * sizes[name]
            param.grad = place(grad)
        optimizer.step()
    return optimizer


def _as_found(optimizer: SlimAdam) -> dict[str, Any]:
    monitor = optimizer._registry.monitor
    assert monitor is not None
    return {
        "checks": {name: (one.snr, one.sampled, one.ready, one.reason) for name, one in optimizer.snr_check().items()},
        "memory": optimizer.memory().monitor,
        "saved": set(monitor.state_dict()["samples"]),
    }


def _found(name: str) -> dict[str, Any]:
    shape, kinds = MESHES[name]
    mesh = mesh_of(shape)
    if mesh.get_coordinate() is None:
        return {}
    found = {}
    plans: dict[str, tuple[Any, int]] = {
        "from the start": (CompressionPlan({key: rule for key, (_, rule) in SHAPES.items()}), INTERVAL),
        "auto": (AutoPlan(calibration_steps=4, forms="mean", cutoff=ALMOST_NOTHING), 4),
    }
    for plan, (given, steps) in plans.items():
        alone = _trained(torch.clone, given, steps)
        together = _trained(lambda value: sharded(value, mesh, kinds), given, steps)
        found[name, plan] = [_as_found(alone), _as_found(together)]
        for one, other in zip(alone.state, together.state, strict=True):
            pairs = zip(moments(alone, one), moments(together, other), strict=True)
            assert all(torch.allclose(held, split, rtol=1e-5) for held, split in pairs), (name, plan)
    of_one, of_many = alone._registry.monitor, together._registry.monitor
    assert of_one is not None
    assert of_many is not None
    of_many.load_state_dict(of_one.state_dict())
    for key, sample in of_many._samples.items():
        assert torch.equal(sample.full_moment(), of_one._samples[key].full_moment()), key
    return found


def _all(names: tuple[str, ...]) -> dict[Any, Any]:
    found = {}
    for name in names:
        found |= _found(name)
        torch.distributed.barrier()
    return found


@shards
def test_every_rank_finds_what_one_process_does(tmp_path: Path) -> None:
    names = ("3 ranks, columns", "3 ranks, rows", "2x2, columns and rows", "2x2, replicated and rows", *LEFT_OUT)
    of_ranks = on_ranks(4, tmp_path, _all, tuple(dict.fromkeys(names)))
    for case, (alone, together) in of_ranks[0].items():
        left_out = {key for key, check in together["checks"].items() if check[3] == NOT_FOLLOWED}
        assert case[1] == "auto" or left_out == LEFT_OUT.get(case[0], set()), case
        for key, (snr, sampled, ready, reason) in together["checks"].items():
            if key not in left_out:
                wanted = alone["checks"][key]
                assert (sampled, ready, reason) == wanted[1:], (case, key)
                assert ready, (case, key)
                assert snr == pytest.approx(wanted[0], rel=1e-4), (case, key)
        assert set(together["checks"]) == set(alone["checks"]) == set(SHAPES), case
        assert not together["saved"], case
        assert alone["saved"] == set(SHAPES), case
        own = [found[case][1] for found in of_ranks if case in found]
        assert all(one["checks"] == own[0]["checks"] for one in own) or left_out, case
        if not left_out:
            copies = 2 if "replicated" in case[0] else 1
            assert sum(one["memory"] for one in own) == copies * alone["memory"], case


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("cuts", [(0, 4, 4, 9, 23), (0, 0, 1, 22, 23)])
def test_shards_hold_each_element_of_a_sample_once(start: int, stride: int, cuts: tuple[int, ...]) -> None:
    whole = torch.arange(23)
    sampled = slice(start, start + 3 * stride, stride)
    wanted = whole[sampled]
    counted = torch.zeros_like(wanted)
    for first, end in itertools.pairwise(cuts):
        here, there = within(sampled, first, end - first)
        assert torch.equal(whole[first:end][here], wanted[there])
        counted[there] += 1
    assert torch.equal(counted, torch.ones_like(wanted))
