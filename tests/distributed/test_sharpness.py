"""The loss along the pending update, critical sharpness and warmup on several ranks: the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from slimadam import SlimAdam
from slimadam.curvature.probe.line import LineProbe
from slimadam.curvature.probe.snapshot import ROUNDING
from tests.distributed.test_direction import same, snapshot
from tests.ranks import on_ranks
from tests.versions import shards

ETAS = (0.0, 1e-3, 0.03, 0.3, 0.0, 2.0)
STEPS = 2
BATCH = 12


class Rooted(nn.Module):
    """Its root owns parameters, of sizes that no number of ranks divides, and a buffer that forward passes change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x).tanh()) @ self.mix * self.scale


class Unknown(torch.optim.AdamW):
    """Known by its step alone."""


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SlimAdam": lambda params: SlimAdam(params, lr=1e-2, plan="factored", weight_decay=0.1),
    "SlimAdam in groups": lambda params: SlimAdam(
        [{"params": params[:3], "lr": 1e-3}, {"params": params[3:], "weight_decay": 0.0}], lr=1e-2, plan="factored"
    ),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "unknown": lambda params: Unknown(params, lr=1e-2, weight_decay=0.1),
}
MEMORY = {"SlimAdam": ("copy", "lean", "offload"), "AdamW": ("lean",)}


def spread(kind: str, model: Rooted) -> tuple[nn.Module, int, int]:
    """The model as the kind says, the number of shares of a batch, and which this rank takes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    layout = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    if kind == "replicated":
        return nn.parallel.DistributedDataParallel(model), ranks, rank
    if kind == "tensor parallel":
        return parallelize_module(model, init_device_mesh("cpu", (ranks,)), layout), 1, 0
    options: dict[str, Any] = {"reshard_after_forward": False} if kind == "kept whole" else {}
    mesh = init_device_mesh("cpu", (ranks,))
    shares, share = ranks, rank
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "data"))
    elif kind == "sharded and tensor parallel":
        both = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], layout)
        mesh, shares, share = both["data"], 2, both.get_local_rank("data")
    elif kind == "in 16 bits":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, **options)
    return model, shares, share


class Run:
    """A model and its optimizer, trained for some steps, with a pending gradient."""

    def __init__(self, kind: str, optimizer: str) -> None:
        torch.manual_seed(3)
        model = Rooted()
        self.model, self.shares, self.share = (model, 1, 0) if kind == "alone" else spread(kind, model)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self._generator = torch.Generator().manual_seed(6)
        for _ in range(STEPS):
            self.backward()
            self.optimizer.step()
        if kind == "kept whole":
            self.model.set_reshard_after_backward(False)  # the optimizer's parameters are no module's then
        self.backward()

    def backward(self) -> None:
        self.batch = torch.randn(BATCH, 5, generator=self._generator).chunk(self.shares)[self.share]
        self.optimizer.zero_grad()
        self.loss().backward()

    def loss(self) -> Tensor:
        return (self.model(self.batch) - 1).square().mean()

    def calls(self) -> int:
        return int(next(self.model.buffers()))

    def loss_of_all(self) -> float:
        with torch.no_grad():
            loss = self.loss()
        torch.distributed.all_reduce(loss)
        return float(loss) / torch.distributed.get_world_size()


def _interrupted(run: Run, memory: Any) -> None:
    """A line whose closure fails in the middle of a forward pass."""

    def fail(module: nn.Module, inputs: Any) -> None:
        raise ZeroDivisionError

    second = next(module for module in run.model.modules() if isinstance(module, Rooted)).second
    with LineProbe(run.optimizer, memory) as line:
        line.loss(run.loss, 0.3)
        hook = second.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            line.loss(run.loss, 0.5)
        hook.remove()


def probe_lines(kinds: list[str], optimizers: list[str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in optimizers:
        alone = Run("alone", name)
        with LineProbe(alone.optimizer) as line:
            wanted = [line.loss(alone.loss, eta) for eta in ETAS]
        for kind in kinds:
            run = Run(kind, name)
            before, calls, loss = snapshot(run.optimizer), run.calls(), run.loss_of_all()
            for memory in MEMORY.get(name, ("copy",)):
                with (
                    mock.patch("torch.distributed.all_reduce", wraps=torch.distributed.all_reduce) as asked,
                    LineProbe(run.optimizer, memory) as line,
                ):
                    on_entering = asked.call_count
                    losses = [line.loss(run.loss, eta) for eta in ETAS]
                    assert (line.rounding > ROUNDING) == (kind == "in 16 bits")
                assert asked.call_count == on_entering + len(ETAS), "moving and going back take no other rank"
                _interrupted(run, memory)
                assert same(before, snapshot(run.optimizer)), (kind, memory)
                assert run.calls() == calls + 1, (kind, memory)
                assert run.loss_of_all() == loss, (kind, memory)
                next(run.model.buffers()).sub_(1)
                found[name, kind, memory] = losses, wanted
    return found


@shards
@pytest.mark.parametrize(
    ("ranks", "kinds", "optimizers"),
    [
        (2, ["in 16 bits", "replicated", "sharded"], ["AdamW", "SGD", "unknown"]),
        (3, ["sharded"], ["SlimAdam in groups"]),
        (4, ["hybrid", "kept whole", "sharded and tensor parallel", "tensor parallel"], ["SlimAdam"]),
    ],
)
def test_losses_along_the_line_are_those_of_one_process(
    ranks: int, kinds: list[str], optimizers: list[str], tmp_path: Path
) -> None:
    of_ranks = on_ranks(ranks, tmp_path, probe_lines, kinds, optimizers)
    for case, (losses, wanted) in of_ranks[0].items():
        assert losses == pytest.approx(wanted, rel=0.05 if "in 16 bits" in case else 1e-5), case
        assert losses[0] == losses[4] != losses[3], case
        assert all(found[case][0] == losses for found in of_ranks), case


def _losses_by_buffers() -> tuple[list[float], int]:
    """Of a model whose buffers differ between ranks until a forward pass; and what the next training step has there."""
    run = Run("replicated", "AdamW")
    next(run.model.buffers()).fill_(torch.distributed.get_rank())
    with LineProbe(run.optimizer) as line:
        losses = [line.loss(lambda: run.loss() * run.calls()) for _ in range(3)]
    run.backward()
    return losses, run.calls()


def test_buffers_are_made_alike_as_without_a_measurement(tmp_path: Path) -> None:
    for losses, calls in on_ranks(2, tmp_path, _losses_by_buffers):
        assert losses[0] == losses[1] == losses[2]
        assert calls == 1
