from __future__ import annotations

import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimadam import CompressionPlan, PlanError, Rule, SNRHistory
from slimadam.plans.plan import SCHEMA_PATH
from slimadam.plans.selection import least_loss

SCHEMA = json.loads(SCHEMA_PATH.read_text())


def _history(snr: dict[Any, float], shape: tuple[int, ...] = (8, 6), name: str = "h.0.q_proj.weight") -> SNRHistory:
    history = SNRHistory()
    history.record(1, name, shape, snr)
    return history


@pytest.mark.parametrize(
    ("snr", "cutoff", "dims"),
    [
        ({(0,): 0.4, (1,): 4.2, (0, 1): 0.2}, 1.0, (1,)),
        ({(0,): 3.4, (1,): 1.2, (0, 1): 0.2}, 1.0, (0,)),
        ({(0,): 1.0, (1,): 0.9, (0, 1): 0.2}, 1.0, ()),  # strictly above
        ({(0,): 0.4, (1,): 0.5, (0, 1): 0.3}, 0.45, (1,)),
        ({(0,): 2.0, (1,): 2.0, (0, 1): 2.0}, 1.0, (0, 1)),  # among equals the one that saves most
        ({(0,): math.inf, (1,): math.inf, (0, 1): 0.2}, 1.0, (0,)),
        ({(0,): 0.5, (1,): 0.5, "factored": 9.0}, 1.0, ()),  # the paper's candidates only
        ({}, 1.0, ()),
    ],
)
def test_highest_snr_strictly_above_the_cutoff(snr: dict[Any, float], cutoff: float, dims: tuple[int, ...]) -> None:
    rule = CompressionPlan.from_snr(_history(snr), cutoff)["h.0.q_proj.weight"]
    assert rule.dims == dims
    assert rule.form == ("mean" if dims else "full")
    assert rule.snr == snr
    assert rule.role == "query"
    assert rule.reason


def test_best_lets_the_factored_form_compete() -> None:
    snr = {(0,): 2.0, (1,): 3.0, (0, 1): 0.5, "factored": 7.0}
    rule = CompressionPlan.from_snr(_history(snr), forms="best")["h.0.q_proj.weight"]
    assert (rule.form, rule.dims) == ("factored", ())
    assert rule.stored_elements((8, 6)) == 14
    lower = {**snr, "factored": 2.9}
    assert CompressionPlan.from_snr(_history(lower), forms="best")["h.0.q_proj.weight"].dims == (1,)


@pytest.mark.parametrize(
    ("name", "factored", "cutoff", "form"),
    [
        ("h.0.q_proj.weight", 3.1, 1.0, "factored"),
        ("h.0.q_proj.weight", 3.0, 1.0, "float8"),
        ("h.0.q_proj.weight", 3.1, 1.1, "float8"),
        ("h.0.q_proj.weight", 0.2, 0.0, "factored"),
        ("token_embedding.weight", 1.1, 1.0, "factored"),
        ("token_embedding.weight", 1.0, 1.0, "float8"),
    ],
)
def test_elements_take_a_byte_each_where_row_and_column_averages_are_too_coarse(
    name: str, factored: float, cutoff: float, form: str
) -> None:
    snr = {(0,): 0.1, (1,): 0.15, (0, 1): 0.05, "factored": factored}
    rule = CompressionPlan.from_snr(_history(snr, name=name), cutoff, forms="closest")[name]
    assert (rule.form, rule.dims) == (form, ())
    assert f"row and column averages, SNR {factored:.3g}" in rule.reason
    assert rule.stored_elements((8, 6)) == (14 if form == "factored" else 12)


@pytest.mark.parametrize(
    ("snr", "shape", "dims"),
    [
        ({(0,): 1.0, (1,): 50.0, (0, 1): 0.5, "factored": 50.0}, (1, 64), (1,)),  # factoring saves nothing
        ({(0,): 50.0, (1,): 2.0}, (8, 6), (0,)),  # it was not measured
        ({(0,): 3.1, (1,): 2.0, (0, 1): 0.5, "factored": 2.9}, (8, 6), (0,)),
        ({(0,): 3.0, (1,): 2.0, (0, 1): 0.5, "factored": 2.9}, (8, 6), ()),
    ],
)
def test_other_averages_stand_in_where_they_are_fine_enough(
    snr: dict[Any, float], shape: tuple[int, ...], dims: tuple[int, ...]
) -> None:
    rule = CompressionPlan.from_snr(_history(snr, shape), forms="closest")["h.0.q_proj.weight"]
    assert (rule.form, rule.dims) == ("mean" if dims else "float8", dims)


def test_candidates_that_save_nothing_are_not_chosen() -> None:
    rule = CompressionPlan.from_snr(_history({(0,): math.inf, (1,): 2.0, (0, 1): 2.0}, (1, 6)))["h.0.q_proj.weight"]
    assert math.prod(rule.state_shapes((1, 6))[0]) == 1


@pytest.mark.parametrize(
    ("name", "shape", "keep", "reason"),
    [
        ("ln.weight", (8,), (), "fewer than two dimensions"),
        ("h.0.q_proj.weight", (8, 6), ("*q_proj*",), "kept in full as asked"),
        ("h.0.q_proj.weight", (8, 6), ("query",), "kept in full as asked"),
    ],
)
def test_vectors_and_exceptions_stay_full(
    name: str, shape: tuple[int, ...], keep: tuple[str, ...], reason: str
) -> None:
    snr: dict[Any, float] = {(0,): 100.0}
    rule = CompressionPlan.from_snr(_history(snr, shape, name), keep=keep)[name]
    assert rule.form == "full"
    assert reason in rule.reason


def test_saved_share_counts_elements() -> None:
    plan = CompressionPlan(
        {
            "a": Rule((1,), "mean", (10, 20)),
            "b": Rule(shape=(100,)),
            "c": Rule(form="factored", shape=(10, 20)),
            "d": Rule((0,), "mean"),
        }
    )
    assert plan.second_moments == (10 + 100 + 30, 500)
    assert plan.second_moments_saved == pytest.approx(1 - 140 / 500)
    assert CompressionPlan({}).second_moments_saved == 0.0


@pytest.mark.parametrize("forms", ["mean", "best"])
def test_save_and_load(tmp_path: Path, forms: Any) -> None:
    history = _history({(0,): 0.1 + 0.2, (1,): math.inf, (0, 1): 1e-300, "factored": 7.0})
    history.record(1, "bias", (6,), {(0,): math.nan})
    plan = CompressionPlan.from_snr(history, 0.7, forms=forms)
    plan.save(tmp_path / "plan.json")
    assert CompressionPlan.load(tmp_path / "plan.json") == plan
    assert CompressionPlan.load(str(tmp_path / "plan.json")).cutoff == 0.7
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    jsonschema.validate(json.loads((tmp_path / "plan.json").read_text()), SCHEMA)


def test_reads_the_authors_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text('{"h.0.w": [1], "h.1.w": [0, 1], "h.2.w": 0, "ln": null, "x": []}')
    plan = CompressionPlan.load(path)
    assert {name: rule.dims for name, rule in plan.items()} == {
        "h.0.w": (1,),
        "h.1.w": (0, 1),
        "h.2.w": (0,),
        "ln": (),
        "x": (),
    }


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("ours", PREFIXES)
@pytest.mark.parametrize("theirs", PREFIXES)
def test_names_match_under_wrappers(ours: str, theirs: str) -> None:
    plan = CompressionPlan({f"{ours}h.0.w": Rule((1,), "mean"), "other": Rule()})
    assert plan.match(f"{theirs}h.0.w") == f"{ours}h.0.w"
    assert plan[f"{theirs}h.0.w"].dims == (1,)
    assert plan.match(f"{theirs}h.1.w") is None
    with pytest.raises(KeyError):
        plan[f"{theirs}h.1.w"]


def test_exact_names_win_and_ambiguity_matches_nothing() -> None:
    plan = CompressionPlan({"module.w": Rule((1,), "mean"), "w": Rule((0,), "mean")})
    assert plan["w"].dims == (0,)
    assert plan["module.w"].dims == (1,)
    assert plan.match("_orig_mod.w") is None


WRONG_PLANS = {
    "[]": "a plan is a JSON object",
    "{}": "the plan is empty; calibrate a model to get one",
    "{": "cannot be read as a JSON plan",
    '{"a": [0], "a": [1]}': "'a' appears twice",
    '{"a": [0, 0]}': "names a dimension twice",
    '{"a": [-1]}': "must hold integers in 0..7",
    '{"a": [9]}': "must hold integers in 0..7",
    '{"a": [true]}': "must hold integers",
    '{"a": "1"}': "must be a list",
    '{"a": NaN}': "NaN is not JSON",
    '{"format": "other"}': "format='other'",
    '{"format": "slimadam.plan"}': "version=None",
    '{"format": "slimadam.plan", "version": 2, "parameters": {}}': "this release reads version 1",
    '{"format": "slimadam.plan", "version": true, "parameters": {}}': "version=True",
    '{"format": "slimadam.plan", "version": 1}': "parameters=None",
    '{"format": "slimadam.plan", "version": 1, "parameters": {}, "cuttoff": 1}': "unknown key 'cuttoff'",
    '{"format": "slimadam.plan", "version": 1, "parameters": {}, "cutoff": -1}': "cutoff=-1",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {}}}': "form=None",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": 1}}': "1 is not a rule",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "half"}}}': "form='half'",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "mean"}}}': "only form='mean' has dims",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "dims": [0]}}}': "only form='mean'",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "mean", "dims": [2], "shape": [3, 4]}}}': (
        "out of range for shape"
    ),
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "factored", "shape": [3]}}}': (
        "needs two dimensions"
    ),
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "rol": "x"}}}': "unknown key 'rol'",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "role": 1}}}': "role=1",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "shape": [-1]}}}': "integers in 0",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "snr": {}}}}': "must be a list",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "snr": [1]}}}': "snr entry 1",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "snr": '
    '[{"candidate": [0], "value": -1}]}}}': "SNR -1",
    '{"format": "slimadam.plan", "version": 1, "parameters": {"a": {"form": "full", "shape": [3, 4], "snr": '
    '[{"candidate": [5], "value": 1}]}}}': "5 is not a dimension",
    "[" * 100_000: "cannot be read",
}


@pytest.mark.parametrize("text", WRONG_PLANS, ids=range(len(WRONG_PLANS)))
def test_wrong_plan_files_are_plan_errors(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=WRONG_PLANS[text]) as caught:
        CompressionPlan.load(path)
    assert "plan.json" in str(caught.value) or "appears twice" in str(caught.value) or "NaN" in str(caught.value)
    if text.startswith('{"format": "slimadam.plan"'):
        # What only shapes decide, a schema cannot say.
        beyond_schema = ("out of range for shape", "needs two dimensions", "5 is not a dimension")
        if WRONG_PLANS[text] not in beyond_schema:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(json.loads(text), SCHEMA)


def test_unreadable_files_are_plan_errors(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(PlanError, match="cannot be read as a JSON plan"):
            CompressionPlan.load(path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
RULE_LIKE = st.dictionaries(
    st.sampled_from(["form", "dims", "shape", "role", "reason", "source", "snr"]),
    JSON_VALUES | st.sampled_from(["full", "mean", "factored", [0], [0, 1], [3, 4], [{"candidate": [0], "value": 1}]]),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    data=JSON_VALUES
    | st.fixed_dictionaries(
        {
            "format": st.just("slimadam.plan") | JSON_VALUES,
            "version": st.just(1) | JSON_VALUES,
            "parameters": st.dictionaries(st.text(max_size=3), RULE_LIKE | JSON_VALUES, max_size=3) | JSON_VALUES,
        }
    )
)
def test_arbitrary_json_is_a_plan_or_a_plan_error(data: Any) -> None:
    try:
        plan = CompressionPlan.from_dict(data)
    except PlanError:
        return
    assert CompressionPlan.from_dict(plan.to_dict()) == plan
    jsonschema.validate(json.loads(json.dumps(plan.to_dict(), allow_nan=False)), SCHEMA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cutoff": -1}, "cutoff=-1"),
        ({"cutoff": math.nan}, "cutoff=nan"),
        ({"cutoff": math.inf}, "cutoff=inf"),
        ({"cutoff": "1"}, "cutoff='1'"),
        ({"forms": "all"}, "forms='all'"),
        ({"keep": "*norm*"}, "must be a list or tuple of patterns"),
        ({"keep": [1]}, "keep=.1. must be a list or tuple of patterns"),
        ({"keep": ["nrom"]}, "no parameter has the name or role 'nrom'"),
    ],
)
def test_wrong_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionPlan.from_snr(_history({(0,): 1.0}), **options)
    with pytest.raises(ValueError, match="history is empty"):
        CompressionPlan.from_snr(SNRHistory())


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(50, 8), nn.Embedding(16, 8)
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, 32), "down_proj": nn.Linear(32, 8)})
        self.norm, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 50, bias=False)
        self.conv = nn.Conv2d(3, 4, 2)


def test_paper_rules_by_role() -> None:
    plan = CompressionPlan.from_rules(TinyGPT())
    dims = {name: rule.dims for name, rule in plan.items() if rule.form != "full"}
    assert dims == {
        "wte.weight": (1,),
        "wpe.weight": (1,),
        "attn.q_proj.weight": (1,),
        "attn.k_proj.weight": (1,),
        "attn.v_proj.weight": (0,),
        "attn.o_proj.weight": (0,),
        "mlp.up_proj.weight": (0,),
        "mlp.down_proj.weight": (0,),
        "lm_head.weight": (1,),
    }
    assert plan["conv.weight"].reason == "the paper has no rule for convolution"
    assert plan["norm.weight"].role == "norm"


def test_factored_plan_leaves_vectors_alone() -> None:
    plan = CompressionPlan.factored(TinyGPT())
    assert plan["conv.weight"].state_shapes((4, 3, 2, 2)) == ((4, 1, 1, 1), (1, 3, 2, 2))
    assert {name for name, rule in plan.items() if rule.form == "full"} == {
        name for name, parameter in TinyGPT().named_parameters() if parameter.dim() < 2
    }


def test_rules_are_checked_on_construction() -> None:
    for rule in (Rule((0,)), Rule((), "mean"), Rule((3,), "mean", (2, 2)), Rule((), "half")):  # type: ignore[arg-type]
        with pytest.raises(PlanError, match="'w'"):
            CompressionPlan({"w": rule})
    assert torch.Size((2, 1)) == torch.zeros(Rule((1,), "mean").state_shapes((2, 3))[0]).shape


def test_saving_follows_links_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = CompressionPlan({"w": Rule((1,), "mean")})
    (tmp_path / "shared").mkdir()
    (tmp_path / "plan.json").symlink_to(tmp_path / "shared" / "plan.json")
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").is_symlink()
    assert CompressionPlan.load(tmp_path / "shared" / "plan.json") == plan
    plan.save("/dev/null")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="missing"):
        plan.save(tmp_path / "missing" / "plan.json")
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"plan.json"}


def _noise(plan: CompressionPlan) -> float:
    """What the chosen forms average away: elements over SNR."""
    total = 0.0
    for rule in plan.values():
        if rule.form != "full":
            total += math.prod(rule.shape or ()) / rule.snr["factored" if rule.form == "factored" else rule.dims]
    return total


SMALL_SNR = st.dictionaries(
    st.sampled_from([(0,), (1,), (0, 1), "factored"]), st.floats(0.01, 100), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    snrs=st.lists(SMALL_SNR, min_size=1, max_size=4),
    budget=st.floats(0, 0.9),
    sizes=st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=4, max_size=4),
)
def test_budget_is_met_and_nothing_cheaper_meets_it(
    snrs: list[dict[Any, float]], budget: float, sizes: list[tuple[int, int]]
) -> None:
    history = SNRHistory()
    for index, snr in enumerate(snrs):
        history.record(1, f"w{index}", sizes[index], snr)
    options = []
    for index, snr in enumerate(snrs):
        shape = sizes[index]
        rules = [Rule(shape=shape)]
        rules += [
            Rule((), "factored", shape, snr=snr) if key == "factored" else Rule(key, "mean", shape, snr=snr)
            for key in snr
        ]
        options.append(
            [rule for rule in rules if rule.form == "full" or rule.stored_elements(shape) < math.prod(shape)]
        )
    possible = [
        CompressionPlan({f"w{index}": rule for index, rule in enumerate(combination)})
        for combination in itertools.product(*options)
    ]
    meeting = [plan for plan in possible if plan.second_moments_saved >= budget - 1e-9]
    if not meeting:
        with pytest.raises(ValueError, match=r"budget=.*: at most .* can be saved; ask for less"):
            CompressionPlan.from_snr(history, budget=budget, forms="best")
        return
    chosen = CompressionPlan.from_snr(history, budget=budget, forms="best")
    assert chosen.second_moments_saved >= budget - 1e-9
    assert _noise(chosen) == pytest.approx(min(map(_noise, meeting)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("forms", ["mean", "best"])
def test_no_plan_by_cutoff_that_saves_as_much_loses_less(forms: Any) -> None:
    rng = random.Random(7)
    candidates: list[Any] = [(0,), (1,), (0, 1), "factored"]
    for _ in range(40):
        history = SNRHistory()
        for index in range(30):
            shape = rng.choice([(64, 64), (64, 256), (256, 64), (1000, 64), (rng.randint(2, 99), rng.randint(2, 99))])
            history.record(1, f"w{index}", shape, {key: rng.lognormvariate(1, 1.5) for key in candidates})
        plain = CompressionPlan.from_snr(history, rng.uniform(0, 5), forms=forms)
        chosen = CompressionPlan.from_snr(history, budget=plain.second_moments_saved, forms=forms)
        assert chosen.second_moments_saved >= plain.second_moments_saved - 1e-12
        assert _noise(chosen) <= _noise(plain) * (1 + 1e-9)


def test_a_budget_of_what_a_candidate_between_others_saves() -> None:
    """It lies above the line from nothing to the largest saving, and is what the budget needs."""
    history = _history({(0,): 1.0, (1,): 0.95, (0, 1): 0.9}, (4, 8))
    plan = CompressionPlan.from_snr(history, budget=0.8)
    assert next(iter(plan.values())).dims == (1,)


def test_a_budget_over_thousands_of_parameters_takes_seconds() -> None:
    rng = random.Random(3)
    classes = [
        [(0, 0.0), *((rng.randrange(1, 10**6), rng.lognormvariate(0, 3)) for _ in range(5))] for _ in range(3000)
    ]
    start = time.process_time()
    needed = sum(max(saved for saved, _ in options) for options in classes) * 9 // 10
    choice = least_loss(classes, needed)
    assert time.process_time() - start < 20
    assert sum(options[index][0] for options, index in zip(classes, choice, strict=True)) >= needed


def test_budget_spends_where_it_costs_least() -> None:
    history = SNRHistory()
    for name, row_snr in (("a", 0.5), ("b", 4.0), ("c", 2.0)):
        history.record(1, name, (10, 10), {(1,): row_snr})
    plan = CompressionPlan.from_snr(history, budget=0.6)
    assert {name: rule.dims for name, rule in plan.items()} == {"a": (), "b": (1,), "c": (1,)}
    assert "stays in full: the budget of 60.0% is met" in plan["a"].reason
    assert "SNR 4: part of the cheapest way to save 60.0%" in plan["b"].reason
    assert CompressionPlan.from_snr(history, budget=0.0).second_moments_saved == 0
    assert CompressionPlan.from_snr(history, budget=0.9).second_moments_saved == pytest.approx(0.9)
    with pytest.raises(ValueError, match="budget=2 must be a share"):
        CompressionPlan.from_snr(history, budget=2)
