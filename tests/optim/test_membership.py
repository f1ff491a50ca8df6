"""Parameters that come, leave or are exchanged in groups by hand, as AdamW allows; lazy ones; keys of users' own."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, convert_state_dict
from tests.versions import needs_torch

PLANS: dict[str, Any] = {"none": None, "auto": "auto", "factored": "factored", "soon": AutoPlan(calibration_steps=2)}


def made(shape: tuple[int, ...] = (4, 6)) -> nn.Parameter:
    param = nn.Parameter(torch.randn(shape))
    param.grad = torch.randn_like(param)
    return param


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("edit", ["append", "remove", "exchange", "exchange size", "insert", "reorder", "all"])
@pytest.mark.parametrize("plan", PLANS)
def test_hand_edited_groups_train_as_with_adamw(plan: str, edit: str, named: bool) -> None:
    torch.manual_seed(3)
    first = [made() for _ in range(3)]
    twins = [nn.Parameter(param.detach().clone()) for param in first]
    ours = SlimAdam([(f"w{i}", p) for i, p in enumerate(first)] if named else list(first), plan=PLANS[plan])
    theirs = torch.optim.AdamW(twins)
    new = made((6, 6) if edit == "exchange size" else (4, 6))
    extra = [new, nn.Parameter(new.detach().clone())]
    for step in range(6):
        if step == 3:
            for optimizer, own in zip((ours, theirs), extra, strict=True):
                held = optimizer.param_groups[0]["params"]
                if edit == "append":
                    held.append(own)
                elif edit == "remove":
                    held.pop(0)
                elif edit.startswith("exchange"):
                    held[1] = own
                elif edit == "insert":
                    held.insert(0, own)
                elif edit == "reorder":
                    held.reverse()
                else:
                    held[:] = [own]
        pairs = list(zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True))
        for one, other in pairs:
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
        if plan in ("none", "auto"):
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert len(ours.plan) == len(ours.param_groups[0]["params"])
    shapes = [tuple(param.shape) for param in ours.param_groups[0]["params"]]
    assert [rule.shape for rule in ours.plan.values()] == shapes


def test_what_comes_back_has_its_name_and_rule_again() -> None:
    params = [made((32, 16)) for _ in range(2)]
    optimizer = SlimAdam(
        [("a", params[0]), ("b", params[1])], plan=CompressionPlan({"a": Rule((1,), "mean"), "b": Rule()})
    )
    optimizer.step()
    held = optimizer.param_groups[0]["params"]
    held.remove(params[0])
    optimizer.step()
    assert list(optimizer.plan) == ["b"]
    held.append(params[0])
    optimizer.step()
    assert optimizer.plan["a"].dims == (1,)
    assert optimizer.state[params[0]]["step"] == 2


def test_a_plan_by_names_needs_a_name_and_says_how() -> None:
    first, second = made(), made()
    optimizer = SlimAdam([("a", first)], plan=CompressionPlan({"a": Rule((1,), "mean")}))
    optimizer.param_groups[0]["params"].append(second)
    before = first.detach().clone()
    with pytest.raises(PlanError, match=r"shape \(4, 6\) was put into param_groups\[0\].*add_param_group"):
        optimizer.step()
    assert torch.equal(first, before)
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    optimizer.add_param_group({"params": [("b", second)], "plan": None})
    optimizer.step()


def test_groups_assigned_as_a_whole_are_taken_with_the_defaults() -> None:
    first, second = made(), made()
    optimizer = SlimAdam([first], plan="factored", weight_decay=0.3)
    optimizer.step()
    optimizer.param_groups = [{"params": [second], "lr": 0.5}, {"params": [first]}]
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert optimizer.state[first]["step"] == 2
    copied = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    assert list(copied.plan) == list(optimizer.plan)


@pytest.mark.parametrize("plan", ["factored", "auto", CompressionPlan({"w": Rule((0,), "mean")})], ids=str)
def test_one_vector_in_the_place_of_one_matrix_is_refused(plan: Any) -> None:
    param = made()
    optimizer = SlimAdam([("w", param)], plan=plan)
    optimizer.step()
    flat = made((24,))
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(RuntimeError, match=r"'w': a parameter of shape \(24,\) stands .* DeepSpeed"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_without_a_plan_vectors_may_stand_for_matrices() -> None:
    optimizer = SlimAdam([made(), made()], plan=None)
    flat = made((48,))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()
    assert optimizer.state[flat]["exp_avg_sq"].shape == (48,)


@needs_torch((2, 11), "weak references to tensors are not safe")
def test_nothing_that_left_is_kept_alive() -> None:
    gone, stays = made(), made()
    optimizer = SlimAdam([gone, stays], plan="factored")
    optimizer.step()
    optimizer.param_groups[0]["params"].remove(gone)
    optimizer.state.pop(gone)
    left = weakref.ref(gone)
    optimizer.step()
    del gone
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("plan", [None, "factored", "auto", "rules"], ids=str)
def test_modules_whose_shapes_are_not_known_yet(plan: Any) -> None:
    lazy, ready = (nn.Sequential(kind(16), nn.ReLU(), kind(4)) for kind in (nn.LazyLinear, lambda n: nn.Linear(16, n)))
    optimizer = SlimAdam(lazy, plan=plan)
    assert optimizer.memory().total == 0
    assert not optimizer.plan
    x = torch.randn(8, 16)
    lazy(x)
    ready.load_state_dict(lazy.state_dict())
    beside = SlimAdam(ready, plan=plan)
    for _ in range(3):
        for model, own in ((lazy, optimizer), (ready, beside)):
            own.zero_grad()
            model(x).square().mean().backward()
            own.step()
    for one, other in zip(lazy.parameters(), ready.parameters(), strict=True):
        assert torch.equal(one, other)
    assert optimizer.plan.to_dict() == beside.plan.to_dict()


SLIPS = ("no_weight_decay", "eps1", "plans", "param_name", "weight_decays")
OWN_KEYS = ("name", "lr_scale", "wd_mult", "layer_id", *SLIPS)


@pytest.mark.parametrize("key", OWN_KEYS)
def test_keys_of_users_own_are_kept_and_slips_told_once(key: str, caplog: pytest.LogCaptureFixture) -> None:
    from slimadam.optim.step import options

    options._tell_of_slip.cache_clear()
    for _ in range(2):
        optimizer = SlimAdam([{"params": [made()], key: 7}])
        optimizer.step()
        assert optimizer.param_groups[0][key] == 7
        assert optimizer.state_dict()["param_groups"][0][key] == 7
    told = [record.message for record in caplog.records if repr(key) in record.message]
    assert len(told) == (1 if key in SLIPS else 0)


def test_fused_with_foreach_false_is_the_fused_step() -> None:
    param = made((64, 64))
    optimizer = SlimAdam([("w", param)], plan="factored", fused=True, foreach=False)
    assert optimizer.backend("w") == SlimAdam([("w", made((64, 64)))], plan="factored", fused=True).backend("w")


@needs_torch((2, 11), "weak references to tensors are not safe")
def test_an_optimizer_for_each_parameter_reads_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimadam.layers import names

    read: list[nn.Module] = []
    roles_of = names.roles_of
    monkeypatch.setattr(names, "roles_of", lambda model: read.append(model) or roles_of(model))
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4)
    optimizers = [SlimAdam([param], plan="factored") for param in model.parameters()]
    assert len(read) == 1
    together = SlimAdam(list(model.parameters()), plan="factored")
    apart = [rule.storage for optimizer in optimizers for rule in optimizer.plan.values()]
    assert apart == [rule.storage for rule in together.plan.values()]
    wider = nn.Sequential(model, nn.Linear(16, 16))
    found = SlimAdam(list(wider.parameters()), plan="factored")
    assert len(found.plan) > len(together.plan)
    assert read[-1] is wider


def edit(kind: str, optimizer: torch.optim.Optimizer) -> None:
    held = optimizer.param_groups[0]["params"]
    if kind == "remove":
        optimizer.state.pop(held.pop(0))
    elif kind == "reverse":
        held.reverse()
    elif kind == "remove, append":
        optimizer.state.pop(held.pop(0))
        held.append(made((4, 4, 4)))
    else:
        optimizer.param_groups.append({"params": [held.pop(1)]})


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                scale = torch.logspace(-1, 1, max(1, param.numel())).reshape(param.shape)
                param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        optimizer.step()


def resumed(optimizer: SlimAdam, **options: Any) -> SlimAdam:
    """A fresh optimizer, of parameters with the same values, into which the state is loaded."""
    groups = [{"params": [nn.Parameter(p.detach().clone()) for p in g["params"]]} for g in optimizer.param_groups]
    fresh = SlimAdam(groups, **options)
    fresh.load_state_dict(optimizer.state_dict())
    return fresh


def values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@pytest.mark.parametrize("kind", ["remove", "reverse", "remove, append", "move"])
@pytest.mark.parametrize("before", [2, 8])
@pytest.mark.parametrize("plan", ["auto", "factored", "none"])
def test_unnamed_parameters_resume_as_they_go_on_after_an_edit(plan: str, before: int, kind: str) -> None:
    """Places stand for names: they are those of now, in plan, measurements, samples and the seeds of rounding."""
    torch.manual_seed(1)
    auto = AutoPlan(calibration_steps=6, measurements=3, cutoff=0.5)
    options: dict[str, Any] = {
        "plan": {"auto": auto, "factored": "factored", "none": None}[plan],
        "bf16_stochastic_round": True,
        "betas": (0.9, 0.95),
    }
    shapes = ((80, 100), (70, 90), (80, 130))
    optimizer = SlimAdam([nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes], **options)
    train(optimizer, before, 1)
    if plan == "factored":
        optimizer.expand("param_groups.0.params.1")
    edit(kind, optimizer)
    train(optimizer, 1, 2)
    places = [
        f"param_groups.{group}.params.{index}"
        for group, own in enumerate(optimizer.param_groups)
        for index in range(len(own["params"]))
    ]
    assert list(optimizer.plan) == places
    again = resumed(optimizer, **options)
    for one in (optimizer, again):
        train(one, 6, 3)
    assert again.plan == optimizer.plan
    assert again.plan == CompressionPlan.from_dict(again.state_dict()["slimadam"]["plan"])
    assert plan == "none" or optimizer.plan.second_moments_saved > 0
    assert repr(again.snr_check()) == repr(optimizer.snr_check())
    for one, other in zip(values(optimizer), values(again), strict=True):
        assert torch.equal(one, other)


def test_measurements_stay_with_their_parameters() -> None:
    torch.manual_seed(1)
    options: dict[str, Any] = {"plan": AutoPlan(calibration_steps=6, measurements=3, cutoff=0.5), "betas": (0.9, 0.9)}
    first = SlimAdam([made((12, 12)) for _ in range(3)], **options)
    named = SlimAdam([(f"w{i}", nn.Parameter(p.detach().clone())) for i, p in enumerate(values(first))], **options)
    for one in (first, named):
        train(one, 4, 1)
        one.state.pop(one.param_groups[0]["params"].pop(0))
        train(one, 1, 2)
    after = [resumed(first, **options), first, named]
    for one in after:
        train(one, 1, 3)
    ratios = [[rule.snr for rule in one.plan.values()] for one in after]
    assert ratios[0] == ratios[1] == ratios[2]
    assert all(ratios[0])


def test_what_one_removed_parameter_was_measured_as_is_not_the_next_ones() -> None:
    plan = AutoPlan(calibration_steps=4, measurements=4, cutoff=0.5)
    optimizer = SlimAdam([made((8, 8)), made((8, 8))], plan=plan)
    train(optimizer, 3, 1)
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop())
    optimizer.memory()
    new = made((8, 8))
    optimizer.param_groups[0]["params"].append(new)
    train(optimizer, 1, 2)
    alone = SlimAdam([nn.Parameter(torch.ones(8, 8))], plan=AutoPlan(calibration_steps=1, cutoff=0.5))
    alone.param_groups[0]["params"][0].grad = new.grad
    alone.step()
    [expected] = alone.plan.values()
    assert optimizer.plan["param_groups.0.params.1"].snr == expected.snr


def test_names_of_two_modules_are_told_apart_by_where_they_stand_now() -> None:
    first, second = made(), made()
    optimizer = SlimAdam([("weight", first)], plan="factored")
    optimizer.add_param_group({"params": [("weight", second)]})
    assert list(optimizer.plan) == ["weight", "param_groups.1.params.0.weight"]
    optimizer.param_groups.reverse()
    assert list(optimizer.plan) == ["weight", "param_groups.1.params.0.weight"]
    assert optimizer._find("weight").param is second
    del optimizer.param_groups[0]
    assert list(optimizer.plan) == ["weight"]
    assert optimizer._find("weight").param is first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
@pytest.mark.parametrize("plan", [None, "factored", "auto"], ids=str)
@pytest.mark.parametrize("kind", ["append", "pop", "reverse"])
def test_copies_between_an_edit_and_the_next_step_train_as_the_original(kind: str, plan: Any, copied: Any) -> None:
    first, second = made((8, 8)), made((8, 8))
    optimizer = SlimAdam([("a", first), ("b", second)], plan=plan)
    train(optimizer, 2, 1)
    held = optimizer.param_groups[0]["params"]
    if kind == "append":
        held.append(made((2,)))
    elif kind == "pop":
        optimizer.state.pop(held.pop())
    else:
        held.reverse()
    again = copied(optimizer)
    assert again._find("a").param.equal(first)
    for one in (optimizer, again):
        train(one, 3, 2)
    assert list(again.plan) == list(optimizer.plan)
    for one, other in zip(values(optimizer), values(again), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("by", ["exchange", "remove, append"])
@pytest.mark.parametrize("plan", ["auto", "factored", "soon"])
@pytest.mark.parametrize("shape", [(9,), (3, 4, 5), ()], ids=str)
def test_another_number_of_dimensions_is_another_parameter(shape: tuple[int, ...], plan: str, by: str) -> None:
    torch.manual_seed(3)
    first = [made((6, 5)), made((7, 5))]
    twins = [nn.Parameter(param.detach().clone()) for param in first]
    new = made(shape)
    extra = [new, nn.Parameter(new.detach().clone())]
    ours, theirs = SlimAdam(list(first), plan=PLANS[plan]), torch.optim.AdamW(twins)
    for optimizer, own in zip((ours, theirs), extra, strict=True):
        train(optimizer, 3, 1)
        held = optimizer.param_groups[0]["params"]
        if by == "exchange":
            optimizer.state.pop(held[1])
            held[1] = own
        else:
            optimizer.state.pop(held.pop())
            held.append(own)
        train(optimizer, 3, 2)
    assert [rule.shape for rule in ours.plan.values()] == [(6, 5), shape]
    if plan == "auto" or len(shape) < 2:
        torch.testing.assert_close(extra[0], extra[1], rtol=1e-6, atol=1e-7)
    again = resumed(ours, plan=PLANS[plan])
    for optimizer in (ours, again):
        train(optimizer, 2, 3)
    for one, other in zip(values(ours), values(again), strict=True):
        assert torch.equal(one, other)


def test_a_plan_by_names_says_what_another_number_of_dimensions_needs() -> None:
    plan = CompressionPlan({"a": Rule((1,), "mean", (4, 6)), "b": Rule((1,), "mean", (4, 6))})
    optimizer = SlimAdam([("a", made()), ("b", made())], plan=plan)
    optimizer.step()
    optimizer.param_groups[0]["params"][1] = made((9,))
    with pytest.raises(PlanError, match=r"shape \(9,\) was put into .*'b': the plan is for shape \(4, 6\)"):
        optimizer.step()


def test_modules_of_what_is_appended_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from slimadam.plans import resolver

    looked: list[int] = []
    owning_modules = resolver.owning_modules
    monkeypatch.setattr(resolver, "owning_modules", lambda params: looked.append(len(params)) or owning_modules(params))
    optimizer = SlimAdam([made()], plan="factored")
    optimizer.param_groups[0]["params"] += [made() for _ in range(50)]
    optimizer.step()
    assert looked == [1, 50]
    assert len(optimizer.plan) == 51
    assert {rule.form for rule in optimizer.plan.values()} == {"factored"}


def test_what_is_no_tensor_is_refused_by_its_place() -> None:
    optimizer = SlimAdam([made()], plan=None)
    optimizer.param_groups[0]["params"].append("weight")
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[1\]='weight' must be a tensor"):
        optimizer.step()


@pytest.mark.parametrize("plan", [None, "factored", "auto"], ids=str)
def test_state_of_others_is_saved_and_loaded_while_a_module_has_no_shape(plan: Any) -> None:
    lazy, used = nn.LazyLinear(4), nn.Linear(3, 2)
    twin = copy.deepcopy(used)
    ours = SlimAdam([used.weight, *lazy.parameters(), used.bias, made((5,))], plan=plan)
    theirs = torch.optim.AdamW([twin.weight, *nn.LazyLinear(4).parameters(), twin.bias, made((5,))])
    for model, optimizer in ((used, ours), (twin, theirs)):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.param_groups[0]["params"][4].grad = torch.ones(5)
        optimizer.step()
    saved, expected = ours.adamw_state_dict(), theirs.state_dict()
    assert list(saved["state"]) == list(expected["state"]) == [0, 3, 4]
    for index, state in expected["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(saved["state"][index][key], value)
    fresh = SlimAdam([used.weight, *nn.LazyLinear(4).parameters(), used.bias, made((5,))], plan=plan)
    fresh.load_state_dict(ours.state_dict())
    theirs.load_state_dict(saved)
    assert str(fresh.state_dict()) == str(ours.state_dict())
    assert torch.equal(fresh.state[used.weight]["exp_avg"], ours.state[used.weight]["exp_avg"])
    damaged = ours.state_dict()
    damaged["state"][1] = damaged["state"][0]
    with pytest.raises(ValueError, match=r"params\.1' has no shape yet \(a lazy module's\), but .* forward pass"):
        fresh.load_state_dict(damaged)
    with pytest.raises(ValueError, match="has 5 parameters, its plan 3; save it once all lazy modules"):
        convert_state_dict(ours.state_dict(), None)


@pytest.mark.parametrize("key", ["exp_avg_sq_col", "exp_avg_sq_row", "exp_avg", "step"])
def test_what_the_state_lacks_is_told(key: str) -> None:
    param = made()
    optimizer = SlimAdam([("w", param)], plan="factored")
    optimizer.step()
    before = param.detach().clone()
    del optimizer.state[param][key]
    with pytest.raises(RuntimeError, match=f"'w': its state .*{key}.*state.pop\\(parameter\\), to start anew"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.state.pop(param)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("plan", [None, "factored", "soon", "auto"], ids=str)
def test_what_users_keep_in_the_state_is_no_state(plan: Any) -> None:
    """Also before the first step, where AdamW takes it for its own."""
    first, second = made((6, 5)), made((7, 5))
    second.grad = None
    optimizer = SlimAdam([("a", first), ("b", second)], plan=PLANS.get(plan, plan))
    for param in (first, second):
        optimizer.state[param]["mine"] = "kept"
    optimizer.load_state_dict(optimizer.state_dict())
    assert [own for own, _ in optimizer.update_direction()] == [first]
    optimizer.reset_state("b", [0])
    optimizer.replace_param("b", made((9, 5)), added=2)
    optimizer.param_groups[0]["params"][1].grad = None
    for _ in range(3):
        optimizer.step()
    saved = optimizer.adamw_state_dict()["state"]
    assert [state["mine"] for state in saved.values()] == ["kept", "kept"]
    assert saved[0]["step"] == 3
    assert "step" not in saved[1]


def test_state_of_what_was_removed_is_told_as_by_adamw() -> None:
    for kind in (torch.optim.AdamW, SlimAdam):
        optimizer = kind([made(), made()])
        optimizer.step()
        gone = optimizer.param_groups[0]["params"].pop()
        with pytest.raises(KeyError):
            optimizer.state_dict()
        optimizer.state.pop(gone)
        assert list(optimizer.state_dict()["state"]) == [0]
