"""The samples inside the optimizer: they follow training, cost what they may, and survive every way out."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, snr
from tests.reference import second_moments

BETAS = (0.9, 0.9)
PLANS: dict[str, Any] = {
    "mean": CompressionPlan({"0.weight": Rule((1,), "mean"), "1.weight": Rule((0,), "mean")}),
    "factored": "factored",
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(160, 120, bias=False), nn.Linear(120, 130, bias=False))


def feed(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scale: Callable[[torch.Tensor], Any]
) -> None:
    """Gradients of independent entries with the given standard deviations."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator) * scale(param)
        optimizer.step()


def even(param: torch.Tensor) -> torch.Tensor:
    """Every entry of the same size: all averages hold."""
    return torch.ones_like(param)


def uneven(param: torch.Tensor) -> torch.Tensor:
    """Every entry of its own size: nothing averages well."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(param.shape, generator=generator).pow(8)


@pytest.mark.parametrize("plan", PLANS)
def test_the_sample_has_the_snr_of_the_whole(plan: str) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=PLANS[plan], betas=BETAS)
    reference_model = network()
    adamw = torch.optim.AdamW(reference_model.parameters(), betas=BETAS)
    feed(model, optimizer, range(200), even)
    feed(reference_model, adamw, range(200), even)
    for name, param in reference_model.named_parameters():
        rule = optimizer.plan[name]
        whole = snr(adamw.state[param]["exp_avg_sq"], "factored" if rule.form == "factored" else rule.dims)
        check = optimizer.snr_check()[name]
        # A sample of n elements knows a variance to about sqrt(2 / n) and the heavy tail of squares.
        assert check.snr == pytest.approx(whole, rel=8 * (2 / check.sampled) ** 0.5)
        assert check.ready
        assert check.reason == "averaging holds"


@pytest.mark.parametrize("plan", PLANS)
def test_samples_are_at_most_a_hundredth_of_what_is_saved(plan: str) -> None:
    optimizer = SlimAdam(network(), plan=PLANS[plan])
    memory = optimizer.memory()
    assert 0 < memory.monitor <= 0.01 * (memory.adamw_exp_avg_sq - memory.exp_avg_sq)
    assert SlimAdam(network(), plan=PLANS[plan], monitor=False).memory().monitor == 0
    assert SlimAdam(network(), plan=None).memory().monitor == 0


@pytest.mark.parametrize("plan", PLANS)
def test_one_warning_when_the_statistics_change_and_none_before(plan: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=PLANS[plan], betas=BETAS)
    with caplog.at_level(logging.WARNING, "slimadam"):
        feed(model, optimizer, range(1000), even)
        assert not caplog.records
        feed(model, optimizer, range(1000, 2000), uneven)
    (warning,) = caplog.messages
    assert "'0.weight'" in warning
    assert "opt.expand(name)" in warning
    assert "averaging no longer holds" in optimizer.snr_check()["0.weight"].reason


@pytest.mark.parametrize("monitor", [True, False])
def test_watching_changes_no_number(monitor: bool) -> None:
    runs = []
    for watched in (monitor, False):
        model = network()
        feed(model, SlimAdam(model, plan="factored", monitor=watched), range(5), even)
        runs.append([param.detach() for param in model.parameters()])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_auto_starts_the_samples_at_the_true_second_moments() -> None:
    model = network()
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=30), betas=BETAS)
    feed(model, optimizer, range(29), even)
    assert optimizer.snr_check() == {}
    assert optimizer.memory().monitor == 0
    feed(model, optimizer, range(29, 30), even)
    twin = network()
    adamw = torch.optim.AdamW(twin.parameters(), betas=BETAS)
    feed(twin, adamw, range(30), even)
    for name, param in twin.named_parameters():
        rule, check = optimizer.plan[name], optimizer.snr_check()[name]
        whole = snr(adamw.state[param]["exp_avg_sq"], "factored" if rule.form == "factored" else rule.dims)
        assert check.ready
        assert check.snr == pytest.approx(whole, rel=8 * (2 / check.sampled) ** 0.5)
    assert optimizer.memory().monitor > 0


def saved_and_loaded(optimizer: SlimAdam, model: nn.Module, plan: Any) -> tuple[nn.Module, SlimAdam]:
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)
    again = network()
    again.load_state_dict(checkpoint["model"])
    resumed = SlimAdam(again, plan=plan, betas=BETAS)
    resumed.load_state_dict(checkpoint["optimizer"])
    return again, resumed


def copied(optimizer: SlimAdam, model: nn.Module, plan: Any) -> tuple[nn.Module, SlimAdam]:
    again, resumed = copy.deepcopy((model, optimizer))
    return again, resumed


def pickled(optimizer: SlimAdam, model: nn.Module, plan: Any) -> tuple[nn.Module, SlimAdam]:
    again, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    return again, resumed


@pytest.mark.parametrize("way", [saved_and_loaded, copied, pickled])
@pytest.mark.parametrize("plan", ["mean", "factored", "auto"])
@pytest.mark.parametrize("at", [195, 215])
def test_a_resumed_run_watches_on_to_the_last_bit(way: Callable[..., Any], plan: str, at: int) -> None:
    chosen = AutoPlan(calibration_steps=20) if plan == "auto" else PLANS[plan]
    model = network()
    optimizer = SlimAdam(model, plan=chosen, betas=BETAS)
    feed(model, optimizer, range(at), even)
    again, resumed = way(optimizer, model, chosen)
    feed(model, optimizer, range(at, 425), even)
    feed(again, resumed, range(at, 425), even)
    assert resumed.snr_check() == optimizer.snr_check()
    assert any(check.ready for check in resumed.snr_check().values())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_an_expanded_parameter_goes_on_from_what_its_averages_stood_for(plan: str, amsgrad: bool) -> None:
    if plan == "factored" and amsgrad:
        pytest.skip("amsgrad has no factored form")
    model = network()
    optimizer = SlimAdam(model, plan=PLANS[plan], betas=BETAS, amsgrad=amsgrad)
    feed(model, optimizer, range(5), even)
    weight = model[0].weight
    reference = nn.Parameter(weight.detach().clone())
    adamw = torch.optim.AdamW([reference], betas=BETAS, amsgrad=amsgrad)
    saved = copy.deepcopy(optimizer.adamw_state_dict())
    adamw.load_state_dict({**adamw.state_dict(), "state": {0: saved["state"][0]}})

    optimizer.expand("0.weight")
    assert optimizer.plan["0.weight"].form == "full"
    assert optimizer.plan["0.weight"].reason == "returned to a full second moment by expand()"
    assert optimizer.state[weight]["exp_avg_sq"].shape == weight.shape
    assert "0.weight" not in optimizer.snr_check()
    assert optimizer.memory().exp_avg_sq == 4 * (weight.numel() + (130 + 120 if plan == "factored" else 120))
    for step in range(5, 10):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        reference.grad = weight.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(weight, reference, rtol=3e-7, atol=3e-9)
    optimizer.expand("0.weight")
    assert optimizer.state[weight]["exp_avg_sq"].shape == weight.shape


def test_one_part_may_be_expanded() -> None:
    model = nn.MultiheadAttention(64, 4)
    optimizer = SlimAdam(model, plan="rules")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.expand("in_proj_weight[key]")
    optimizer.step()
    shapes = [tuple(part.shape) for part in second_moments(optimizer.state[model.in_proj_weight])]
    assert shapes == [(64, 1), (64, 64), (1, 64)]
    optimizer.expand("in_proj_weight")
    optimizer.step()
    assert [tuple(part.shape) for part in second_moments(optimizer.state[model.in_proj_weight])] == [(64, 64)] * 3


@pytest.mark.parametrize("plan", [*PLANS, "auto"])
def test_a_checkpoint_remembers_what_was_expanded(plan: str) -> None:
    chosen = AutoPlan(calibration_steps=3) if plan == "auto" else PLANS[plan]
    model = network()
    optimizer = SlimAdam(model, plan=chosen, betas=BETAS)
    feed(model, optimizer, range(5), even)
    optimizer.expand("0.weight")
    again, resumed = saved_and_loaded(optimizer, model, chosen)
    assert resumed.plan["0.weight"].form == "full"
    assert resumed.plan["1.weight"].form != "full"
    feed(model, optimizer, range(5, 9), even)
    feed(again, resumed, range(5, 9), even)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_before_the_first_step_too() -> None:
    model = network()
    optimizer = SlimAdam(model, plan="factored")
    optimizer.expand("1.weight")
    feed(model, optimizer, range(1), even)
    assert optimizer.state[model[1].weight]["exp_avg_sq"].shape == model[1].weight.shape


def test_wrong_use_is_refused() -> None:
    optimizer = SlimAdam(network(), plan="factored", monitor=False)
    with pytest.raises(RuntimeError, match=r"snr_check\(\) needs samples, which monitor=False has switched off"):
        optimizer.snr_check()
    with pytest.raises(KeyError, match=r"'2\.weight' is not a parameter of this optimizer"):
        optimizer.expand("2.weight")
    with pytest.raises(RuntimeError, match=r"nothing is compressed while plan='auto' measures"):
        SlimAdam(network()).expand("0.weight")
    with pytest.raises(TypeError, match="monitor=1 must be True or False"):
        SlimAdam(network(), monitor=1)  # type: ignore[arg-type]


def test_a_checkpoint_from_before_expand_takes_it_back() -> None:
    model = network()
    optimizer = SlimAdam(model, plan="factored", betas=BETAS)
    feed(model, optimizer, range(3), even)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.expand("0.weight")
    optimizer.load_state_dict(saved)
    assert optimizer.plan["0.weight"].form == "factored"
    feed(model, optimizer, range(3, 4), even)
    assert [tuple(part.shape) for part in second_moments(optimizer.state[model[0].weight])] == [(120, 1), (1, 160)]


def test_wrapper_prefixes_do_not_matter_to_expand() -> None:
    optimizer = SlimAdam(network(), plan="factored")
    optimizer.expand("_orig_mod.module.0.weight")
    assert optimizer.plan["0.weight"].form == "full"


@pytest.mark.parametrize(
    ("plan", "cutoff"),
    [
        (AutoPlan(cutoff=3.0), 3.0),
        (AutoPlan(budget=0.5), None),
        (CompressionPlan({"0.weight": Rule((1,), "mean"), "1.weight": Rule()}, cutoff=4.0), 4.0),
        ("factored", None),
    ],
)
def test_the_plan_in_force_knows_its_cutoff(plan: Any, cutoff: float | None) -> None:
    assert SlimAdam(network(), plan=plan).plan.cutoff == cutoff


@pytest.mark.parametrize("how", ["cleared", "loaded without it"])
def test_a_factored_parameter_without_state_is_passed_over(how: str) -> None:
    model = network()
    optimizer = SlimAdam(model, plan="factored", betas=BETAS)
    feed(model, optimizer, range(210), even)
    if how == "cleared":
        optimizer.state.clear()
    else:
        saved = optimizer.state_dict()
        saved["state"].pop(1)
        optimizer.load_state_dict(saved)
    before = optimizer.snr_check()["1.weight"]
    model[1].weight.requires_grad_(False)
    for step in range(210, 420):
        model[0].weight.grad = torch.randn(120, 160, generator=torch.Generator().manual_seed(step))
        model[1].weight.grad = None
        optimizer.step()
    assert optimizer.snr_check()["1.weight"] == before
    assert optimizer.snr_check()["0.weight"].ready


def test_names_with_prefixes_and_slips() -> None:
    model = network()
    optimizer = SlimAdam(model, plan="factored")
    assert optimizer.backend("module.0.weight") == optimizer.backend("0.weight")
    with pytest.raises(KeyError, match=r"'0.wieght' is not a parameter of this optimizer; did you mean '0.weight'\?"):
        optimizer.expand("0.wieght")
    for wrong in (None, 5, b"x"):
        with pytest.raises(TypeError, match=r"name=.* must be a parameter's name"):
            optimizer.expand(wrong)  # type: ignore[arg-type]
