"""ZeRO-1: each rank keeps the optimizer state of some parameters, and the training is that of one process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam
from tests.distributed.test_ddp import LR, PLANS, STEPS, TOLERANCE, batches, network, shares, storage, train, worst
from tests.ranks import on_ranks


def zero(owner: nn.Module, /, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which ranks let pass

    return ZeroRedundancyOptimizer(owner.parameters(), optimizer_class=SlimAdam, lr=LR, **options)


def gathered_plan(optimizer: Any) -> CompressionPlan:
    """The plan of all ranks, each of which has one for its own parameters."""
    plans: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(plans, dict(optimizer.optim.plan))
    return CompressionPlan({name: rule for plan in plans for name, rule in plan.items()})


def consolidated(optimizer: Any) -> dict[str, Any]:
    """The state dict of all ranks as one reads it from a file."""
    optimizer.consolidate_state_dict(to=0)
    file = io.BytesIO()
    if torch.distributed.get_rank() == 0:
        torch.save(optimizer.state_dict(), file)
    sent = [file.getvalue()]
    torch.distributed.broadcast_object_list(sent, src=0)
    read: dict[str, Any] = torch.load(io.BytesIO(sent[0]), weights_only=True)
    return read


def _train_both(folder: Path) -> dict[str, Any]:
    found = {}
    saved = folder / f"plan{torch.distributed.get_rank()}.json"
    PLANS["plan"]().save(saved)
    for name, plan in {**PLANS, "path": lambda: str(saved)}.items():
        alone, together = network(), network()
        slim = SlimAdam(alone, lr=LR, plan=plan())
        train(alone, slim, batches())
        ddp = nn.parallel.DistributedDataParallel(together)
        optimizer = zero(ddp, plan=plan(), model=ddp, parameters_as_bucket_view=name == "factored")
        train(ddp, optimizer, shares(batches()))
        found[name] = {
            "worst": worst(alone, together),
            "storage": [storage(slim.plan), storage(gathered_plan(optimizer))],
            "held": len(optimizer.optim.plan),
        }
    return found


def test_training_equals_one_process(tmp_path: Path) -> None:
    for ranks in (2, 3):
        (tmp_path / str(ranks)).mkdir()
        of_ranks = on_ranks(ranks, tmp_path / str(ranks), _train_both, tmp_path)
        for name in (*PLANS, "path"):
            assert sum(found[name]["held"] for found in of_ranks) == len(of_ranks[0][name]["storage"][0])
            for found in of_ranks:
                alone, together = found[name]["storage"]
                assert alone == together
                assert any(form != "full" for form, _ in together.values()) == (name != "None")
                assert found[name]["worst"] <= TOLERANCE, (ranks, name)


def _resume(folder: Path) -> dict[str, Any]:
    """Errors of trainings that are saved and loaded in their midst."""
    alone, found = {}, {}
    for name in ("factored", "plan", "auto"):
        plan: Any = PLANS[name]()
        alone[name] = network()
        train(alone[name], SlimAdam(alone[name], lr=LR, plan=plan), batches())
        model = network()
        optimizer = zero(model, plan=plan, model=model)
        train_shared(model, optimizer, batches(0, 6))
        state, own = consolidated(optimizer), optimizer.optim.state_dict()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        decided = gathered_plan(optimizer)
        if torch.distributed.get_rank() == 0:
            decided.save(folder / f"{name}.json")
            torch.save([state, weights, alone[name].state_dict()], folder / f"{name}.pt")
        for way in ("consolidated", "of each rank"):
            model.load_state_dict(weights)
            optimizer = zero(model, plan=decided if way == "consolidated" else plan, model=model)
            if way == "consolidated":
                optimizer.load_state_dict(state)
            else:
                optimizer.optim.load_state_dict(own)
            train_shared(model, optimizer, batches(6, STEPS))
            found[name, way] = worst(alone[name], model)
    return found


def _resume_on_more(folder: Path) -> dict[str, float]:
    found = {}
    for saved in sorted(folder.glob("*.pt")):
        state, weights, alone = torch.load(saved, weights_only=True)
        model, expected = network(), network()
        model.load_state_dict(weights)
        expected.load_state_dict(alone)
        optimizer = zero(model, plan=str(saved.with_suffix(".json")), model=model)
        optimizer.load_state_dict(state)
        train_shared(model, optimizer, batches(6, STEPS))
        found[saved.stem] = worst(expected, model)
    return found


def train_shared(model: nn.Module, optimizer: Any, data: list[Tensor]) -> None:
    """As DistributedDataParallel would."""
    ranks = torch.distributed.get_world_size()
    for batch in shares(data):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        for param in model.parameters():
            if param.grad is not None:
                torch.distributed.all_reduce(param.grad)
                param.grad /= ranks
        optimizer.step()


def test_saved_and_loaded_training_goes_on(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, _resume, tmp_path):
        assert len(found) == 6
        for case, error in found.items():
            assert error <= TOLERANCE, case
    (tmp_path / "3").mkdir()
    for on_three in on_ranks(3, tmp_path / "3", _resume_on_more, tmp_path):
        assert len(on_three) == 3
        for name, error in on_three.items():
            assert error <= TOLERANCE, name


def _later_group() -> dict[str, Any]:
    """Of an attention that is trained from the fourth step on, at another rate; and of a rank without parameters."""
    models, optimizers = [network(), network()], []
    for model in models:
        model.attention.requires_grad_(False)
        trained = (model.up, model.down)
        optimizers.append(make(model, [{"params": [*part.parameters()]} for part in trained], model is models[1]))
    trains = [train, train_shared]
    for model, optimizer, run in zip(models, optimizers, trains, strict=True):
        run(model, optimizer, batches(0, 3))
        model.attention.requires_grad_(True)
        optimizer.add_param_group({"params": [*model.attention.parameters()], "lr": LR / 2})
        run(model, optimizer, batches(3, STEPS))
    few = nn.Linear(3, 4, bias=False)
    lonely = zero(few, plan="factored", model=few)
    few(torch.ones(2, 3)).sum().backward()
    lonely.step()
    return {
        "worst": worst(*models),
        "storage": [storage(optimizers[0].plan), storage(gathered_plan(optimizers[1]))],
        "lonely": [len(lonely.optim.plan), few.weight.tolist()],
        "messages": _messages(),
    }


def make(model: nn.Module, groups: list[dict[str, Any]], split: bool) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if split:
        return ZeroRedundancyOptimizer(groups, SlimAdam, lr=LR, plan="factored", model=model)
    return SlimAdam(groups, lr=LR, plan="factored", model=model)


def test_groups_added_later_ranks_without_parameters_and_what_is_refused(tmp_path: Path) -> None:
    of_ranks = on_ranks(3, tmp_path, _later_group)
    assert sorted(found["lonely"][0] for found in of_ranks) == [0, 0, 1]
    for found in of_ranks:
        assert found["worst"] <= TOLERANCE
        assert found["storage"][0] == found["storage"][1]
        assert found["lonely"][1] == of_ranks[0]["lonely"][1]
        nameless, overlapping, undecided = found["messages"]
        assert "the plan goes by parameter names, but these parameters have none: pass model=model" in nameless
        assert "no supported functional optimizer equivalent" in overlapping
        assert "ZeroRedundancyOptimizer's state dict has no plan" in undecided


def _messages() -> list[str]:
    model, said = network(), []
    plan = CompressionPlan({"up.weight": Rule((0,), "mean")})
    optimizer = zero(model, plan="factored")
    train_shared(model, optimizer, batches(0, 1))
    state = consolidated(optimizer)

    def undecided() -> None:
        again = zero(model, plan=AutoPlan(calibration_steps=2), model=model)
        again.load_state_dict(state)
        again.step()

    for wrong in (
        lambda: zero(model, plan=plan),
        lambda: zero(model, plan="factored", overlap_with_ddp=True),
        undecided,
    ):
        with pytest.raises((RuntimeError, ValueError)) as error:
            wrong()
        said.append(str(error.value))
    return said


def test_a_group_has_no_model_of_its_own() -> None:
    model = network()
    with pytest.raises(TypeError, match="model in a parameter group: it is for a whole optimizer"):
        SlimAdam([{"params": model.parameters(), "model": model}], plan=None)


def test_a_plan_with_parts_serves_an_optimizer_of_other_parameters() -> None:
    model = network()
    plan = SlimAdam(model, plan="rules").plan
    assert any(rule.part is not None for rule in plan.values())
    optimizer = SlimAdam(model.up.parameters(), plan=plan, model=model)
    assert storage(optimizer.plan) == {name: how for name, how in storage(plan).items() if name.startswith("up.")}
