"""State that a step cannot use, or that no kernel can: refused by name, or updated by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimadam import CompressionPlan, Rule, SlimAdam
from tests.optim.step import test_stepper
from tests.optim.step.test_stepper import _optimizer, _step

fused = test_stepper.fused


def _after_two_steps(**options: Any) -> tuple[Tensor, SlimAdam, dict[str, Any]]:
    param = torch.arange(24.0).view(4, 6).requires_grad_()
    optimizer = _optimizer(param, **options)
    for step in range(2):
        _step(param, optimizer, step)
    return param, optimizer, optimizer.state[param]


@pytest.mark.parametrize("what", ["values", "gradient", "exp_avg", "exp_avg_sq_row"])
def test_memory_that_was_let_go_is_refused_by_name(what: str, fused: bool | None) -> None:
    """As offloading and FSDP do, whose tensors come back before a step; else the step would end the process."""
    param, optimizer, state = _after_two_steps(dims="factored", fused=fused)
    param.grad = torch.ones(4, 6)
    {"values": param.data, "gradient": param.grad}.get(what, state.get(what)).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"'w': the memory of its {what} has been let go"):
        optimizer.step()
    assert state["step"] == 2


@pytest.mark.parametrize("what", ["exp_avg_scale", "exp_avg_sq_row"])
def test_state_on_another_device_is_refused_by_name(what: str, fused: bool | None) -> None:
    _, optimizer, state = _after_two_steps(dims="factored", fused=fused, momentum_dtype="int8")
    state[what] = state[what].to("meta")
    with pytest.raises(RuntimeError, match=f"'w': its {what} is on meta, the parameter on cpu; move it"):
        optimizer.step()
    assert state["step"] == 2


def test_step_counts_of_other_kinds_take_the_reference(fused: bool | None) -> None:
    param, optimizer, state = _after_two_steps(fused=fused)
    other, plain, _ = _after_two_steps(fused=False)
    counts = torch.tensor([2.0, 7.0, 11.0], dtype=torch.bfloat16)
    state["step"] = counts[0]
    for step in (2, 3):
        _step(param, optimizer, step)
        _step(other, plain, step)
    torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [4.0, 7.0, 11.0]


def test_shared_step_counts_go_up_with_each_parameter(fused: bool | None) -> None:
    params = [torch.ones(3, 4).requires_grad_() for _ in range(3)]
    rules = CompressionPlan({f"w{number}": Rule((1,), "mean") for number in range(3)})
    optimizer = SlimAdam([(f"w{at}", param) for at, param in enumerate(params)], plan=rules, fused=fused, monitor=False)
    if optimizer.backend("w0") == "triton":
        pytest.skip("Triton's kernels count in parallel, a shared count not once for each")
    for step in range(4):
        for param in params:
            param.grad = torch.ones(3, 4)
        optimizer.step()
        if step == 0:
            for param in params[1:]:
                optimizer.state[param]["step"] = optimizer.state[params[0]]["step"]
    assert optimizer.state[params[0]]["step"] == 1 + 3 * 3


def test_values_that_are_negated_when_they_are_read(fused: bool | None) -> None:
    param = torch.tensor([1 + 2j]).conj().imag.detach().requires_grad_()
    optimizer = SlimAdam([param], lr=0.1, weight_decay=0.0, plan=None, fused=fused)
    for _ in range(3):
        param.grad = torch.ones(1)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-2.3]))


def test_scales_of_another_kind_reach_no_kernel(fused: bool | None) -> None:
    param = torch.ones(4, 512).requires_grad_()
    optimizer = _optimizer(param, "factored", fused=fused, momentum_dtype="int8")
    param.grad = torch.ones(4, 512)
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg_scale"] = torch.zeros(1, dtype=torch.uint8).expand(state["exp_avg_scale"].shape)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step()


def test_amsgrad_switched_on_between_steps_says_what_to_do(fused: bool | None) -> None:
    param, optimizer, state = _after_two_steps(fused=fused)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(RuntimeError, match=r"'w': amsgrad=True was set after steps without it.* optimizer.state.pop"):
        optimizer.step()
    assert state["step"] == 2
    optimizer.state.pop(param)
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[param]


def test_a_refused_step_counts_in_no_group(fused: bool | None) -> None:
    first, second = (torch.ones(3).requires_grad_() for _ in range(2))
    optimizer = SlimAdam([{"params": [first]}, {"params": [second]}], plan=None, fused=fused)
    for _ in range(2):
        first.grad, second.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    first.grad = torch.ones(6)[::2]
    second.data, second.grad = torch.ones(5), torch.ones(5)
    with pytest.raises(RuntimeError, match="replace_param"):
        optimizer.step()
    assert optimizer.state[first]["step"] == 2
