"""What cannot be trained sharded is refused, and the remedy told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import (
    CompressionPlan,
    CriticalSharpness,
    Rule,
    SlimAdam,
    advise_mix,
    directional_sharpness,
    hessian_sharpness,
)
from slimadam.distributed.sharded_rules import warn_of_old_torch
from tests.distributed.test_step import full, mesh_of, sharded
from tests.ranks import on_ranks
from tests.versions import shards

PLAN = CompressionPlan({"0.weight": Rule((1,), "mean")})


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))


def _flat_fsdp() -> list[str]:
    """Errors for FSDP1, flat parameters shown and hidden; and that plan=None trains."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")
    said = []
    for plan, hides in (("auto", False), ("auto", True), (PLAN, True)):
        model = FullyShardedDataParallel(_model(), use_orig_params=hides, device_id=torch.device("cpu"))
        with pytest.raises(RuntimeError) as error:
            SlimAdam(model, plan=plan)
        said.append(str(error.value))
        as_adamw = SlimAdam(model.parameters(), lr=1e-2, plan=None)
        model(torch.ones(3, 6)).sum().backward()
        as_adamw.step()
    return said


def test_flat_parameters_of_fsdp_are_refused(tmp_path: Path) -> None:
    for said in on_ranks(2, tmp_path, _flat_fsdp):
        for message in said:
            assert "belongs to FullyShardedDataParallel, which lays parameters end to end" in message
            assert "shard with torch.distributed.fsdp.fully_shard" in message


def test_flat_parameters_of_deepspeed_are_refused() -> None:
    model = _model()
    for number, param in enumerate(model.parameters()):
        param.ds_id = number  # type: ignore[attr-defined]  # as deepspeed.zero.Init marks them
    with pytest.raises(RuntimeError, match=r"'0.weight' belongs to DeepSpeed's ZeRO, which lays .* or use plan=None"):
        SlimAdam(model, plan=PLAN)


def test_a_group_replaced_by_one_vector_is_refused() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLAN)
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]  # as ZeRO's stages 1 and 2 do
    with pytest.raises(RuntimeError, match=r"has 1 parameters, but had 4: .* DeepSpeed, which lays .*fully_shard"):
        optimizer.step()


def _wrong_state() -> list[str]:
    mesh = mesh_of((2,))
    said = []

    def message(change: Any, **options: Any) -> None:
        param = nn.Parameter(sharded(torch.randn(6, 4), mesh, ["0"]))
        optimizer = SlimAdam([("0.weight", param)], plan=CompressionPlan({"0.weight": Rule((0,), "mean")}), **options)
        param.grad = sharded(torch.randn(6, 4), mesh, ["0"])
        change(optimizer, param)
        before = full(param).clone()
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        assert torch.equal(full(param), before)
        said.append(str(error.value))

    def lies_otherwise(optimizer: SlimAdam, param: nn.Parameter) -> None:
        optimizer.step()
        optimizer.state[param]["exp_avg"] = torch.zeros(6, 4)

    message(lies_otherwise)
    message(lambda optimizer, param: None, differentiable=True)
    return said


def test_state_that_lies_otherwise_is_refused(tmp_path: Path) -> None:
    for lies, differentiable in on_ranks(2, tmp_path, _wrong_state):
        assert lies.startswith(
            "'0.weight': this rank holds exp_avg of shape (6, 4), its shard of the parameter needs (3, 4)"
        )
        assert "differentiable=True does not follow the step of a DTensor" in differentiable


def _on_other_ranks() -> tuple[list[str], float]:
    """Errors of a parameter that lies on the ranks 0 and 1 only; and of one that is not averaged."""
    from torch.distributed.device_mesh import DeviceMesh

    everywhere, there = mesh_of((3,)), DeviceMesh("cpu", torch.arange(2))
    params = [nn.Parameter(sharded(torch.ones(6, 4), mesh, ["0"])) for mesh in (everywhere, there)]
    named = list(zip(("0.weight", "1.weight"), params, strict=True))
    said = []
    for plan in ("auto", "factored"):
        try:
            SlimAdam(named, plan=plan)
        except RuntimeError as error:
            said.append(str(error))
    held = [pair for pair in named if pair[1].device_mesh.get_coordinate() is not None]
    for part, plan, rate in ((held, "factored", 0.5), (named, None, 0.0), (named, None, 0.5)):
        optimizer = SlimAdam(part, lr=rate, plan=plan, weight_decay=0.0)
        for _, param in part:
            param.grad = sharded(torch.ones(6, 4), param.device_mesh, ["0"])
        optimizer.step()
    return said, float(full(params[0]).abs().max())


def test_what_lies_on_other_ranks_is_refused_by_those(tmp_path: Path) -> None:
    for rank, (said, value) in enumerate(on_ranks(3, tmp_path, _on_other_ranks)):
        assert len(said) == (2 if rank == 2 else 0)
        assert all(
            "'1.weight' lies on" in message and "build this rank's optimizer without" in message for message in said
        )
        assert value < 1e-6


def _partial_gradient() -> list[float]:
    """Errors of a step whose gradient has yet to be summed, or is laid out otherwise."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = mesh_of((2,))
    tensor, grad = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for kinds, given in (
        (["r"], DTensor.from_local(grad / 2, mesh, [Partial()])),
        (["0"], DTensor.from_local(grad, mesh, [Replicate()])),
        (["1"], sharded(grad, mesh, ["0"])),
    ):
        one, other = nn.Parameter(tensor.clone()), nn.Parameter(sharded(tensor, mesh, kinds))
        one.grad, other.grad = grad.clone(), given
        for param in (one, other):
            SlimAdam([("0.weight", param)], lr=1e-2, plan=PLAN).step()
        found.append(float((full(one) - full(other)).abs().max()))
    return found


def test_gradients_laid_out_otherwise_are_redistributed(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, _partial_gradient):
        assert len(found) == 3
        assert max(found) <= 1e-6


def _without_second_derivative() -> list[str]:
    mesh = mesh_of((2,))
    param = nn.Parameter(sharded(torch.randn(6, 4), mesh, ["0"]))
    loss = param.square().sum()
    loss.backward(retain_graph=True)
    said = []
    for measure in (
        lambda: directional_sharpness(torch.optim.SGD([param], lr=0.1), loss),
        lambda: hessian_sharpness([param], loss),
        lambda: CriticalSharpness(torch.optim.Muon([param])).measure(lambda: 0.0),
        lambda: advise_mix(torch.optim.SGD([param], lr=0.1), {"one": lambda batch: loss, "two": lambda batch: loss}),
    ):
        with pytest.raises(RuntimeError) as error:
            measure()
        said.append(str(error.value))
    return said


@shards
def test_what_needs_whole_parameters_is_refused(tmp_path: Path) -> None:
    for *of_hessians, of_muon, of_mix in on_ranks(2, tmp_path, _without_second_derivative):
        assert all("measure the critical sharpness, slimadam.CriticalSharpness" in message for message in of_hessians)
        assert "the direction of Muon on sharded parameters" in of_muon
        assert "load the checkpoint into a model that is not sharded" in of_mix


@pytest.mark.parametrize(("version", "warnings"), [("2.6.0", 1), ("2.7.0", 0), ("2.13.0+cpu", 0)])
def test_a_torch_whose_shards_are_limited_is_told_of_once(
    version: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    warn_of_old_torch.cache_clear()
    warn_of_old_torch()
    warn_of_old_torch()
    assert len(caplog.records) == warnings
    assert all(f"torch {version}" in record.message and "use torch 2.7" in record.message for record in caplog.records)
    warn_of_old_torch.cache_clear()
