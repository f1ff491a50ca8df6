"""``AutoPlan(revise=True)``: a decided plan follows the run, and stays as it is where nothing changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam
from slimadam.kernels.float8 import encode
from slimadam.measurement.snr import snr
from slimadam.optim.revision import snr_of_codes
from slimadam.state.second_moment import Float8
from tests.measurement.test_snr_check import BETAS, copied, network, pickled, saved_and_loaded

DECIDED = 20
CHANGE = 1020
END = 2420
REVISED = AutoPlan(calibration_steps=DECIDED, revise=True)
Size = Callable[[Tensor], Tensor]


def even(param: Tensor) -> Tensor:
    return torch.ones_like(param)


def uneven(param: Tensor) -> Tensor:
    return torch.rand(param.shape, generator=torch.Generator().manual_seed(7)).pow(8)


def feed(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, sizes: tuple[Size, Size]) -> None:
    """Give gradients of random signs, and of sizes that another function tells for each parameter."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param, size in zip(model.parameters(), sizes, strict=True):
            sign = torch.randint(0, 2, param.shape, generator=generator) * 2 - 1
            param.grad = sign * size(param) * (1 + 0.3 * torch.rand(param.shape, generator=generator))
        optimizer.step()


def forms(optimizer: SlimAdam) -> list[str]:
    return [optimizer.plan[name].form for name in ("0.weight", "1.weight")]


def test_a_plan_stays_as_it_is_where_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=REVISED, betas=BETAS)
    with caplog.at_level(logging.INFO, "slimadam"):
        feed(model, optimizer, range(END), (even, uneven))
    assert forms(optimizer) == ["factored", "float8"]
    assert "revised" not in caplog.text


def test_a_plan_follows_what_clearly_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=REVISED, betas=BETAS)
    feed(model, optimizer, range(CHANGE), (even, uneven))
    assert forms(optimizer) == ["factored", "float8"]
    with caplog.at_level(logging.INFO, "slimadam"):
        feed(model, optimizer, range(CHANGE, END), (uneven, even))
    assert forms(optimizer) == ["float8", "factored"]
    assert sum("plan='auto' is revised at step" in record.getMessage() for record in caplog.records) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the SNR of row and column averages fell from" in optimizer.plan["0.weight"].reason
    assert "their SNR has risen to" in optimizer.plan["1.weight"].reason
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq_codes"}
    assert set(optimizer.state[model[1].weight]) == {"step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"}
    again = SlimAdam(network(), plan=CompressionPlan.from_dict(optimizer.plan.to_dict()))
    assert forms(again) == forms(optimizer)
    assert optimizer.memory().exp_avg_sq == again.memory().exp_avg_sq
    assert set(optimizer.snr_check()) == {"1.weight"}


def test_without_it_the_same_run_is_warned_of_and_keeps_its_plan(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=DECIDED), betas=BETAS)
    feed(model, optimizer, range(CHANGE), (even, uneven))
    feed(model, optimizer, range(CHANGE, END), (uneven, even))
    assert forms(optimizer) == ["factored", "float8"]
    assert "averaging second moments no longer holds" in caplog.text


def test_the_budget_is_kept_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    settings = AutoPlan(calibration_steps=DECIDED, revise=True, budget=0.9)
    optimizer = SlimAdam(model, plan=settings, betas=BETAS)
    feed(model, optimizer, range(CHANGE), (even, even))
    before = optimizer.plan
    assert before.second_moments_saved >= 0.9
    feed(model, optimizer, range(CHANGE, END + 400), (uneven, uneven))
    assert optimizer.plan == before
    refusals = [record.getMessage() for record in caplog.records if "the budget of 0.9" in record.getMessage()]
    assert len(refusals) == len(set(refusals)) == 2


@pytest.mark.parametrize("chosen", ["best", "mean"])
def test_other_forms_go_back_to_full_moments(chosen: Any) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=DECIDED, revise=True, forms=chosen), betas=BETAS)
    feed(model, optimizer, range(CHANGE), (even, even))
    assert "full" not in forms(optimizer)
    feed(model, optimizer, range(CHANGE, END), (uneven, even))
    assert forms(optimizer)[0] == "full"
    assert "kept in full: the SNR of" in optimizer.plan["0.weight"].reason
    assert "exp_avg_sq" in optimizer.state[model[0].weight]


@pytest.mark.parametrize(
    ("way", "at"),
    [(saved_and_loaded, 10), (saved_and_loaded, 1700), (pickled, 1700), (copied, 2000)],
)
def test_resumes_to_the_last_bit_in_every_phase(way: Callable[..., Any], at: int) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=REVISED, betas=BETAS)

    def run(trained: nn.Module, its_optimizer: SlimAdam, steps: range) -> None:
        feed(trained, its_optimizer, range(steps.start, min(steps.stop, CHANGE)), (even, uneven))
        feed(trained, its_optimizer, range(max(steps.start, CHANGE), steps.stop), (uneven, even))

    run(model, optimizer, range(at))
    again, resumed = way(optimizer, model, REVISED)
    run(model, optimizer, range(at, END))
    run(again, resumed, range(at, END))
    assert forms(optimizer) == ["float8", "factored"]
    assert resumed.plan == optimizer.plan
    assert resumed.snr_check() == optimizer.snr_check()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0])
def test_the_snr_of_codes_is_that_of_the_moment(spread: float) -> None:
    """Normally distributed gradients, in the middle of a run: the exact moment beside that in codes."""
    generator = torch.Generator().manual_seed(0)
    shape = (256, 192)
    truth = torch.exp(spread * torch.randn(shape, generator=generator))
    beta2, moment, exact = 0.99, truth.clone(), truth.clone()
    param = torch.randn(shape, generator=generator)
    form = Float8()
    for step in range(400):
        codes = encode(moment, param, torch.tensor(float(step)))
        squared = truth * torch.randn(shape, generator=generator).square()
        moment = form.expand([codes], 2).lerp_(squared, 1 - beta2)
        exact.lerp_(squared, 1 - beta2)
    found = snr_of_codes(Rule((), "factored", shape), codes)
    wanted = snr(exact, "factored")
    assert 1 / found == pytest.approx(1 / wanted, rel=0.25, abs=0.06)


def test_needs_the_monitor_and_a_true_or_false() -> None:
    with pytest.raises(ValueError, match="monitor=False, but plan=AutoPlan"):
        SlimAdam(network(), plan=REVISED, monitor=False)
    with pytest.raises(ValueError, match="revise='yes' must be True or False"):
        AutoPlan(revise="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("damaged", [7, {"0.weight": -1}, {"0.weight": "3"}, {1: 1}])
def test_damaged_counts_are_refused(damaged: Any) -> None:
    model = network()
    optimizer = SlimAdam(model, plan=REVISED, betas=BETAS)
    feed(model, optimizer, range(DECIDED + 5), (even, uneven))
    saved = optimizer.state_dict()
    saved["slimadam"]["high"] = damaged
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="high"):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
