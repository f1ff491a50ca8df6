"""Sources of rules: kept in files and checkpoints, and never read off reasons where they are there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam, SNRHistory
from slimadam.plans.plan import SCHEMA_PATH
from slimadam.state.rule import Source, source_of_reason


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def _history() -> SNRHistory:
    history = SNRHistory()
    history.record(1, "0.weight", (6, 8), {(0,): 2.0, (1,): 3.0})
    history.record(1, "2.weight", (4, 6), {(0,): 0.2, (1,): 0.3})
    history.record(1, "1.weight", (6,), {(0,): 9.0})
    return history


def _optimizer(**settings: Any) -> SlimAdam:
    model = _model()
    optimizer = SlimAdam(model.named_parameters(), **settings)
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    return optimizer


def _expanded() -> CompressionPlan:
    optimizer = _optimizer(plan="factored")
    optimizer.expand("0.weight")
    return optimizer.plan


CASES: dict[Source, tuple[Callable[[], CompressionPlan], str]] = {
    Source.MEASURED: (lambda: CompressionPlan.from_snr(_history()), "0.weight"),
    Source.DEFAULT: (lambda: CompressionPlan.from_snr(_history()), "1.weight"),
    Source.USER: (lambda: CompressionPlan.from_snr(_history(), keep=["2.*"]), "2.weight"),
    Source.PAPER: (lambda: CompressionPlan.from_rules(nn.ModuleDict({"lm_head": nn.Linear(6, 4)})), "lm_head.weight"),
    Source.NO_RULE: (lambda: CompressionPlan.from_rules(_model()), "1.weight"),
    Source.FACTORED: (lambda: CompressionPlan.factored(_model()), "2.weight"),
    Source.EXPANDED: (_expanded, "0.weight"),
    Source.MEASURING: (lambda: _optimizer(plan="auto").plan, "0.weight"),
    Source.ABSENT: (lambda: _optimizer(plan=CompressionPlan({"0.weight": Rule()})).plan, "2.weight"),
    Source.CARRIED: (lambda: CompressionPlan.from_snr(_history()).for_model(_model()), "0.weight"),
    Source.NO_COUNTERPART: (
        lambda: CompressionPlan({"lm_head.weight": Rule((1,), "mean")}).for_model(
            nn.ModuleDict({"lm_head": nn.Linear(6, 4), "up_proj": nn.Linear(6, 4)})
        ),
        "up_proj.weight",
    ),
    Source.OTHER: (lambda: _optimizer(plan=None).plan, "0.weight"),
}


def _sources(plan: CompressionPlan) -> dict[str, Source]:
    return {name: rule.source for name, rule in plan.items()}


@pytest.mark.parametrize("source", Source)
def test_sources_survive_files_and_are_found_for_files_without_them(source: Source) -> None:
    make, name = CASES[source]
    plan = make()
    assert plan[name].source is source
    data = json.loads(json.dumps(plan.to_dict()))
    loaded = CompressionPlan.from_dict(data)
    assert loaded == plan
    assert _sources(loaded) == _sources(plan)
    for rule in data["parameters"].values():
        del rule["source"]
    assert CompressionPlan.from_dict(data)[name].source is source


def test_sources_survive_pickles_and_are_found_for_pickles_without_them() -> None:
    plan = CompressionPlan.from_snr(_history(), keep=["2.*"])
    assert _sources(pickle.loads(pickle.dumps(plan))) == _sources(plan)
    rule = object.__new__(Rule)
    rule.__setstate__({key: value for key, value in vars(plan["2.weight"]).items() if key != "source"})
    assert (rule, rule.source) == (plan["2.weight"], plan["2.weight"].source)


def test_schema_has_all_sources_and_others_are_refused() -> None:
    schema = json.loads(SCHEMA_PATH.read_text())
    assert schema["$defs"]["rule"]["properties"]["source"]["enum"] == [source.value for source in Source]
    for source in ("nonsense", 3, None, ["user"], {}):
        data = {"format": "slimadam.plan", "version": 1, "parameters": {"w": {"form": "full", "source": source}}}
        with pytest.raises(PlanError, match=r"'w': source=.* must be one of"):
            CompressionPlan.from_dict(data)


def test_reasons_decide_nothing() -> None:
    plan = CompressionPlan.from_snr(_history(), keep=["2.*"])
    rules = {name: replace(rule, reason="in other words") for name, rule in plan.items()}
    carried = CompressionPlan(rules, cutoff=plan.cutoff).for_model(_model())
    assert carried["2.weight"].source is Source.USER
    words = "kept in full as asked (keep='2.*')"
    assert source_of_reason(words) is Source.USER
    rules["2.weight"] = replace(rules["2.weight"], reason=words, source=Source.MEASURED)
    assert CompressionPlan(rules, cutoff=1.0).for_model(_model())["2.weight"].source is Source.CARRIED


def test_a_checkpoint_without_sources_goes_on_measuring() -> None:
    settings = AutoPlan(calibration_steps=3, cutoff=0.0)
    saved = _optimizer(plan=settings).state_dict()
    for rule in saved["slimadam"]["plan"]["parameters"].values():
        assert rule.pop("source") == "measuring"
    optimizer = _optimizer(plan=settings)
    optimizer.load_state_dict(saved)
    for _ in range(2):
        optimizer.step()
    assert optimizer.plan["0.weight"].source is Source.MEASURED
