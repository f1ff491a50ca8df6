"""``momentum_dtype="int8"`` on DTensors: the codes and scales of one process, where shards consist of whole blocks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.optim.step import dispatch
from slimadam.state.first_moment import decoded
from tests.distributed.test_step import BACKENDS, MESHES, TOLERANCE, full, mesh_of, moments, named, sharded
from tests.ranks import on_ranks
from tests.versions import shards

STEPS = 4
SHORT_STEPS = 2  # of kernels that are interpreted; the second reads what the first has stored
SHAPES: list[tuple[tuple[int, ...], Any]] = [
    ((7, 256), ()),
    ((7, 256), (0,)),
    ((7, 256), (1,)),
    ((7, 512), "factored"),
    ((2, 256), (0, 1)),
    ((4, 3, 256), (1,)),
    ((4, 3, 256), "stacked"),
    ((7,), ()),
    ((7, 300), (0,)),
    ((16, 16), "factored"),
]
CODED = {
    "2 ranks, rows": {0, 1, 2, 3, 4, 5, 6},
    "3 ranks, rows": {0, 1, 2, 3, 4, 5, 6},
    "3 ranks, columns": {5, 6, 7},
    "3 ranks, replicated": set(range(len(SHAPES))),
    "2x2, rows and columns": {5, 6},
    "2x2, replicated and rows": {0, 1, 2, 3, 4, 5, 6},
    "2x2, strided rows": {0, 1, 2, 3, 4, 5, 6},
}
"""Whose first moments are stored in codes; a vector that cannot be cut along columns is replicated."""
OF_BACKEND = {
    "compiled": tuple(CODED),
    "reference": ("3 ranks, rows",),
    "triton": ("3 ranks, rows",),
}


def _train(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Errors against one process that stores the same first moments in codes, and what is kept where."""
    shape, kinds = MESHES[name]
    mesh = mesh_of(shape)
    if mesh.get_coordinate() is None:
        return {}
    tensors, plan, grads = named(SHAPES)
    plain = {key: nn.Parameter(tensor.clone()) for key, tensor in tensors.items()}
    split = {key: nn.Parameter(sharded(tensor, mesh, kinds)) for key, tensor in tensors.items()}
    groups = [
        {"params": [(key, param)], "momentum_dtype": "int8" if index in CODED[name] else None}
        for index, (key, param) in enumerate(plain.items())
    ]
    given = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "plan": plan, **options}
    alone = SlimAdam(groups, **given)
    together = SlimAdam(split.items(), momentum_dtype="int8", **given)
    expected = together.memory()
    for step in grads[: SHORT_STEPS if together.backend("p0") == "triton" else STEPS]:
        for one, other, grad in zip(plain.values(), split.values(), step, strict=True):
            one.grad = grad.float()
            one.grad.view(-1)[: grad.numel() // 3] = 0
            other.grad = sharded(one.grad, mesh, kinds)
        alone.step()
        together.step()
    pairs = list(zip(plain.values(), split.values(), strict=True))
    states = [together.state[param] for param in split.values()]
    return {
        "error": max(_difference(alone, together, one, other) for one, other in pairs),
        "coded": {index for index, state in enumerate(states) if "exp_avg_scale" in state},
        "same": [_same_codes(alone.state[one], together.state[other]) for one, other in pairs],
        "memory": [expected.exp_avg, sum(_held(state) for state in states)],
        "backend": together.backend("p0"),
    }


def _difference(alone: SlimAdam, together: SlimAdam, one: nn.Parameter, other: nn.Parameter) -> float:
    seconds = zip(moments(alone, one)[1:], moments(together, other)[1:], strict=True)
    return max(float(((a - b).abs() / (1 + a.abs())).max()) for a, b in [(full(one), full(other)), *seconds])


def _same_codes(alone: dict[str, Any], together: dict[str, Any]) -> bool:
    if "exp_avg_scale" not in together:
        return torch.equal(alone["exp_avg"], full(together["exp_avg"])) and together["exp_avg"].dtype == torch.float32
    codes = torch.equal(alone["exp_avg_codes"], full(together["exp_avg_codes"]))
    return codes and torch.equal(alone["exp_avg_scale"], full(together["exp_avg_scale"]).view(-1))


def _held(state: dict[str, Any]) -> int:
    return sum(state[key].to_local().nbytes for key in ("exp_avg", "exp_avg_codes", "exp_avg_scale") if key in state)


def _train_all() -> dict[Any, Any]:
    found = {}
    for backend, meshes in OF_BACKEND.items():
        dispatch.runs_triton = lambda device, backend=backend: backend == "triton"  # type: ignore[assignment,misc]
        for name in meshes:
            found[backend, name] = _train(name, BACKENDS[backend])
            torch.distributed.barrier()
    return found


@shards
def test_codes_are_those_of_one_process(tmp_path: Path) -> None:
    for of_rank in on_ranks(4, tmp_path, _train_all):
        for (backend, name), found in of_rank.items():
            if found:
                assert found["backend"] == backend
                assert found["coded"] == CODED[name], name
                assert all(found["same"]), (name, found["same"])
                assert found["error"] <= TOLERANCE, name
                assert found["memory"][0] == found["memory"][1]


PLAN = CompressionPlan({"0.weight": Rule((0,), "mean"), "1.weight": Rule(form="factored")})


def _run(model: nn.Module, optimizer: SlimAdam, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(6, 256, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def _resumed(folder: Path, loads: bool) -> dict[str, Any]:
    """Three steps that are saved, or two that go on from them and their error against one process."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.fsdp import fully_shard

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("slimadam").addHandler(handler)
    alone, together = (nn.Sequential(nn.Linear(256, 7), nn.Linear(7, 256)) for _ in range(2))
    together.load_state_dict(alone.state_dict())
    fully_shard(together)
    optimizer = SlimAdam(together, lr=1e-2, plan=PLAN, momentum_dtype="int8")
    if not loads:
        torch.save(alone.state_dict(), folder / "start.pt")
        _run(together, optimizer, range(3))
    parts = [state_dict.get_model_state_dict(together), state_dict.get_optimizer_state_dict(together, optimizer)]
    saved: dict[str, Any] = dict(zip(("model", "optimizer"), parts, strict=True))
    if not loads:
        checkpoint.save(saved, checkpoint_id=folder / "saved")
        return {"said": said}
    checkpoint.load(saved, checkpoint_id=folder / "saved")
    state_dict.set_model_state_dict(together, saved["model"])
    state_dict.set_optimizer_state_dict(together, optimizer, saved["optimizer"])
    _run(together, optimizer, range(3, 5))
    alone.load_state_dict(torch.load(folder / "start.pt"))
    groups = [
        {"params": [(name, param)], "momentum_dtype": "int8" if name == "0.weight" else None}
        for name, param in alone.named_parameters()
    ]
    _run(alone, SlimAdam(groups, lr=1e-2, plan=PLAN), range(5))
    pairs = zip(alone.parameters(), together.parameters(), strict=True)
    coded = optimizer.state[together[0].weight]
    return {
        "said": said,
        "error": max(float((full(one) - full(other)).abs().max()) for one, other in pairs),
        "coded": [str(coded["exp_avg_codes"].dtype), tuple(coded["exp_avg_scale"].shape)],
    }


@shards
def test_codes_saved_on_two_ranks_go_on_on_three(tmp_path: Path) -> None:
    for ranks, loads in ((2, False), (3, True)):
        (tmp_path / str(ranks)).mkdir()
        of_ranks = on_ranks(ranks, tmp_path / str(ranks), _resumed, tmp_path, loads)
        for found in of_ranks:
            (message,) = found["said"]
            assert "the first moments of 3 of 4 parameters, 53.4% of their elements, stay in the parameters'" in message
    for found in of_ranks:
        assert found["error"] <= TOLERANCE
        assert found["coded"] == ["torch.int8", (7, 1)]


def _loaded_from_one_process() -> list[tuple[bool, float]]:
    """Whether codes and scales arrive on shards bit for bit; with what error, from and to other precisions."""
    mesh, grad = mesh_of((3,)), torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    found = []
    for before, after in (("int8", "int8"), (None, "int8"), ("int8", None)):
        alone = nn.Parameter(torch.ones(7, 512))
        split = nn.Parameter(sharded(torch.ones(7, 512), mesh, ["0"]))
        one, other = (
            SlimAdam([("p", param)], plan=None, momentum_dtype=kept)
            for param, kept in ((alone, before), (split, after))
        )
        alone.grad = grad
        one.step()
        other.load_state_dict(one.state_dict())
        keys = ("exp_avg_codes", "exp_avg_scale")
        pairs = [(one.state[alone].get(key), other.state[split].get(key)) for key in keys]
        exact = all(a is not None and b is not None and torch.equal(a.flatten(), full(b).flatten()) for a, b in pairs)
        values = [decoded(alone, one.state[alone])["exp_avg"], full(decoded(split, other.state[split])["exp_avg"])]
        found.append((exact, float((values[0] - values[1]).abs().max() / values[0].abs().max())))
        split.grad = sharded(grad, mesh, ["0"])
        other.step()
    return found


def test_codes_of_one_process_are_loaded_into_shards(tmp_path: Path) -> None:
    for same, encoded, read in on_ranks(3, tmp_path, _loaded_from_one_process):
        assert same == (True, 0.0)
        assert not encoded[0]
        assert 0 < encoded[1] <= 2 / 127  # half a code of roots, of a scale at most twice the largest
        assert read == (False, 0.0)


def _full_between_layouts() -> dict[str, float]:
    """The largest error of first moments that ``full_state_dict=True`` brings from one layout to another."""
    from torch.distributed.checkpoint import state_dict

    options = state_dict.StateDictOptions(full_state_dict=True)
    meshes = {"plain": None, "rows": "0", "columns": "1"}
    found = {}

    def build(kind: str | None) -> tuple[nn.Module, SlimAdam]:
        tensors = {"matrix": torch.ones(7, 512), "vector": torch.ones(512)}
        model = nn.ParameterDict(
            {
                key: nn.Parameter(tensor if kind is None else sharded(tensor, mesh_of((2,)), [kind]))
                for key, tensor in tensors.items()
            }
        )
        return model, SlimAdam(model, plan=None, momentum_dtype="int8")

    def values(model: nn.Module, optimizer: SlimAdam) -> list[torch.Tensor]:
        return [full(decoded(param, optimizer.state[param])["exp_avg"]) for param in model.parameters()]

    for before, after in (("plain", "rows"), ("plain", "columns"), ("rows", "plain"), ("rows", "columns")):
        model, optimizer = build(meshes[before])
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 0, 512)
            param.grad = grad if meshes[before] is None else sharded(grad, mesh_of((2,)), [meshes[before]])
        optimizer.step()
        saved = state_dict.get_optimizer_state_dict(model, optimizer, options=options)
        other, loaded = build(meshes[after])
        state_dict.set_optimizer_state_dict(other, loaded, saved, options=options)
        pairs = zip(values(model, optimizer), values(other, loaded), strict=True)
        found[f"{before} to {after}"] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return found


def test_codes_go_from_any_layout_to_any_other_as_a_full_state_dict(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, _full_between_layouts):
        assert len(found) == 4
        for case, error in found.items():
            assert error <= (2 / 127 if case.startswith("rows") else 0), case  # there the vector had no codes


def _codes_and_other_moments(folder: Path) -> list[str]:
    """What a distributed checkpoint says where first moments are stored otherwise than those saved."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    def build(stored: Any) -> tuple[dict[str, Any], nn.ParameterDict, SlimAdam]:
        model = nn.ParameterDict({"p": nn.Parameter(sharded(torch.ones(7, 512), mesh_of((2,)), ["0"]))})
        optimizer = SlimAdam(model, plan=None, momentum_dtype=stored)
        return {"o": state_dict.get_optimizer_state_dict(model, optimizer)}, model, optimizer

    said = []
    for saved_as, loaded_as in (("int8", None), ("int8", torch.bfloat16), (None, "int8")):
        _, model, optimizer = build(saved_as)
        model["p"].grad = sharded(torch.randn(7, 512, generator=torch.Generator().manual_seed(1)), mesh_of((2,)), ["0"])
        optimizer.step()
        path = folder / f"{saved_as} {loaded_as}"
        checkpoint.save({"o": state_dict.get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
        with pytest.raises(checkpoint.CheckpointException) as error:
            checkpoint.load(build(loaded_as)[0], checkpoint_id=path)
        said.append(str(error.value))
    return said


def test_codes_are_not_taken_for_first_moments(tmp_path: Path) -> None:
    """DCP copies what has the name and shape that it looks for, whatever its precision."""
    for said in on_ranks(2, tmp_path, _codes_and_other_moments, tmp_path):
        assert [message.count("Missing key in checkpoint state_dict: o.state.p.exp_avg") for message in said] == [
            2,
            2,
            2,
        ]


def test_codes_gathered_from_shards_go_on_on_one_process() -> None:
    """A whole state dict of a sharded run has a row of scales for each slice."""
    plan = CompressionPlan({"p": Rule((0,), "mean")})
    grads = torch.randn(4, 7, 512, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(torch.ones(7, 512)) for _ in range(2)]
    optimizers = [SlimAdam([("p", param)], plan=plan, momentum_dtype="int8") for param in params]
    for optimizer, param, steps in zip(optimizers, params, (grads, grads[:2]), strict=True):
        for grad in steps:
            param.grad = grad
            optimizer.step()
    saved = optimizers[1].state_dict()
    saved["state"][0]["exp_avg_scale"] = saved["state"][0]["exp_avg_scale"].view(7, 2)
    resumed = SlimAdam([("p", params[1])], plan=plan, momentum_dtype="int8")
    resumed.load_state_dict(saved)
    for grad in grads[2:]:
        params[1].grad = grad
        resumed.step()
    assert torch.equal(params[1], params[0])
    resumed.state[params[1]]["exp_avg_scale"] = torch.zeros(7, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"exp_avg_scale has shape \(7, 2\), its exp_avg needs \(14,\)"):
        resumed.step()
