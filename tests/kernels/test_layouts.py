"""What a plan is told about a parameter: its layout, all of its names, and the patterns that pick it."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, SNRRecorder, Split
from slimadam.layers.splits import pieces_of
from slimadam.plans import resolver
from slimadam.state.rule import Source


class Conv1D(nn.Module):
    """A linear layer that stores its weight the other way round, as GPT-2 does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.c_attn = layer


HALVES = {
    "transposed": (Conv1D(6, 8), Split({"key": 4, "value": 4}, dim=1), (0,)),
    "linear": (nn.Linear(6, 8, bias=False), Split({"key": 4, "value": 4}), (1,)),
    "convolution": (nn.Conv2d(3, 8, 3, bias=False), Split({"key": 4, "value": 4}), (1, 2, 3)),
    "heads": (nn.Linear(6, 8, bias=False), Split({"heads": 2}, view=(2, 4, 6), batch_dims=1), (2,)),
}


@pytest.mark.parametrize("case", HALVES)
@pytest.mark.parametrize("how", ["model", "names", "other names", "alive"])
def test_declared_parts_have_the_layout_of_their_module(case: str, how: str) -> None:
    layer, parts, fan_in = HALVES[case]
    model = Holder(copy.deepcopy(layer))
    name = "mine.weight" if how == "other names" else "c_attn.weight"
    settings = AutoPlan(parts={name: parts})
    params: Any = {
        "model": model,
        "names": list(model.named_parameters()),
        "other names": [("mine.weight", model.c_attn.weight)],
        "alive": model.parameters(),
    }[how]
    optimizer = SlimAdam(params, plan=settings)
    (measured,) = optimizer._registry.measured.values()
    expected = pieces_of(model, {"c_attn.weight": parts})["c_attn.weight"]
    assert [rule.fan_in for rule in measured] == [piece.role.fan_in for piece in expected] == [fan_in] * len(measured)
    assert [rule.role for rule in measured] == list(parts.sizes)


def test_without_a_module_the_layout_is_guessed() -> None:
    optimizer = SlimAdam(
        [("w", torch.ones(8, 6, requires_grad=True))], plan=AutoPlan(parts={"w": Split({"a": 4, "b": 4})})
    )
    assert [rule.fan_in for rule in optimizer._registry.measured["w"]] == [(1,), (1,)]


def test_the_modules_of_many_groups_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def search(params: Any) -> list[nn.Module]:
        searches.append(params)
        return owning_modules(params)

    owning_modules = resolver.owning_modules
    monkeypatch.setattr(resolver, "owning_modules", search)
    models = [nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), nn.LayerNorm(5)]
    groups = [{"params": [param]} for model in models for param in model.parameters()]
    optimizer = SlimAdam(groups, plan="factored")
    roles = [rule.role for rule in optimizer.plan.values()]
    assert roles == ["token_embedding", "unknown", "bias", "norm", "bias"]
    assert len(searches) == len(models)


@pytest.mark.parametrize("later", [False, True])
def test_modules_that_were_looked_for_are_let_go(later: bool) -> None:
    layer, norm = nn.Linear(4, 3), nn.LayerNorm(5)
    groups: list[dict[str, Any]] = [{"params": [norm.weight]}, {"params": [layer.weight]}]
    optimizer = SlimAdam(groups[:1] if later else groups, plan="factored")
    if later:
        optimizer.add_param_group(groups[1])
    biases = [weakref.ref(layer.bias), weakref.ref(norm.bias)]
    del layer, norm
    assert [bias() for bias in biases] == [None, None]


class Tied(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.wte = nn.Embedding(40, width)
        self.mid = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, 40, bias=False)
        self.lm_head.weight = self.wte.weight


def _decided(model: nn.Module, **settings: Any) -> CompressionPlan:
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=1, cutoff=0.0, **settings))
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    optimizer.step()
    return optimizer.plan


def test_a_tied_weight_goes_by_each_of_its_names() -> None:
    plan = _decided(Tied(), keep=("lm_head.weight",))
    assert (plan["wte.weight"].form, plan["wte.weight"].reason) == (
        "full",
        "kept in full as asked (keep='lm_head.weight')",
    )
    assert plan["mid.weight"].form != "full"
    halves = {"lm_head.*": Split({"a": 20, "b": 20})}
    assert {key for key in _decided(Tied(), parts=halves) if "wte" in key} == {"wte.weight[a]", "wte.weight[b]"}
    assert "wte.weight[a]" in CompressionPlan.by_piece(
        Tied(), lambda piece: Rule(shape=piece.shape, part=piece.part), halves
    )
    model = Tied()
    recorder = SNRRecorder(torch.optim.AdamW(model.parameters()), model)
    for param in model.parameters():
        param.grad = torch.randn(param.shape)
    recorder._optimizer.step()
    kept = CompressionPlan.from_snr(recorder.history, cutoff=0.0, keep=["lm_head.*"])
    assert [key for key, rule in kept.items() if rule.reason.startswith("kept")] == ["wte.weight"]


@pytest.mark.parametrize("kept", [False, True])
def test_a_rule_for_either_name_of_a_tied_weight_carries_over(kept: bool) -> None:
    given = Rule(shape=(40, 16), source=Source.USER) if kept else Rule((1,), "mean", (40, 16))
    plan = CompressionPlan({"lm_head.weight": given, "mid.weight": Rule((1,), "mean", (16, 16))})
    carried = plan.for_model(Tied(32))
    assert (carried["wte.weight"].form, carried["wte.weight"].dims) == (given.form, given.dims)
    assert carried["wte.weight"].shape == (40, 32)
    assert not carried["wte.weight"].reason.startswith("the plan has no")


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.memory = nn.Parameter(torch.randn(16, 16))
        self.x = nn.Linear(16, 16)


KEY, QKV = "attn.in_proj_weight[key]", [f"attn.in_proj_weight[{label}]" for label in ("query", "key", "value")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*[key]", [KEY]),
        ("*.in_proj_weight[key]", [KEY]),
        (KEY, [KEY]),
        ("module." + KEY, [KEY]),
        ("attn.in_proj_weight[[]key]", []),
        ("attn.in_proj_weight[*]", QKV),
        ("attn.in_proj_weight", QKV),
        ("attn.in_proj_w*", QKV),
        ("key", [KEY]),
        ("[mx]*.weight", ["x.weight"]),
        ("_orig_mod.x.weight", ["x.weight"]),
        ("*memor[xy]", []),
    ],
)
def test_brackets_at_the_end_of_a_pattern_are_those_of_a_part(pattern: str, expected: list[str]) -> None:
    plan = _decided(Attending(), keep=(pattern,))
    assert [key for key, rule in plan.items() if rule.reason.startswith("kept")] == expected


def test_the_same_parts_argument_is_wrong_everywhere() -> None:
    model = Attending()
    plan = CompressionPlan.factored(model)
    for wrong in ([1], "abc", {"a": 1}, {"a": {"q": 1}}, 5, {3: Split({"a": 1})}):
        for use in (
            lambda: AutoPlan(parts=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: plan.for_model(model, parts=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: CompressionPlan.by_piece(model, lambda _: Rule(), parts=wrong),  # type: ignore[arg-type]  # noqa: B023
            lambda: SNRRecorder(torch.optim.AdamW(model.parameters()), model, parts=wrong),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(
                ValueError, match=r"parts=.* must give a slimadam.Split for each pattern of names, such"
            ):
                use()


def test_parts_that_match_no_name_of_a_tied_weight_are_refused() -> None:
    with pytest.raises(PlanError, match=r"the pattern 'head.\*' matches no parameter"):
        CompressionPlan.factored(Tied()).for_model(Tied(), parts={"head.*": Split({"a": 20, "b": 20})})
