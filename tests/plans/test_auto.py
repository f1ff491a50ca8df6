"""``plan="auto"``: AdamW while it measures, then compressed in place, in both phases resumable."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, PlanError, SlimAdam, Split
from slimadam.measurement.snr import measure
from tests.reference import second_moments

AUTO = AutoPlan(calibration_steps=6, measurements=3)


def _model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 5)).to(dtype)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("named", [True, False])
def test_exactly_adamw_until_the_switch_then_as_if_loaded_with_the_plan(named: bool) -> None:
    ours, theirs = _model(), _model()
    optimizer = SlimAdam(ours.named_parameters() if named else ours.parameters(), lr=1e-2, plan=AUTO, fused=False)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    _train(ours, optimizer, range(5))
    _train(theirs, adamw, range(5))
    assert optimizer.plan.second_moments_saved == 0
    before = [state["exp_avg_sq"].clone() for state in optimizer.state.values()]
    _train(ours, optimizer, range(5, 6))
    _train(theirs, adamw, range(5, 6))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [second.shape for second in before] == [parameter.shape for parameter in ours.parameters()]
    assert optimizer.plan.second_moments_saved > 0.5
    assert optimizer.memory().second_moments_saved == optimizer.plan.second_moments_saved
    continued = SlimAdam(theirs.parameters(), lr=1e-2, plan=optimizer.plan if not named else None, fused=False)
    if named:
        continued = SlimAdam(theirs.named_parameters(), lr=1e-2, plan=optimizer.plan, fused=False)
    continued.load_state_dict(adamw.state_dict())
    _train(ours, optimizer, range(6, 10))
    _train(theirs, continued, range(6, 10))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_plan_follows_from_what_was_measured() -> None:
    model, reference = _model(), _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    measured: list[dict[Any, float]] = []
    for step in range(1, 7):
        _train(reference, adamw, range(step - 1, step))
        if step in (2, 4, 6):
            measured.append(measure(adamw.state[reference[0].weight]["exp_avg_sq"]))
    _train(model, optimizer, range(6))
    averages = {candidate: math.fsum(m[candidate] for m in measured) / 3 for candidate in measured[0]}
    rule = optimizer.plan["0.weight"]
    assert rule.snr == pytest.approx(averages, rel=1e-4)
    assert rule.form == ("factored" if averages["factored"] > 3 * AUTO.cutoff else "float8")
    assert optimizer.plan["1.weight"].form == "full"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stopped_at", [0, 1, 3, 5, 6, 8])
def test_resumes_in_the_phase_it_was_saved_in(stopped_at: int, dtype: torch.dtype) -> None:
    model = _model(dtype)
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    _train(model, optimizer, range(stopped_at))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    assert ("measuring" in saved["slimadam"]) == (stopped_at < 6)
    _train(model, optimizer, range(stopped_at, 10))
    resumed = _model(dtype)
    resumed.load_state_dict(weights)
    resumed_optimizer = SlimAdam(resumed, lr=1e-2, plan=AUTO)
    resumed_optimizer.load_state_dict(saved)
    _train(resumed, resumed_optimizer, range(stopped_at, 10))
    assert resumed_optimizer.plan == optimizer.plan
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_going_back_to_a_checkpoint_from_before_the_switch() -> None:
    model = _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    _train(model, optimizer, range(3))
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    _train(model, optimizer, range(3, 9))
    end = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert optimizer.plan.second_moments_saved == 0
    _train(model, optimizer, range(3, 9))
    assert all(torch.equal(end[name], value) for name, value in model.state_dict().items())


def test_damaged_record_is_refused() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=AUTO)
    _train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for damage in ({}, {"steps": 2}, {"steps": "x", "measured": []}, {"steps": 2, "measured": [1]}, torch.ones(2)):
        wrong = {**saved, "slimadam": {**saved["slimadam"], "measuring": damage}}
        with pytest.raises(ValueError, match="record of plan='auto' is damaged"):
            optimizer.load_state_dict(wrong)


def test_deepcopy_goes_on_measuring() -> None:
    model = _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    _train(model, optimizer, range(2))
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    _train(model, optimizer, range(2, 9))
    _train(model_2, optimizer_2, range(2, 9))
    assert optimizer.plan == optimizer_2.plan
    for a, b in zip(model.parameters(), model_2.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="slimadam"):
        model = _model()
        _train(model, SlimAdam(model, plan=AUTO), range(8))
    (record,) = caplog.records
    assert "of second moments saved" in record.message
    assert "; forms: full 4, float8 1, mean 1; " in record.message


def test_non_finite_gradients_do_not_poison_the_plan() -> None:
    model = _model()
    optimizer = SlimAdam([*model.named_parameters()], lr=1e-2, plan=AUTO)
    _train(model, optimizer, range(4))
    model[0].weight.grad = torch.full((16, 12), math.nan)
    optimizer.step()
    model[2].weight.grad = torch.full((5, 16), math.inf)
    optimizer.step()
    snr = optimizer.plan["0.weight"].snr
    assert snr
    assert all(math.isfinite(value) for value in snr.values())


def test_amsgrad_chooses_among_averages_only() -> None:
    model = _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO, amsgrad=True)
    _train(model, optimizer, range(8))
    assert {rule.form for rule in optimizer.plan.values()} <= {"full", "mean"}
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter]["max_exp_avg_sq"].shape == optimizer.state[parameter]["exp_avg_sq"].shape, (
            name
        )


def test_default_is_auto_with_200_steps() -> None:
    model = _model()
    optimizer = SlimAdam(model)
    assert optimizer._registry.measuring is not None
    assert optimizer._registry.measuring.settings == AutoPlan()
    assert [step for step in range(1, 1001) if AutoPlan().measures(step)] == [100, 200]
    assert "measuring" in optimizer.plan["0.weight"].reason


def test_explicit_plan_loads_a_measuring_checkpoint_and_averages() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=AUTO)
    _train(model, optimizer, range(3))
    target = SlimAdam(model, plan="factored")
    target.load_state_dict(optimizer.state_dict())
    assert target.plan == CompressionPlan(dict(target.plan))
    assert [tuple(part.shape) for part in second_moments(target.state[model[0].weight])] == [(16, 1), (1, 12)]


def test_nine_dimensions_are_left_in_full() -> None:
    param = nn.Parameter(torch.randn(1, 1, 1, 1, 1, 1, 2, 2, 2))
    optimizer = SlimAdam([param], plan=AUTO)
    for _ in range(7):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].shape == param.shape
    assert CompressionPlan.from_dict(optimizer.plan.to_dict()) == optimizer.plan


def test_steps_without_gradients_do_not_count() -> None:
    model = _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    for _ in range(10):
        optimizer.step()
    assert optimizer.plan.second_moments_saved == 0
    _train(model, optimizer, range(6))
    assert optimizer.plan.second_moments_saved > 0.5


def test_a_group_added_after_the_decision_says_so() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=AUTO)
    _train(model, optimizer, range(6))
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.randn(3, 3)))]})
    assert optimizer.plan["late"].reason == "added after plan='auto' had decided"


def test_amsgrad_checkpoint_is_refused_where_second_moments_are_factored() -> None:
    model = _model()
    adamw = torch.optim.AdamW(model.parameters(), amsgrad=True)
    _train(model, adamw, range(1))
    optimizer = SlimAdam(model, plan="factored")
    with pytest.raises(PlanError, match="amsgrad=True has no factored form"):
        optimizer.load_state_dict(adamw.state_dict())
    assert not optimizer.state
    assert not optimizer.param_groups[0]["amsgrad"]


def test_a_parameter_exchanged_for_one_of_another_shape_is_measured_anew() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    optimizer = SlimAdam([param], plan=AUTO)
    for step in range(7):
        if step == 3:
            param = nn.Parameter(torch.randn(9, 4))
            optimizer.param_groups[0]["params"][0] = param
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert optimizer.plan["param_groups.0.params.0"].shape == (9, 4)
    assert optimizer.plan.second_moments_saved > 0.5


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile
def test_a_compiled_step_decides_and_goes_on() -> None:
    runs = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        model = _model()
        # Averages: codes are rounded the other way once a parameter's last bits have carried.
        optimizer = SlimAdam(model, lr=1e-2, plan=dataclasses.replace(AUTO, forms="best"))
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(8, 12, generator=generator)).square().mean().backward()
            step()
        runs.append((model, optimizer))
    (eager, expected), (compiled, found) = runs
    assert [rule.form for rule in found.plan.values()] == [rule.form for rule in expected.plan.values()]
    assert found.plan["0.weight"].form != "full"
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_under_autocast_and_a_grad_scaler_skipped_steps_do_not_count() -> None:
    model = _model()
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(9):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 12)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step in (2, 5):
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        decided = optimizer.plan["0.weight"].form != "full"
        assert decided == (step >= 7)
    assert all(param.isfinite().all() for param in model.parameters())


def _auto_on_a_rank(rank: int, store: str, results: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_model())
    optimizer = SlimAdam(model, lr=1e-2, plan=AUTO)
    for step in range(9):
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()
    forms = {name: (rule.form, rule.dims, dict(rule.snr)) for name, rule in optimizer.plan.items()}
    results.put((forms, [param.detach().numpy().copy() for param in model.parameters()]))
    torch.distributed.destroy_process_group()


def test_every_rank_of_ddp_decides_alike(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_auto_on_a_rank, args=(rank, str(tmp_path / "store"), results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    (forms, params), (other_forms, other_params) = results.get(timeout=120), results.get(timeout=120)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert forms == other_forms
    assert forms["0.weight"][0] != "full"
    assert all((one == other).all() for one, other in zip(params, other_params, strict=True))


def test_resuming_with_fewer_steps_decides_in_the_next_one() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=200))
    _train(model, optimizer, range(60))
    assert not any(parameter.values for parameter in optimizer._registry.measuring.history.values())  # type: ignore[union-attr]
    fewer = SlimAdam(model, plan=AutoPlan(calibration_steps=50))
    fewer.load_state_dict(optimizer.state_dict())
    _train(model, fewer, range(60, 61))
    assert fewer.plan.second_moments_saved > 0.5
    assert fewer.plan["0.weight"].snr == pytest.approx(measure(optimizer.state[model[0].weight]["exp_avg_sq"]), rel=0.2)
    _train(model, fewer, range(61, 64))


@pytest.mark.parametrize("steps", [-4, 2.0, "3", None, True])
def test_a_wrong_count_of_steps_is_refused(steps: Any) -> None:
    optimizer = SlimAdam(_model(), plan=AUTO)
    saved = optimizer.state_dict()
    saved["slimadam"]["measuring"]["steps"] = steps
    with pytest.raises(
        ValueError, match=rf"record of plan='auto' is damaged .*steps={steps!r} must be an integer >= 0"
    ):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("now", [{"b": 8, "a": 8}, {"a": 4, "b": 12}, {"c": 16}, None])
def test_measurements_of_other_parts_are_left_out(now: dict[str, int] | None, caplog: pytest.LogCaptureFixture) -> None:
    def settings(sizes: dict[str, int] | None) -> AutoPlan:
        return AutoPlan(6, measurements=6, parts={"0.weight": Split(sizes)} if sizes else {})

    model = _model()
    optimizer = SlimAdam(model, plan=settings({"a": 8, "b": 8}))
    _train(model, optimizer, range(4))
    other = SlimAdam(model, plan=settings(now))
    other.load_state_dict(optimizer.state_dict())
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'0.weight[a]', '0.weight[b]' are left out" in message
    history = other._registry.measuring.history  # type: ignore[union-attr]
    assert not any(key.startswith("0.weight[") for key in history)
    assert len(history["2.weight"].values) == 4
    _train(model, other, range(4, 6))
    chosen = [rule for key, rule in other.plan.items() if key.startswith("0.weight")]
    assert len(chosen) == len(now or [0])
    assert all(rule.snr for rule in chosen)
