"""What a step on DTensors sends: one all-reduce for each process group, started before the local updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.distributed import all_reduce as averages
from slimadam.optim.step import dispatch
from tests.distributed.test_step import full, mesh_of, named, sharded
from tests.ranks import on_ranks
from tests.reference import second_moments
from tests.versions import shards

PLANS: dict[str, dict[str, Rule]] = {
    "none across shards": {"0.weight": Rule((1,), "mean"), "2.weight": Rule((1,), "mean")},
    "all across shards": {"0.weight": Rule((0,), "mean"), "2.weight": Rule(form="factored")},
    "as AdamW": {},
}


def _model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(11, 7), nn.GELU(), nn.Linear(7, 5))


def _batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(12, 11, generator=generator) for _ in range(steps)]


def _train_fsdp(plan_name: str) -> dict[str, Any]:
    """Losses and parameters of FSDP2, and of one process; and the collectives of each step."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    plan = CompressionPlan(PLANS[plan_name])
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    alone, together = _model(), _model()
    for layer in (together[0], together[2], together):
        fully_shard(layer)
    optimizers = [SlimAdam(model, lr=1e-2, plan=plan) for model in (alone, together)]
    collectives = []
    for batch in _batches(10):
        for model, optimizer, data in (
            (alone, optimizers[0], batch),
            (together, optimizers[1], batch.chunk(ranks)[rank]),
        ):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            with CommDebugMode() as mode:  # type: ignore[no-untyped-call]
                optimizer.step()
        collectives.append({str(name): count for name, count in mode.get_comm_counts().items()})
    pairs = zip(alone.parameters(), together.parameters(), strict=True)
    worst = max(float((full(one) - full(other)).abs().max()) for one, other in pairs)
    return {"worst": worst, "collectives": collectives}


def _train_all_fsdp() -> dict[str, Any]:
    return {name: _train_fsdp(name) for name in PLANS}


@shards
def test_fsdp_trains_as_one_process_with_one_all_reduce_a_step(tmp_path: Path) -> None:
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for found in on_ranks(ranks, folder, _train_all_fsdp):
            for name, of_plan in found.items():
                assert of_plan["worst"] <= 2e-5, (ranks, name)
                expected = {"c10d.allreduce_": 1} if name == "all across shards" else {}
                assert of_plan["collectives"] == [expected] * 10, (ranks, name)


def _profile(shape: tuple[int, ...], kinds: list[str], steps: int = 2, **options: Any) -> dict[str, int]:
    """Names of collectives that a profiler sees in the last step, and how often."""
    mesh = mesh_of(shape)
    tensors, plan, grads = named()
    params = {name: nn.Parameter(sharded(tensor, mesh, kinds)) for name, tensor in tensors.items()}
    half = len(params) // 2
    groups: list[dict[str, Any]] = [{"params": list(params.items())[:half]}, {"params": list(params.items())[half:]}]
    optimizer = SlimAdam(groups, plan=plan, **options)
    for step in grads[:steps]:
        for param, grad in zip(params.values(), step, strict=True):
            param.grad = sharded(grad.float(), mesh, kinds)
        with torch.profiler.profile() as profiler:
            optimizer.step()
    seen = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
    return {name: seen.count(name) for name in seen}


def _profile_meshes() -> list[dict[str, int]]:
    return [
        _profile((4,), ["0"]),
        _profile((2, 2), ["0", "1"]),
        _profile((2, 2), ["r", "0"]),
        _profile((4,), ["r"]),
        _profile((4,), ["0"], steps=1, variance_init="gradient"),
    ]


def test_one_all_reduce_for_each_group_whatever_the_number_of_tensors(tmp_path: Path) -> None:
    for rows, both, hybrid, replicated, first in on_ranks(4, tmp_path, _profile_meshes):
        assert rows == {"gloo:all_reduce": 1}
        assert both == {"gloo:all_reduce": 2}
        assert hybrid == {"gloo:all_reduce": 1}
        assert replicated == {}
        assert first == {"gloo:all_reduce": 1}


def _log_of_a_step() -> tuple[list[str], list[int]]:
    """What happens in the last of three steps, in order, and where the buffers of the three lie."""
    mesh = mesh_of((2,))
    params = {name: nn.Parameter(sharded(tensor, mesh, ["0"])) for name, tensor in named()[0].items()}
    optimizer = SlimAdam(params.items(), plan=named()[1])
    log: list[str] = []
    addresses = []
    all_reduce = torch.distributed.all_reduce

    def logged_all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        addresses.append(tensor.data_ptr())
        work = all_reduce(tensor, **options)
        log.append(f"start, async_op={options['async_op']}")
        return _LoggedWork(work, log)

    def logged(update: Any) -> Any:
        def logged_update(entries: Any, hyper: Any) -> None:
            log.append("precomputed" if all(entry.precomputed for entry in entries) else "local")
            update(entries, hyper)

        return logged_update

    torch.distributed.all_reduce = logged_all_reduce  # type: ignore[assignment]
    for backend in dispatch.BACKENDS.values():
        if backend.name != "triton":
            backend.update = logged(backend.update)  # type: ignore[method-assign]
    for step in named()[2][:3]:
        for param, grad in zip(params.values(), step, strict=True):
            param.grad = sharded(grad.float(), mesh, ["0"])
        log.clear()
        optimizer.step()
    return log, addresses


class _LoggedWork:
    def __init__(self, work: Any, log: list[str]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        self.log.append("wait")
        self.work.wait()


def test_sums_travel_while_local_updates_run(tmp_path: Path) -> None:
    for log, addresses in on_ranks(2, tmp_path, _log_of_a_step):
        ends = log.index("wait")
        assert log[0] == "start, async_op=True"
        assert set(log[1:ends]) == {"local"}
        assert set(log[ends + 1 :]) == {"precomputed"}
        assert len(addresses) == 3
        assert len(set(addresses)) == 1


def _bytes_and_placements() -> tuple[float, int, int, dict[str, str]]:
    """Bytes of state as told and as held by this rank, collectives under ``torch.compile``, and where moments lie."""
    mesh = mesh_of((3,))
    tensors, plan, grads = named()
    params = {name: nn.Parameter(sharded(tensor, mesh, ["0"])) for name, tensor in tensors.items()}
    optimizer = SlimAdam(params.items(), plan=plan)
    told = optimizer.memory().total
    for param, grad in zip(params.values(), grads[0], strict=True):
        param.grad = sharded(grad.float(), mesh, ["0"])
    step = torch.compile(optimizer.step, backend="eager")
    with torch.profiler.profile() as profiler:
        step()
    sent = sum(event.name == "gloo:all_reduce" for event in profiler.events())
    held, placements = 0, {}
    for name, param in params.items():
        state = optimizer.state[param]
        seconds = second_moments(state)
        held += state["step"].nbytes + sum(one.to_local().nbytes for one in (state["exp_avg"], *seconds))
        placements[name] = " ".join(str(one.placements[0]) for one in seconds)
    return told, held, sent, placements


def test_bytes_are_those_of_the_rank_and_averages_over_shards_are_replicated(tmp_path: Path) -> None:
    for told, held, sent, placements in on_ranks(3, tmp_path, _bytes_and_placements):
        assert told == held
        assert sent == 1
        # full, rows' averages, columns' averages, both for a factored one
        assert [placements[name] for name in ("p2", "p4", "p3", "p6")] == ["S(0)", "S(0)", "R", "S(0) R"]


def test_no_part_of_the_step_knows_of_ranks_where_there_are_none() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=CompressionPlan(PLANS["all across shards"]))
    model(_batches(1)[0]).square().mean().backward()
    optimizer.step()
    assert optimizer._stepper._exchange is None


SUMMED: list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = [
    ((7, 5), ((0,), (1,))),
    ((3, 5, 9), ((0, 2), (1,))),
    ((3, 5, 9), ((2,),)),
    ((40,), ((0,),)),
    ((2, 3, 17), ((1, 2), (0,))),
]


@pytest.mark.parametrize(("shape", "dims"), SUMMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_squares(shape: Any, dims: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks, some of them parts of a row, and by norms."""
    monkeypatch.setattr(averages, "BLOCK_ELEMENTS", 16)
    grad = torch.randn(shape).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    kept = [[1 if dim in one else size for dim, size in enumerate(shape)] for one in dims]
    added, norms = ([torch.ones(sizes, dtype=wide) for sizes in kept] for _ in range(2))
    averages.add_squares(grad, dims, added)
    averages.write_norms(grad, dims, norms)
    for one, sum_and_1, norm in zip(dims, added, norms, strict=True):
        expected = grad.double().square().sum(one, keepdim=True).to(wide)
        torch.testing.assert_close(sum_and_1, 1 + expected)
        torch.testing.assert_close(norm.square(), expected)
