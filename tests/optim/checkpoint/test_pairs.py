"""Distributed checkpoints: saved on N ranks, loaded on M, training goes on as on one process that never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.layers.splits import Part
from tests.distributed.test_step import full, mesh_of, moments, sharded
from tests.ranks import on_ranks
from tests.reference import gradients, second_moments
from tests.versions import shards

BEFORE, AFTER = 3, 2
TOLERANCE = 2e-5
RANKS = (1, 2, 3, 4)
MEAN_0, MEAN_1 = Rule((0,), "mean"), Rule((1,), "mean")


def _parts(value: Rule) -> dict[str, Rule]:
    rules, start = {}, 0
    for label, size, rule in (("query", 7, MEAN_1), ("key", 5, MEAN_0), ("value", 7, value)):
        part = Part(label, (19, 6), (19, 6), 0, start, size)
        rules[f"[{label}]"] = replace(rule, part=part, shape=part.shape)
        start += size
    return rules


# Rows, and rules by name of the part. Shards are uneven on 2, 3 and 4 ranks; on 4 the last of 5 rows is empty, of 2
# rows the last is on 3 too.
WEIGHTS: dict[str, tuple[int, dict[str, Rule]]] = {
    "full": (5, {"": Rule()}),
    "dimension 0": (5, {"": MEAN_0}),
    "dimension 1": (5, {"": MEAN_1}),
    "factored": (5, {"": Rule(form="factored")}),
    "short": (2, {"": Rule(form="factored")}),
    "parts": (19, _parts(Rule(form="factored"))),
    "parts, amsgrad": (19, _parts(Rule((0, 1), "mean"))),
    "dimension 1, bfloat16": (5, {"": MEAN_1}),
    "factored, bfloat16": (5, {"": Rule(form="factored")}),
}
PLAN = CompressionPlan(
    {f"{name}.weight{part}": rule for name, (_, rules) in WEIGHTS.items() for part, rule in rules.items()}
)
KINDS = ("sync", "flat", "full", "async")


class Model(nn.Module):
    """Layers by name; ``fully_shard`` does not take a ModuleDict before torch 2.12."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def build(mesh: Any) -> tuple[nn.Module, SlimAdam]:
    """A model, sharded unless there is no mesh, and its optimizer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    model = Model({name: nn.Linear(6, rows, bias=False) for name, (rows, _) in WEIGHTS.items()})
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    groups: dict[str, dict[str, Any]] = {
        "amsgrad": {"amsgrad": True},
        "bfloat16": {"momentum_dtype": torch.bfloat16},
        "": {},
    }
    for name, param in model.named_parameters():
        group = next(option for option in groups if option in name)
        groups[group].setdefault("params", []).append((name, param))
    return model, SlimAdam(groups.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, plan=PLAN)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(model.parameters()):
            grad = gradients(tuple(param.shape), BEFORE + AFTER, seed=index)[step].float()
            param.grad = grad if mesh is None else sharded(grad, mesh, ["0"])
        optimizer.step()
    optimizer.zero_grad()


def tensors(model: nn.Module, optimizer: SlimAdam) -> dict[str, list[Tensor]]:
    """Copies of what a checkpoint keeps, whole, by weight."""
    found = {}
    for name, param in zip(WEIGHTS, model.parameters(), strict=True):
        largest = second_moments(optimizer.state[param], "max_exp_avg_sq")
        assert bool(largest) == ("amsgrad" in name)
        found[name] = [one.clone() for one in (full(param), *moments(optimizer, param), *map(full, largest))]
    return found


def options_of(kind: str) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=kind == "flat", full_state_dict=kind == "full")


def states(model: nn.Module, optimizer: SlimAdam, kind: str) -> dict[str, Any]:
    found = get_state_dict(model, optimizer, options=options_of(kind))
    return dict(zip(("model", "optimizer"), found, strict=True))


def save(folder: Path, model: nn.Module, optimizer: SlimAdam, group: Any, kind: str) -> Any:
    saved = states(model, optimizer, kind)
    if kind == "full":
        if torch.distributed.get_rank() == 0:
            torch.save(saved, folder.with_suffix(".pt"))
    elif kind == "async":
        return dcp.async_save(saved, checkpoint_id=folder, process_group=group)
    else:
        dcp.save(saved, checkpoint_id=folder, process_group=group)
    return None


def load(folder: Path, model: nn.Module, optimizer: SlimAdam, group: Any, kind: str) -> None:
    options = options_of(kind)
    if kind == "full":
        saved = torch.load(folder.with_suffix(".pt"), weights_only=True)
    else:
        saved = states(model, optimizer, kind)
        dcp.load(saved, checkpoint_id=folder, process_group=group)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
    )


def run_pairs(folder: Path) -> dict[tuple[str, int, int], dict[str, tuple[float, float, float]]]:
    """The largest differences of each weight and its state, for each kind of state dict and pair of numbers of ranks.

    Of what is loaded to what was saved; and, for one kind, after more training to the ranks that saved, which never
    stopped, and to one process.
    """
    meshes = {ranks: mesh_of((ranks,)) for ranks in RANKS}
    # Not those of training: a save in the background would mix its messages with the step's.
    groups = {ranks: torch.distributed.new_group(list(range(ranks))) for ranks in RANKS}
    rank = torch.distributed.get_rank()
    for ranks, mesh in meshes.items():
        if rank < ranks:
            model, optimizer = build(mesh)
            train(model, optimizer, mesh, range(BEFORE))
            saved = tensors(model, optimizer)
            pending = [save(folder / f"{kind}-{ranks}", model, optimizer, groups[ranks], kind) for kind in KINDS]
            train(model, optimizer, mesh, range(BEFORE, BEFORE + AFTER))
            after = tensors(model, optimizer)
            for future in filter(None, pending):
                future.result()
            if rank == 0:
                torch.save((saved, after), folder / f"expected-{ranks}.pt")
    torch.distributed.barrier()
    alone, alone_optimizer = build(None)
    train(alone, alone_optimizer, None, range(BEFORE + AFTER))
    of_one = tensors(alone, alone_optimizer)
    expected = {ranks: torch.load(folder / f"expected-{ranks}.pt") for ranks in RANKS}
    found = {}
    for ranks, mesh in meshes.items():
        for kind, saved_by in ((kind, saved_by) for kind in KINDS for saved_by in RANKS if rank < ranks):
            model, optimizer = build(mesh)
            load(folder / f"{kind}-{saved_by}", model, optimizer, groups[ranks], kind)
            saved, after = expected[saved_by]
            loaded, resumed = tensors(model, optimizer), after
            if kind == "sync":
                train(model, optimizer, mesh, range(BEFORE, BEFORE + AFTER))
                resumed = tensors(model, optimizer)
            found[kind, saved_by, ranks] = {
                name: (
                    difference(loaded[name], saved[name]),
                    difference(resumed[name], after[name]),
                    difference(resumed[name], of_one[name]),
                )
                for name in WEIGHTS
            }
    torch.distributed.barrier()
    return found


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    return max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(found, expected, strict=True))


@shards
def test_every_pair_resumes_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    for rank, found in enumerate(on_ranks(4, tmp_path, run_pairs, tmp_path)):
        assert len(found) == len(KINDS) * len(RANKS) * (len(RANKS) - rank)
        for (kind, saved_by, ranks), differences in found.items():
            for name, (loaded, on_as_many, of_one) in differences.items():
                case = kind, saved_by, ranks, name
                assert loaded == 0, case
                assert on_as_many == 0 or saved_by != ranks, case
                # A value may round the other way in bfloat16, and then differs by a part in 256.
                assert of_one <= (1e-3 if "bfloat16" in name else TOLERANCE), (case, of_one)
