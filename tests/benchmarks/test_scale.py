"""The figures computed for ranks that do not exist are those of ranks that do."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.distributed import scale
from benchmarks.harness.stopwatch import tensor_bytes
from benchmarks.workloads.shapes import MODELS
from slimadam.utils.dtensor import local
from tests.ranks import on_ranks

RANKS = 3
SHAPES = MODELS["tiny"]()


def _real_costs() -> dict[str, tuple[dict[str, Any], int, int]]:
    """For each way what is counted of a step on this rank, and the bytes that its tensors hold."""
    found = {}
    model = scale.sharded(SHAPES, "cpu")
    for label in scale.WAYS:
        optimizer = scale.optimizer_of(model, label)
        counted = asdict(scale.cost(optimizer))
        state = sum(
            local(tensor).nbytes for of_parameter in optimizer.state.values() for tensor in of_parameter.values()
        )
        beside = tensor_bytes([vars(optimizer)]) - tensor_bytes([optimizer.state, list(model.parameters())])
        found[label] = counted, state, beside
    return found


class _Sent(TorchDispatchMode):
    """Counts the numbers of the larger tensor of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            numbers = max(one.numel() for one in args if isinstance(one, torch.Tensor))
            self.numbers[func.name()] = self.numbers.get(func.name(), 0) + numbers
        return func(*args, **(kwargs or {}))


def _real_traffic() -> dict[str, int]:
    """What FSDP2 sends for one forward and backward pass: two blocks of 90 numbers, 9 in the root module."""
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.LayerNorm(9, bias=False))
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    with _Sent() as sent:
        model(torch.randn(2, 9)).sum().backward()
    return sent.numbers


def _real() -> tuple[dict[str, tuple[dict[str, Any], int, int]], dict[str, int]]:
    return _real_costs(), _real_traffic()


def test_computed_costs_are_those_of_real_ranks(tmp_path: Path) -> None:
    """Rows that do not divide by the number of ranks included."""
    for rank, (real, traffic) in enumerate(on_ranks(RANKS, tmp_path, _real)):
        blocks, root = 2 * 90, 9
        assert traffic == {"c10d::_allgather_base_": 2 * blocks + root, "c10d::_reduce_scatter_base_": blocks + root}
        with scale.pretended(RANKS, rank):
            model = scale.sharded(SHAPES)
            for label in scale.WAYS:
                counted, state, beside = real[label]
                assert asdict(scale.cost(scale.optimizer_of(model, label))) == counted
                assert counted["state"] == state
                assert counted["buffers"] == beside
    assert not dist.is_initialized()


def test_bytes_moved_and_sent() -> None:
    """By hand, for one matrix of which rank 0 of 2 holds [2, 5] numbers."""
    expected = {
        scale.ADAMW: (28 * 10 + 0, 0),
        "rules": (20 * 10 + 8 * 2, 0),  # an embedding: averages over its columns stay on the rank
        "factored": (24 * 10 + 8 * (2 + 5) + 24 * (5 + 1), 5 + 1),
        "factored, bfloat16 momentum": (20 * 10 + 8 * (2 + 5) + 24 * (5 + 1), 5 + 1),
    }
    with scale.pretended(2):
        for label, (moved, sent) in expected.items():
            model = scale.sharded({"wte.weight": (4, 5)})
            counted = scale.cost(scale.optimizer_of(model, label))
            assert (counted.moved, sum(counted.numbers_sent)) == (moved, sent), label
    assert scale.on_wire(6, 4) == 2 * 24 * 3 / 4
    assert scale.fsdp_on_wire(100, 4) == 3 * 200 * 3 / 4


def test_run_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "tiny", "--ranks", "2", "4", "--out", str(tmp_path), "--docs", str(tmp_path)]
    assert scale.main(arguments) == 0
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    models = json.loads((tmp_path / "scale.json").read_text())["models"]
    by_ranks = models["tiny"]["ranks"]
    assert by_ranks["2"]["ways"]["factored"]["on_wire"] == 4 * by_ranks["2"]["ways"]["factored"]["numbers_sent"][0]
    assert "FAIL" not in capsys.readouterr().out
    assert scale.wrong(models) == []
    changed = copy.deepcopy(models)
    changed["tiny"]["ranks"]["2"]["adamw_state"] += 1
    changed["tiny"]["ranks"]["4"]["ways"]["rules"]["numbers_sent"].append(1)
    assert scale.wrong(changed) == [
        "FAIL tiny, 2 ranks: plan=None is not AdamW",
        "FAIL tiny, 4 ranks, rules: 2 all-reduces",
    ]
