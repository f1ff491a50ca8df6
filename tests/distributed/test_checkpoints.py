"""State dicts of sharded parameters: AdamW's, another plan's, whole ones, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map, tree_map_only

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, convert_state_dict
from tests.distributed.test_step import full, mesh_of
from tests.optim.checkpoint.test_pairs import AFTER, BEFORE, Model, build, train
from tests.ranks import on_ranks
from tests.reference import second_moments
from tests.versions import shards

RANKS = 3
FACTORED = CompressionPlan({f"{name}.weight": Rule(form="factored") for name in ("full", "dimension 0", "parts")})


def whole(state: Any) -> Any:
    """A state dict with every DTensor gathered."""
    return tree_map_only(Tensor, lambda tensor: full(tensor).clone(), state)


def layout(state_dict: Any) -> Any:
    """How each DTensor of a state dict lies."""
    return tree_map(lambda value: getattr(value, "placements", None), state_dict["state"])


def same(one: Any, other: Any) -> bool:
    """Whether the states of two state dicts hold the same numbers."""
    equal = tree_map(
        lambda a, b: a.dtype == b.dtype and torch.equal(full(a), full(b)) if isinstance(a, Tensor) else a == b,
        one["state"],
        other["state"],
    )
    return all(torch.utils._pytree.tree_leaves(equal))


def _trained(mesh: Any) -> tuple[nn.Module, SlimAdam]:
    model, optimizer = build(mesh)
    train(model, optimizer, mesh, range(BEFORE))
    return model, optimizer


def _alone(state_dict: Any) -> SlimAdam:
    """An optimizer of one process with the same state."""
    _, optimizer = build(None)
    optimizer.load_state_dict(whole(state_dict))
    return optimizer


def _of_version(version: int, state_dict: Any) -> Any:
    """A state dict as it was before second moments had keys of their own."""
    states = {}
    for saved_id, state in state_dict["state"].items():
        states[saved_id] = {key: value for key, value in state.items() if "exp_avg_sq" not in key}
        for kind in ("exp_avg_sq", "max_exp_avg_sq"):
            moments: Any = second_moments(state, kind)
            if len(moments) > 1:
                states[saved_id][kind] = moments if version == 1 else dict(zip("0123", moments, strict=False))
            elif moments:
                states[saved_id][kind] = moments[0]
    return {**state_dict, "state": states, "slimadam": {**state_dict["slimadam"], "format_version": version}}


def _adamw(optimizer: SlimAdam) -> torch.optim.AdamW:
    groups = optimizer.param_groups
    return torch.optim.AdamW([{"params": group["params"], "amsgrad": group["amsgrad"]} for group in groups])


def adamw_state(mesh: Any, folder: Path) -> dict[str, bool]:
    """To AdamW through a distributed checkpoint, and back into another plan."""
    model, optimizer = _trained(mesh)
    given = optimizer.adamw_state_dict()
    adamw = _adamw(optimizer)
    adamw.load_state_dict(given)
    save({"optimizer": get_optimizer_state_dict(model, adamw)}, checkpoint_id=folder / "adamw")

    fresh, slim = build(mesh)
    target = _adamw(slim)
    saved = {"optimizer": get_optimizer_state_dict(fresh, target)}
    load(saved, checkpoint_id=folder / "adamw")
    set_optimizer_state_dict(fresh, slim, saved["optimizer"])
    averaged = _alone(optimizer.state_dict()).adamw_state_dict()
    alone = build(None)[1]
    alone.load_state_dict(averaged)
    _, of_full_state = build(mesh)
    gathered = get_optimizer_state_dict(model, adamw, options=StateDictOptions(full_state_dict=True))
    of_full_state.load_state_dict(gathered)
    return {
        "given as one process gives it": same(averaged, given),
        "as its parameters lie": all(
            state[key].placements == param.placements
            for param, state in zip(optimizer.state, given["state"].values(), strict=True)
            for key in ("exp_avg", "exp_avg_sq")
        ),
        "averaged as one process averages it": same(alone.state_dict(), slim.state_dict()),
        "from a full state dict too": same(alone.state_dict(), of_full_state.state_dict()),
    }


def other_plans(mesh: Any, folder: Path) -> dict[str, bool]:
    """convert_state_dict() and expand()."""
    _, optimizer = _trained(mesh)
    alone = _alone(optimizer.state_dict())
    converted = [convert_state_dict(one.state_dict(), FACTORED) for one in (optimizer, alone)]
    model, _ = build(mesh)
    params = dict(model.named_parameters())
    groups = [
        {**group, "params": [(name, params[name]) for name in group.pop("param_names")]}
        for group in map(dict, optimizer.param_groups)
    ]
    other = SlimAdam(groups, plan=FACTORED)
    other.load_state_dict(converted[0])
    found = {"converted": same(*converted), "loaded": same(converted[1], other.state_dict())}
    for one in (optimizer, alone):
        one.expand("factored.weight")
        one.expand("dimension 0.weight")
    found["expanded"] = same(optimizer.state_dict(), alone.state_dict())
    before = whole(optimizer.state_dict())
    try:
        optimizer.expand("parts.weight[key]")
        found["refused where shards end inside a part"] = False
    except RuntimeError as error:
        found["refused where shards end inside a part"] = "cannot be followed" in str(error)
    found["unchanged"] = same(before, optimizer.state_dict()) and optimizer.plan["parts.weight[key]"].form == "mean"
    return found


def whole_tensors(mesh: Any, folder: Path) -> dict[str, bool]:
    """State dicts of one process into shards, shards into one process, and rank 0's to all."""
    model, optimizer = _trained(mesh)
    own = optimizer.state_dict()
    _, sharded = build(mesh)
    sharded.load_state_dict(whole(own))
    _, alone = build(None)
    alone.load_state_dict(own)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    receiving, broadcast = build(mesh)
    set_optimizer_state_dict(receiving, broadcast, saved, options=options)
    _, of_lists = build(None)
    of_lists.load_state_dict(_of_version(1, whole(own)))
    _, of_dicts = build(mesh)
    of_dicts.load_state_dict(_of_version(2, own))
    return {
        "whole into shards": same(own, sharded.state_dict()),
        "laid out as by the step": layout(own) == layout(sharded.state_dict()) == layout(broadcast.state_dict()),
        "shards into one process": same(own, alone.state_dict()),
        "rank 0 holds all": (len(saved.get("state", ())) == len(own["state"])) == (torch.distributed.get_rank() == 0),
        "from rank 0": same(own, broadcast.state_dict()),
        "lists of version 1": same(own, of_lists.state_dict()),
        "dicts of version 2, of shards": same(own, of_dicts.state_dict()),
    }


def refused(mesh: Any, folder: Path) -> dict[str, bool]:
    """What one rank cannot load is loaded by none."""
    _, optimizer = _trained(mesh)
    before = whole(optimizer.state_dict())
    damaged = optimizer.state_dict()
    if torch.distributed.get_rank() == 1:
        damaged["state"] = {**damaged["state"], 0: {**damaged["state"][0], "step": "nine"}}
    try:
        optimizer.load_state_dict(damaged)
        message = ""
    except (ValueError, RuntimeError) as error:
        message = str(error)
    damaged_here = torch.distributed.get_rank() == 1
    groups = [{"params": group["params"]} for group in build(mesh)[1].param_groups]
    under_another = SlimAdam(groups, plan="factored")
    try:
        own_groups = under_another.state_dict()["param_groups"]
        under_another.load_state_dict({**optimizer.state_dict(), "param_groups": own_groups})
        plan_message = ""
    except PlanError as error:
        plan_message = str(error)
    return {
        "says why": ("step is 'nine'" if damaged_here else "another rank") in message,
        "unchanged": same(before, optimizer.state_dict()),
        "says what to do": "convert_state_dict" in plan_message,
        "took nothing": not under_another.state,
    }


def another(mesh: Any, folder: Path) -> dict[str, bool]:
    """A state dict that is sound, but another one on one rank, is loaded by none; and no rank waits for ever."""
    _, optimizer = _trained(mesh)
    before = whole(optimizer.state_dict())
    adamw = _adamw(optimizer)
    adamw.load_state_dict(optimizer.adamw_state_dict())

    def without(state_dict: Any) -> Any:
        return {**state_dict, "state": {key: state for key, state in state_dict["state"].items() if key != 2}}

    def stepped(state_dict: Any) -> Any:
        return {**state_dict, "state": {**state_dict["state"], 2: {**state_dict["state"][2], "step": 9}}}

    def gathered(state_dict: Any) -> Any:
        return {**state_dict, "state": {**state_dict["state"], 2: whole(state_dict["state"][2])}}

    found = {}
    for kind, given in (("its own", optimizer.state_dict()), ("AdamW's", adamw.state_dict())):
        for change in (without, stepped, gathered):
            changed = change(given)
            try:
                optimizer.load_state_dict(changed if torch.distributed.get_rank() == 1 else given)
                message = ""
            except RuntimeError as error:
                message = str(error)
            case = f"{kind}, {change.__name__}"
            found[case] = message.startswith("'factored, bfloat16.weight': ranks that share it")
            found[f"{case}: unchanged"] = same(before, optimizer.state_dict())
    return found


def automatic(mesh: Any, folder: Path) -> dict[str, bool]:
    """plan="auto": resumed after the decision with the plan in force; before, measuring starts anew."""
    from torch.distributed.fsdp import fully_shard

    def sharded_model() -> nn.Module:
        torch.manual_seed(4)
        model = Model({"first": nn.Linear(6, 5, bias=False), "second": nn.Linear(5, 7, bias=False)})
        return fully_shard(model, mesh=mesh)

    settings = AutoPlan(calibration_steps=BEFORE, cutoff=0.01, measurements=BEFORE)
    model = sharded_model()
    optimizer = SlimAdam(model, plan=settings)
    # As before a checkpoint is loaded: torch makes state by a step of zero, which is no step.
    blank = get_optimizer_state_dict(model, optimizer)
    found = {"blank": all(state["step"] == 0 for state in blank["state"].values())}
    train(model, optimizer, mesh, range(BEFORE - 1))
    found["the step of zero is not counted"] = "measuring" in optimizer.state_dict()["slimadam"]
    train(model, optimizer, mesh, range(BEFORE - 1, BEFORE))
    found["decided"] = "measuring" not in optimizer.state_dict()["slimadam"] and optimizer.plan.second_moments_saved > 0
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save(state, checkpoint_id=folder / "auto")
    if torch.distributed.get_rank() == 0:
        optimizer.plan.save(folder / "plan.json")
    train(model, optimizer, mesh, range(BEFORE, BEFORE + AFTER))
    torch.distributed.barrier()

    resumed = sharded_model()
    again = SlimAdam(resumed, plan=folder / "plan.json")
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, again), strict=True))
    load(state, checkpoint_id=folder / "auto")
    set_state_dict(resumed, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(resumed, again, mesh, range(BEFORE, BEFORE + AFTER))
    found["resumed"] = same(optimizer.state_dict(), again.state_dict())

    unaware_model = sharded_model()
    unaware = SlimAdam(unaware_model, plan=settings)
    target = get_optimizer_state_dict(unaware_model, unaware)
    before = whole(target)
    try:
        load({"optimizer": target}, checkpoint_id=folder / "auto")
        message = ""
    except CheckpointException as error:
        message = str(error)
    missing = "Missing key in checkpoint state_dict: optimizer.state.first.weight.exp_avg_sq"
    found["refused on every rank"] = missing in message
    found["unchanged"] = same(before, target)
    return found


def run_cases(folder: Path) -> dict[str, dict[str, bool]]:
    mesh = mesh_of((RANKS,))
    cases = (adamw_state, other_plans, whole_tensors, refused, another, automatic)
    return {case.__name__: case(mesh, folder) for case in cases}


@shards
def test_state_dicts_of_shards(tmp_path: Path) -> None:
    for found in on_ranks(RANKS, tmp_path, run_cases, tmp_path):
        assert not {(case, check) for case, checks in found.items() for check, holds in checks.items() if not holds}
