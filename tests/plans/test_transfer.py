"""Plans carried to another depth or width: by role, averaged over depth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import CompressionPlan, PlanError, Rule, SlimAdam, Split
from slimadam.cli import cli
from slimadam.demo.model import ByteGPT
from slimadam.layers.splits import Piece
from slimadam.measurement.history import SNRHistory
from slimadam.state.rule import full_rule
from tests.command_line import CliRunner

SMALL, LARGE = (2, 8), (5, 24)


def _model(layers: int, width: int) -> ByteGPT:
    return ByteGPT(layers, width, 2, 16)


def large_model() -> nn.Module:
    return _model(*LARGE)


def _history(snrs: dict[str, list[dict[object, float]]]) -> SNRHistory:
    """For each ending of a name, the SNR in each layer."""
    history = SNRHistory()
    for name, param in _model(*SMALL).named_parameters():
        for ending, layers in snrs.items():
            if name.endswith(ending):
                layer = int(name.split(".")[1]) if name.startswith("blocks") else 0
                history.record(1, name, param.shape, layers[layer])  # type: ignore[arg-type]
    return history


def _names(plan: CompressionPlan, role: str) -> list[str]:
    return [name for name, rule in plan.items() if rule.role == role]


def test_the_average_over_depth_decides() -> None:
    # One layer alone would stay in full, the other would choose (0,); on average (1,) is the best.
    history = _history({"query.weight": [{(0,): 0.9, (1,): 0.8}, {(0,): 2.0, (1,): 2.3}]})
    plan = CompressionPlan.from_snr(history)
    assert [plan[name].dims for name in _names(plan, "query")] == [(), (1,)]
    carried = plan.for_model(large_model())
    queries = [carried[name] for name in _names(carried, "query")]
    assert len(queries) == LARGE[0]
    assert all(rule.snr == pytest.approx({(0,): 1.45, (1,): 1.55}) and rule.dims == (1,) for rule in queries)
    assert all(rule.shape == (24, 24) for rule in queries)
    assert queries[0].reason == (
        "carried over from 2 matrices (query): averaging over dimension 1 has the highest SNR, 1.55, above the cutoff 1"
    )


def test_below_the_cutoff_and_without_counterpart_stay_full() -> None:
    history = _history({"query.weight": [{(0,): 0.9}, {(0,): 0.7}]})
    carried = CompressionPlan.from_snr(history).for_model(large_model())
    assert {rule.form for rule in carried.values()} == {"full"}
    assert carried["blocks.0.attention.query.weight"].reason == "carried over from 2 matrices (query), all in full"
    assert carried["blocks.0.attention.key.weight"].reason == "the plan has no key"
    assert "two dimensions" in carried["final_norm.weight"].reason


def test_what_was_kept_by_name_stays_full() -> None:
    history = _history({"query.weight": [{(0,): 9.0}, {(0,): 7.0}]})
    carried = CompressionPlan.from_snr(history, keep=["query"]).for_model(large_model())
    assert carried["blocks.4.attention.query.weight"].form == "full"


def test_factored_competes_only_where_the_plan_let_it() -> None:
    history = _history({"query.weight": [{(0,): 2.0, "factored": 9.0}] * 2})
    assert CompressionPlan.from_snr(history).for_model(large_model())["blocks.0.attention.query.weight"].dims == (0,)
    best = CompressionPlan.from_snr(history, forms="best").for_model(large_model())
    assert best["blocks.4.attention.query.weight"].form == "factored"
    history = _history({"query.weight": [{(0,): 2.0, "factored": 1.5}] * 2})
    for forms, form in (("mean", "mean"), ("best", "mean"), ("closest", "float8")):
        carried = CompressionPlan.from_snr(history, forms=forms).for_model(large_model())  # type: ignore[arg-type]
        assert carried["blocks.4.attention.query.weight"].form == form


def test_without_a_cutoff_the_most_common_rule_holds() -> None:
    rules = CompressionPlan.from_rules(_model(*SMALL))
    expected = CompressionPlan.from_rules(large_model())
    carried = rules.for_model(large_model())
    assert {name: rule.dims for name, rule in carried.items()} == {name: rule.dims for name, rule in expected.items()}
    authors = CompressionPlan.from_dict(
        {"h.0.attn.q_proj.weight": [1], "h.1.attn.q_proj.weight": [1], "wte.weight": [1]}
    )
    carried = authors.for_model(large_model())
    assert carried["blocks.3.attention.query.weight"].dims == (1,)
    assert carried["token_embedding.weight"].dims == (1,)


def test_a_factored_plan_carries_over_to_parts() -> None:
    class Small(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(width, 2)

    carried = CompressionPlan.factored(Small(8)).for_model(Small(16))
    assert {name: rule.form for name, rule in carried.items() if rule.part} == {
        f"attn.in_proj_weight[{label}]": "factored" for label in ("query", "key", "value")
    }


class Transposed(nn.Module):
    """A layer stored ``[fan_in, fan_out]``, as in transformers' GPT-2; found by the name of its class."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out))


Transposed.__name__ = "Conv1D"


class MLP(nn.Module):
    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"c_fc": layer(width, 4 * width), "c_proj": layer(4 * width, width)})


@pytest.mark.parametrize(("source", "target"), [(Transposed, nn.Linear), (nn.Linear, Transposed)])
def test_layers_that_are_stored_the_other_way_round(source: Any, target: Any) -> None:
    carried = CompressionPlan.from_rules(MLP(source, 8)).for_model(MLP(target, 16))
    expected = CompressionPlan.from_rules(MLP(target, 16))
    names = [f"mlp.{layer}.weight" for layer in ("c_fc", "c_proj")]
    assert [carried[name].dims for name in names] == [expected[name].dims for name in names]
    history = SNRHistory()
    own, other = ((1,), (0,)) if source is nn.Linear else ((0,), (1,))
    shape = (32, 8) if source is nn.Linear else (8, 32)
    history.record(1, names[0], shape, {own: 5.0, other: 2.0}, "mlp_up", None, 0, own)
    rule = CompressionPlan.from_snr(history).for_model(MLP(target, 16))[names[0]]
    assert rule.dims == ((0,) if target is Transposed else (1,))
    assert rule.snr[rule.dims] == 5.0


def test_layers_of_unknown_role_go_by_their_names() -> None:
    small = nn.ModuleDict({"mix": nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])})
    large = nn.ModuleDict({"mix": nn.ModuleList([nn.Linear(6, 7) for _ in range(3)]), "other": nn.Linear(2, 9)})
    rules = {name: Rule((1,), "mean", tuple(p.shape)) for name, p in small.named_parameters() if p.dim() == 2}
    carried = CompressionPlan(rules).for_model(large)
    assert [carried[f"mix.{layer}.weight"].dims for layer in range(3)] == [(1,)] * 3
    assert carried["other.weight"].reason.startswith("the plan has no other.weight")


def test_a_carried_plan_trains() -> None:
    history = _history({"query.weight": [{(0,): 9.0}, {(0,): 7.0}]})
    model = large_model()
    optimizer = SlimAdam(model, plan=CompressionPlan.from_snr(history).for_model(model))
    model.loss(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    weight = dict(model.named_parameters())["blocks.0.attention.query.weight"]
    assert optimizer.state[weight]["exp_avg_sq"].shape == (1, 24)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(tmp_path: Path, as_json: bool) -> None:
    history = _history({"query.weight": [{(0,): 9.0}, {(0,): 7.0}]})
    plan = CompressionPlan.from_snr(history)
    plan.save(tmp_path / "small.json")
    out = tmp_path / "large.json"
    options = ["--model", "tests.plans.test_transfer:large_model", "--out", str(out), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(cli, ["plan", "transfer", str(tmp_path / "small.json"), *options])
    assert result.exit_code == 0, result.output
    carried = CompressionPlan.load(out)
    assert carried == plan.for_model(large_model())
    if as_json:
        printed = json.loads(result.output)
        assert printed["second_moments_saved"] == carried.second_moments_saved
        assert "blocks.0.attention.key.weight" in printed["no_counterpart"]
    else:
        assert f"{carried.second_moments_saved:.1%} of second moments saved" in result.output
        assert "blocks.0.attention.key.weight: the plan has no key, stays in full" in result.output


def test_a_plan_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    plan = CompressionPlan({"stem.weight": Rule((1, 2, 3), "mean", (8, 3, 3, 3), role="convolution")})
    with pytest.raises(PlanError, match="no kind of layer in common with ByteGPT; calibrate a model of its family"):
        plan.for_model(large_model())
    plan.save(tmp_path / "plan.json")
    options = ["--model", "tests.plans.test_transfer:large_model", "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(cli, ["plan", "transfer", str(tmp_path / "plan.json"), *options])
    assert result.exit_code == 1
    assert "no kind of layer in common" in result.output
    assert not (tmp_path / "out.json").exists()


def test_what_was_kept_or_expanded_stays_so_under_its_name() -> None:
    history = _history({"query.weight": [{(0,): 9.0, (1,): 2.0}, {(0,): 9.0, (1,): 3.0}]})
    plan = CompressionPlan.from_snr(history, keep=["blocks.0.*"])
    kept, other = _names(plan, "query")
    carried = plan.for_model(large_model())
    assert (carried[kept].form, carried[kept].reason) == ("full", "kept in full as asked (keep='blocks.0.*')")
    assert carried[kept].shape == (24, 24)
    assert carried[other].dims == (0,)
    assert carried[other].reason == (
        "carried over from 2 matrices (query) (1 of 2 were kept in full as asked): averaging over dimension 0 has the "
        "highest SNR, 9, above the cutoff 1"
    )
    model = _model(*SMALL)
    optimizer = SlimAdam(model, plan="factored")
    optimizer.expand(kept)
    assert optimizer.plan.for_model(large_model())[kept].reason == optimizer.plan[kept].reason


def test_labels_that_are_no_roles_are_not_mixed() -> None:
    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.x = nn.Linear(width, 2 * width, bias=False)
            self.y = nn.Linear(width, 2 * width, bias=False)

    def parts(width: int) -> dict[str, Split]:
        return {"*.weight": Split({"a": width, "key": width})}

    def rule(piece: Piece) -> Rule:
        return replace(full_rule(piece, ""), form="mean", dims=(next(dims),))

    dims = iter((0, 0, 1, 0))
    carried = CompressionPlan.by_piece(Two(4), rule, parts(4)).for_model(Two(8), parts(8))
    assert {key: rule.dims for key, rule in carried.items()} == {
        "x.weight[a]": (0,), "x.weight[key]": (0,), "y.weight[a]": (1,), "y.weight[key]": (0,)
    }  # fmt: skip
    assert "from 1 matrix (x.weight[a])" in carried["x.weight[a]"].reason
    assert "from 2 matrices (key)" in carried["y.weight[key]"].reason


def test_a_history_from_a_file_carries_over_to_the_other_layout(tmp_path: Path) -> None:
    history = SNRHistory()
    history.record(1, "block.fc.weight", (4, 8), {(0,): 9.0, (1,): 1.5}, "mlp_up", None, 0, (0,))
    history.save_csv(tmp_path / "snr.csv")
    loaded = SNRHistory.load_csv(tmp_path / "snr.csv")
    assert loaded["block.fc.weight"] == history["block.fc.weight"]
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"c_fc": nn.Linear(4, 8), "c_proj": nn.Linear(8, 4)})})
    assert CompressionPlan.from_snr(loaded).for_model(model)["mlp.c_fc.weight"].dims == (1,)
