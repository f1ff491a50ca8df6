"""Checkpoints: our own, AdamW's, and what must not be loaded."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, Split, convert_state_dict
from slimadam.layers.splits import Part
from tests.reference import second_moments

PLANS: dict[str, Any] = {
    "none": None,
    "mean": CompressionPlan({"0.weight": Rule((1,), "mean"), "1.weight": Rule((0,), "mean")}),
    "factored": "factored",
}
PARTS = CompressionPlan(
    {
        "0.weight[query]": Rule((1,), "mean", (3, 5), part=Part("query", (7, 5), (7, 5), 0, 0, 3)),
        "0.weight[value]": Rule(form="factored", shape=(4, 5), part=Part("value", (7, 5), (7, 5), 0, 3, 4)),
        "0.bias": Rule(),
        "1.weight": Rule((0,), "mean"),
        "1.bias": Rule(),
    }
)
AUTO = {
    "measuring": AutoPlan(calibration_steps=10),
    "decided": AutoPlan(calibration_steps=2, cutoff=0.0),
}


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()


def _saved(optimizer: torch.optim.Optimizer) -> Any:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _tensors(state: Any) -> list[Tensor]:
    assert all(isinstance(value, Tensor) for value in state.values())
    return list(state.values())


def _product(state: Any) -> Tensor:
    """The second moment that one tensor holds, or the two of a factored one."""
    first, *second = second_moments(state)
    return first * second[0] / first.mean() if second else first


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("stopped_at", [0, 1, 4])
def test_resumed_training_is_bitwise_the_same(plan: str, dtype: torch.dtype, amsgrad: bool, stopped_at: int) -> None:
    if plan == "factored" and amsgrad:
        amsgrad = False
    options = {"lr": 1e-2, "amsgrad": amsgrad, "plan": PLANS[plan], "bf16_stochastic_round": dtype == torch.bfloat16}
    model = _model(dtype)
    optimizer = SlimAdam(model, **options)
    _train(model, optimizer, range(stopped_at))
    weights, saved = copy.deepcopy(model.state_dict()), _saved(optimizer)
    _train(model, optimizer, range(stopped_at, 8))

    resumed = _model(dtype)
    resumed.load_state_dict(weights)
    resumed_optimizer = SlimAdam(resumed, **options)
    resumed_optimizer.load_state_dict(saved)
    _train(resumed, resumed_optimizer, range(stopped_at, 8))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert list(optimizer.state[a]) == list(resumed_optimizer.state[b])
        for x, y in zip(_tensors(optimizer.state[a]), _tensors(resumed_optimizer.state[b]), strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype


def test_state_dict_carries_plan_and_version_and_copies() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["slimadam"]["format_version"] == 3
    assert CompressionPlan.from_dict(saved["slimadam"]["plan"]) == optimizer.plan
    other = SlimAdam(_model(), plan=CompressionPlan.from_dict(saved["slimadam"]["plan"]))
    other.load_state_dict(saved)
    theirs = {tensor.data_ptr() for state in saved["state"].values() for tensor in _tensors(state)}
    assert all(tensor.data_ptr() not in theirs for state in other.state.values() for tensor in _tensors(state))


@pytest.mark.parametrize("torch_class", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
def test_loads_adamw_and_averages_by_the_plan(torch_class: Any, dtype: torch.dtype, plan: str) -> None:
    model = _model(dtype)
    adamw = torch_class(model.parameters(), lr=0.02, amsgrad=True)
    _train(model, adamw, range(3))
    if plan == "factored":
        adamw.param_groups[0]["amsgrad"] = False
    optimizer = SlimAdam(model, plan=PLANS[plan])
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["variance_init"] == "zeros"
    for (name, parameter), full in zip(model.named_parameters(), adamw.state.values(), strict=True):
        state = optimizer.state[parameter]
        keys = ("exp_avg_sq",) if plan == "factored" else ("exp_avg_sq", "max_exp_avg_sq")
        for key in keys:
            for part, dims in zip(
                second_moments(state, key), optimizer.plan[name].averaged_dims(parameter.dim()), strict=True
            ):
                whole = full[key].float()
                assert part.dtype == torch.float32
                torch.testing.assert_close(part, whole.mean(dims, keepdim=True) if dims else whole)
        assert torch.equal(state["exp_avg"], full["exp_avg"])
        assert state["step"] == 3
    _train(model, optimizer, range(3, 4))


@pytest.mark.parametrize("plan", PLANS)
def test_adamw_loads_what_we_give_it(plan: str) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS[plan], lr=0.02, momentum_dtype=torch.bfloat16)
    _train(model, optimizer, range(3))
    given = optimizer.adamw_state_dict()
    adamw = torch.optim.AdamW(model.parameters())
    adamw.load_state_dict(given)
    assert set(adamw.param_groups[0]) - {"param_names"} == set(torch.optim.AdamW([torch.ones(1)]).param_groups[0])
    assert adamw.param_groups[0]["lr"] == 0.02
    for parameter in model.parameters():
        stored = _product(optimizer.state[parameter])
        assert adamw.state[parameter]["exp_avg_sq"].shape == parameter.shape
        torch.testing.assert_close(adamw.state[parameter]["exp_avg_sq"], stored.expand(parameter.shape))
        assert adamw.state[parameter]["exp_avg"].dtype == parameter.dtype
    _train(model, adamw, range(3, 4))


def _complain(change: Any, message: str, error: type[Exception] = ValueError, plan: str = "mean") -> Any:
    return pytest.param(change, message, error, plan, id=message[:30])


def _first(saved: Any) -> Any:
    return saved["state"][0]


WRONG_STATES = [
    _complain(lambda s: s["slimadam"].update(format_version=4), "format version 4; this release reads 1 to 3"),
    _complain(lambda s: s["param_groups"].pop(), "different number of parameter groups: 0, the optimizer has 1"),
    _complain(lambda s: s["param_groups"][0]["params"].pop(), "group 0 has 3 parameters, the optimizer's 4"),
    _complain(lambda s: s["param_groups"][0].update(lr=-1.0), "Invalid learning rate: -1.0"),
    _complain(lambda s: _first(s).pop("exp_avg"), r"'0.weight': the state dict lacks \['exp_avg'\]"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(2)), r"exp_avg has shape \(2,\), the parameter \(7, 5\)"),
    _complain(
        lambda s: _first(s).update(exp_avg_sq=torch.ones(1, 5)),
        r"'0.weight': the state dict holds a second moment of shape \(1, 5\).*build the optimizer with the plan",
        PlanError,
    ),
    _complain(
        lambda s: _first(s).update(exp_avg_sq=[torch.ones(7, 1), torch.ones(1, 5)]),
        r"of shape \(7, 1\) and \(1, 5\)",
        PlanError,
    ),
    _complain(lambda s: _first(s).update(step=torch.ones(2)), r"'0.weight': the state dict's step is tensor"),
    _complain(lambda s: _first(s).update(step=-1), r"step is -1; it must be one number >= 0"),
    _complain(lambda s: _first(s).update(exp_avg=[1.0]), r"exp_avg holds float, not a dense tensor"),
    _complain(lambda s: _first(s).update(exp_avg_sq=None), r"exp_avg_sq holds NoneType, not a dense tensor"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(7, 5).to_sparse()), r"exp_avg holds Tensor, not a dense"),
    _complain(lambda s: _first(s).update(exp_avg=torch.ones(7, 5) * 1j), r"exp_avg is torch.complex64, the parameter"),
    _complain(lambda s: s.update(slimadam=None), r"'slimadam' is None; pass what SlimAdam.state_dict"),
    _complain(lambda s: s.update(state=[]), r"'state' is list; pass an optimizer's"),
    _complain(lambda s: s.pop("param_groups"), r"'param_groups' is NoneType"),
    _complain(lambda s: s["state"].update({0: 1}), r"state of parameter 0 is int, not a dict"),
    _complain(lambda s: s["param_groups"][0].update(amsgrad=True), "has no max_exp_avg_sq; set amsgrad=False"),
    _complain(
        lambda s: _first(s).update(_factored(_first(s).pop("exp_avg_sq"))),
        r"second moment of shape \(7, 1\) and \(1, 5\)",
        PlanError,
    ),
    _complain(lambda s: _first(s).pop("exp_avg_sq_col"), r"second moment of shape \(7, 1\)", PlanError, "factored"),
    _complain(
        lambda s: _first(s).update(exp_avg_sq={"0": torch.ones(7, 1), "2": torch.ones(1, 5)}),
        r"exp_avg_sq has the keys \['0', '2'\], not '0', '1', \.\.\.",
    ),
    _complain(lambda s: _first(s).update(exp_avg_sq={}), r"lacks \['exp_avg_sq'\]; it is not of Adam"),
    _complain(lambda s: _first(s).update(exp_avg=[torch.ones(7, 5)]), "exp_avg holds list, not a dense tensor"),
    _complain(
        lambda s: _first(s).update(exp_avg_sq_col=[torch.ones(1, 5)]),
        "exp_avg_sq_col holds list, not a dense tensor",
        plan="factored",
    ),
    _complain(lambda s: _first(s).update(exp_avg_sq_col=[]), "exp_avg_sq_col holds list, not", plan="factored"),
    _complain(
        lambda s: [_first(s).pop("exp_avg_sq_row"), _first(s).pop("exp_avg_sq_col")],
        r"lacks \['exp_avg_sq'\]",
        plan="factored",
    ),
    _complain(lambda s: _first(s).update(exp_avg_sq_col=None), "exp_avg_sq_col holds NoneType", plan="factored"),
    _complain(
        lambda s: _first(s).update(exp_avg_sq_row=torch.ones(7, 1) * 1j),
        "exp_avg_sq_row is torch.complex64, the parameter",
        plan="factored",
    ),
    _complain(
        lambda s: _first(s).update({"exp_avg_sq[query]": [torch.ones(3, 1), None]}),
        r"exp_avg_sq\[query\] holds NoneType",
        plan="parts",
    ),
    _complain(
        lambda s: _first(s).update({"exp_avg_sq_row[value]": torch.ones(3, 1)}),
        r"second moment of shape \(3, 1\) and \(3, 1\) and \(1, 5\)",
        PlanError,
        "parts",
    ),
    _complain(lambda s: s["param_groups"][0].pop("params"), r"param_groups\[0\]=.* is no dict with a list of 'params'"),
    _complain(lambda s: s.update(param_groups=["all"]), r"param_groups\[0\]='all' is no dict"),
    _complain(lambda s: s["slimadam"].update(format_version=torch.ones(2)), "format version tensor.*reads 1 to 3"),
    _complain(
        lambda s: s["slimadam"]["plan"].update(version=torch.ones(2)), r"version=tensor.* reads version 1", PlanError
    ),
    _complain(lambda s: s["slimadam"]["monitor"].update(steps=10**400), "steps"),
    _complain(lambda s: _first(s).update(step=10**400), "'0.weight': the state dict's step is 1000"),
    _complain(
        lambda s: _first(s).update(exp_avg_codes=torch.ones(7, 5)),
        "'0.weight': the state dict's exp_avg_codes holds float32 codes, but it has no exp_avg_scale",
    ),
    _complain(lambda s: s["slimadam"].update(format_version=3.0), "format version 3.0; this release reads 1 to 3"),
    _complain(lambda s: s["param_groups"][0].update(amsgrad=torch.ones(2)), "amsgrad=tensor.* must be True", TypeError),
    _complain(
        lambda s: s["param_groups"][0].update(lr=10**400), "lr=1000.* must be a number or a 1-element", TypeError
    ),
    _complain(lambda s: s["param_groups"][0].update(eps=10**400), "Invalid epsilon value: 1000"),
    _complain(
        lambda s: _first(s).update(exp_avg=torch.ones(7, 5, device="meta")),
        r"'0.weight': the state dict's exp_avg has no values \(device='meta'\)",
    ),
    _complain(
        lambda s: _first(s).update(exp_avg_scale=torch.ones(1, dtype=torch.uint8)),
        "'0.weight': the state dict has an exp_avg_scale, but its exp_avg is torch.float32",
    ),
    _complain(
        lambda s: _first(s).update(exp_avg_scale=_first(s).pop("exp_avg")),
        r"'0.weight': the state dict lacks \['exp_avg'\]",
    ),
]


def _factored(full: Tensor) -> dict[str, Tensor]:
    return {"exp_avg_sq_row": full.expand(7, 5).mean(1, keepdim=True), "exp_avg_sq_col": full.new_ones(1, 5)}


@pytest.mark.parametrize(("change", "message", "error", "plan"), WRONG_STATES)
def test_wrong_state_is_refused_and_nothing_is_changed(
    change: Any, message: str, error: type[Exception], plan: str
) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan={**PLANS, "parts": PARTS}[plan])
    _train(model, optimizer, range(2))
    before, wrong = _saved(optimizer), _saved(optimizer)
    change(wrong)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(wrong)
    assert str(optimizer.state_dict()) == str(before)


def test_load_hooks_fire_and_may_replace_the_state() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(2))
    saved, seen = optimizer.state_dict(), []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(saved)
    assert not optimizer.state
    assert seen == ["post"]


@pytest.mark.parametrize("new", PLANS)
@pytest.mark.parametrize("old", PLANS)
def test_a_state_dict_converts_to_another_plan(old: str, new: str) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS[old])
    _train(model, optimizer, range(3))
    target = SlimAdam(model, plan=PLANS[new])
    converted = convert_state_dict(optimizer.state_dict(), target.plan)
    target.load_state_dict(converted)
    for name, parameter in model.named_parameters():
        stored = _product(optimizer.state[parameter])
        kept = second_moments(target.state[parameter])
        for part, dims in zip(kept, target.plan[name].averaged_dims(parameter.dim()), strict=True):
            whole = stored.expand(parameter.shape)
            torch.testing.assert_close(part, whole.mean(dims, keepdim=True) if dims else whole)
    _train(model, target, range(3, 5))


def test_conversion_refuses_what_it_cannot_do() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=PLANS["mean"])
    _train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="carries no plan"):
        convert_state_dict(torch.optim.AdamW(model.parameters()).state_dict(), None)
    with pytest.raises(PlanError, match=r"'0.weight': dims=\(5,\) is out of range"):
        convert_state_dict(optimizer.state_dict(), CompressionPlan({"0.weight": Rule((5,), "mean")}))
    full = convert_state_dict(optimizer.state_dict(), None)
    assert full["state"][0]["exp_avg_sq"].shape == (7, 5)
    assert CompressionPlan.from_dict(full["slimadam"]["plan"]).second_moments_saved == 0


FIXTURES = {
    version: Path(__file__).parents[2] / "fixtures" / f"state_dict_{name}.pt"
    for version, name in {1: "0_1_0", 2: "format_2", 3: "format_3"}.items()
}
CASES: dict[str, dict[str, Any]] = {
    f"{label}{', int8' if momentum_dtype else ''}": {
        "plan": plan,
        "momentum_dtype": momentum_dtype,
        "amsgrad": label == "mean" and momentum_dtype is None,
    }
    for label, plan in {**PLANS, "parts": PARTS}.items()
    for momentum_dtype in (None, "int8")
} | {label: {"plan": settings} for label, settings in AUTO.items()}
"""What tests/fixtures/write.py writes in the present format; the first had those of ``PLANS`` alone."""


@pytest.mark.parametrize("version", FIXTURES)
def test_state_saved_by_every_release_still_loads(version: int) -> None:
    """Written by tests/fixtures/write.py; later releases must load it and train on to the same weights."""
    saved = torch.load(FIXTURES[version], weights_only=True)
    assert list(saved) == list(PLANS if version == 1 else CASES)
    for label, case in saved.items():
        own = case["optimizer"]["slimadam"]
        assert own["format_version"] == version
        model = _model()
        model.load_state_dict(case["weights"])
        plan = AUTO.get(label) or CompressionPlan.from_dict(own["plan"])
        optimizer = SlimAdam(model, plan=plan, momentum_dtype="int8" if label.endswith("int8") else None)
        optimizer.load_state_dict(case["optimizer"])
        assert optimizer.plan == CompressionPlan.from_dict(own["plan"]), label
        for index, parameter in enumerate(model.parameters()):
            kept = _in_order(case["optimizer"]["state"][index])
            loaded = _in_order(optimizer.state[parameter])
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(kept, loaded, strict=True)), label
        _train(model, optimizer, range(3, 6))
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, case["weights_3_steps_later"][name], rtol=1e-5, atol=1e-6, msg=label)


def _in_order(state: Any) -> list[Tensor]:
    """The tensors of a state of any format."""
    first = [state[key] for key in ("step", "exp_avg", "exp_avg_codes", "exp_avg_scale") if key in state]
    second = [value for kind in ("exp_avg_sq", "max_exp_avg_sq") for value in second_moments(state, kind)]
    values = [list(value.values()) if isinstance(value, dict) else value for value in second]
    return first + [one for value in values for one in (value if isinstance(value, list) else [value])]


FUSED = {"0.weight": Split({"query": 3, "value": 4})}
FORMS: dict[str, tuple[Any, list[str]]] = {
    "full": (None, [""]),
    "mean": (PLANS["mean"], [""]),
    "factored": ("factored", ["_row", "_col"]),
    "parts": (PARTS, ["[query]", "_row[value]", "_col[value]"]),
    "parts, averaged": (
        CompressionPlan({key: replace(rule, form="mean", dims=(0,)) for key, rule in PARTS.items() if "weight" in key}),
        ["[query]", "[value]"],
    ),
    "measuring": (AutoPlan(calibration_steps=10), [""]),
    "measuring, parts": (AutoPlan(calibration_steps=10, parts=FUSED), [""]),
    "decided": (AutoPlan(calibration_steps=2, cutoff=0.0), ["_row", "_col"]),
    "decided, averages": (AutoPlan(calibration_steps=2, cutoff=0.0, forms="mean"), [""]),
    "decided, parts": (
        AutoPlan(calibration_steps=2, cutoff=0.0, parts=FUSED),
        ["_row[query]", "_col[query]", "_row[value]", "_col[value]"],
    ),
}
"""Plans, and what follows exp_avg_sq in the keys of the first weight's state after three steps."""
has_every_form = pytest.mark.parametrize(
    ("form", "amsgrad"),
    [(form, amsgrad) for form in FORMS for amsgrad in (False, True) if not (amsgrad and form in ("factored", "parts"))],
)
has_every_momentum = pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "int8"], ids=str)


def _step(model: nn.Module, optimizer: SlimAdam, steps: int = 3) -> None:
    """Gradients whose squares are products of a row's factor and a column's: factored moments hold them best."""
    for _ in range(steps):
        for parameter in model.parameters():
            scale = torch.ones(())
            for size in parameter.shape:
                scale = scale[..., None] * torch.logspace(-1, 1, size)
            parameter.grad = torch.randn(parameter.shape).sign() * scale
        optimizer.step()


def _keys(optimizer: SlimAdam, saved: Any = None) -> list[set[str]]:
    """The keys of each parameter's state; those of its state dict are the same, and all that they hold is tensors."""
    live = [optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"]]
    saved = optimizer.state_dict() if saved is None else saved
    kept = [saved["state"][index] for index in range(len(live))]
    assert all(type(value) is Tensor for state in (*live, *kept) for value in state.values())
    assert [set(state) for state in live] == [set(state) for state in kept]
    return [set(state) for state in kept]


@has_every_form
@has_every_momentum
@pytest.mark.parametrize("variance_init", ["zeros", "gradient"])
def test_the_state_holds_tensors_alone_under_the_keys_that_are_saved(
    form: str, amsgrad: bool, momentum_dtype: Any, variance_init: Any
) -> None:
    model = _model()
    plan, kept = FORMS[form]
    options = {"momentum_dtype": momentum_dtype, "amsgrad": amsgrad, "variance_init": variance_init}
    if amsgrad:  # then averages are chosen
        kept = sorted({part.replace("_row", "").replace("_col", "") for part in kept})
    kinds = ("exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg_sq",)
    others = {"step", *(("exp_avg_codes", "exp_avg_scale") if momentum_dtype == "int8" else ("exp_avg",))}
    full = others | set(kinds)

    def weight(parts: list[str]) -> set[str]:
        return others | {kind + part for kind in kinds for part in parts}

    optimizer = SlimAdam(model, plan=plan, **options)
    _step(model, optimizer)
    keys = _keys(optimizer)
    assert keys[0] == weight(kept)
    assert keys[1] == keys[3] == full

    saved = copy.deepcopy(optimizer.state_dict())
    loaded = SlimAdam(model, plan=plan, **options)
    loaded.load_state_dict(saved)
    assert _keys(loaded) == _keys(loaded, saved) == keys
    _step(model, loaded, 1)
    assert _keys(loaded) == keys

    spread = convert_state_dict(saved, None)
    unsaving = SlimAdam(model, plan=None, **options)
    unsaving.load_state_dict(spread)
    assert _keys(unsaving) == _keys(unsaving, spread) == [full] * 4
    again = convert_state_dict(spread, optimizer.plan)
    saving = SlimAdam(model, plan=optimizer.plan, **options)
    saving.load_state_dict(again)
    assert _keys(saving) == _keys(saving, again) == keys

    if "measuring" in saved["slimadam"]:
        return
    for name in optimizer.plan:
        optimizer.expand(name)
        _keys(optimizer)
    expanded = _keys(optimizer)
    assert expanded == [weight(["[query]", "[value]"] if "parts" in form else [""]), full, full, full]
    _step(model, optimizer, 1)
    assert _keys(optimizer) == expanded
    loaded.load_state_dict(optimizer.state_dict())
    assert _keys(loaded) == expanded


@has_every_form
@has_every_momentum
def test_adamw_state_dict_shares_no_tensor_with_the_optimizer(form: str, amsgrad: bool, momentum_dtype: Any) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=FORMS[form][0], momentum_dtype=momentum_dtype, amsgrad=amsgrad)
    _step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    given = optimizer.adamw_state_dict()
    tensors = [tensor for state in given["state"].values() for tensor in _tensors(state)]
    assert {frozenset(state) for state in given["state"].values()} == {
        frozenset(["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])])
    }
    held = [tensor for state in optimizer.state.values() for tensor in _tensors(state)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*held, *model.parameters())}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for tensor in tensors:
        tensor.fill_(7)
    for index, state in before["state"].items():
        for key, value in optimizer.state_dict()["state"][index].items():
            assert torch.equal(value, state[key])


def test_killed_at_20_random_steps_training_ends_bitwise_the_same() -> None:
    script = Path(__file__).parents[2] / "scripts" / "killed_and_resumed.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "20 kills, bitwise equal" in done.stdout


def test_converting_to_what_is_stored_alike_changes_no_tensor() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan="factored")
    _train(model, optimizer, range(5))
    saved = optimizer.state_dict()
    alike = CompressionPlan({key: Rule(rule.dims, rule.form, rule.shape) for key, rule in optimizer.plan.items()})
    converted = convert_state_dict(saved, alike)["state"]
    for index, state in saved["state"].items():
        for before, after in zip(_tensors(state), _tensors(converted[index]), strict=True):
            assert torch.equal(before, after)


def test_pickles_of_earlier_releases_go_on() -> None:
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = SlimAdam([param], plan="factored", momentum_dtype="int8")
    param.grad = torch.rand(4, 3)
    optimizer.step()
    state = optimizer.state[param]
    before = {key: value.clone() for key, value in state.items()}
    state["exp_avg_sq"] = [state.pop("exp_avg_sq_row"), state.pop("exp_avg_sq_col")]
    state["exp_avg"] = state.pop("exp_avg_codes")
    copied, resumed = pickle.loads(pickle.dumps((param, optimizer)))
    assert resumed.state[copied].keys() == before.keys()
    assert all(torch.equal(resumed.state[copied][key], value) for key, value in before.items())
    copied.grad = torch.rand(4, 3)
    resumed.step()
    assert resumed.state[copied]["step"] == 2


@pytest.mark.parametrize("option", ["maximize", "amsgrad", "fused", "foreach", "capturable", "bf16_stochastic_round"])
@pytest.mark.parametrize("value", [0, 1])
def test_flags_that_were_saved_as_numbers_are_flags(option: str, value: int) -> None:
    ours, theirs = _model(), _model()
    theirs.load_state_dict(ours.state_dict())
    options: dict[str, Any] = {} if option == "bf16_stochastic_round" else {option: bool(value)}
    as_number, as_flag = SlimAdam(ours, plan=None, **{option: value}), SlimAdam(theirs, plan=None, **options)
    saved = _saved(as_number)
    assert saved["param_groups"][0][option] is bool(value)
    saved["param_groups"][0][option] = value
    as_number.load_state_dict(saved)
    assert as_number.param_groups[0][option] is bool(value)
    _train(ours, as_number, range(3))
    _train(theirs, as_flag, range(3))
    as_number.param_groups[0][option] = value  # as may be assigned between steps
    _train(ours, as_number, range(3, 5))
    _train(theirs, as_flag, range(3, 5))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("plan", [None, "factored", "auto"], ids=str)
@pytest.mark.parametrize("variance_init", ["zeros", "gradient"])
def test_a_state_that_was_reset_is_saved_as_it_is(variance_init: str, plan: Any, momentum_dtype: Any) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=plan, momentum_dtype=momentum_dtype, variance_init=variance_init)
    _train(model, optimizer, range(2))
    optimizer.reset_state("0.weight")
    optimizer.state[model[0].weight]["mine"] = torch.ones(3)
    before = _saved(optimizer)
    optimizer.load_state_dict(before)
    after = _saved(optimizer)
    for index, state in before["state"].items():
        assert {key: str(value) for key, value in after["state"][index].items()} == {
            key: str(value) for key, value in state.items()
        }
    assert torch.equal(optimizer.state[model[0].weight]["mine"], torch.ones(3))
    _train(model, optimizer, range(2, 4))
    assert optimizer.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_state_of_other_optimizers_is_refused(other: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    options = {"lr": 0.1, "momentum": 0.9} if other is torch.optim.SGD else {"lr": 0.1}
    theirs, ours = other([parameter], **options), SlimAdam([parameter], plan="factored")
    parameter.grad = torch.ones_like(parameter)
    theirs.step()
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"not of Adam, AdamW or SlimAdam"):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert ours.param_groups[0]["lr"] == before["param_groups"][0]["lr"]
