"""Check that what is measured is right: steps against the formula, loaded moments bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW

from benchmarks.gpu.training import GPT2, TrainingSettings
from benchmarks.harness import exactness
from benchmarks.peak.scenarios import STEPS, Make
from benchmarks.workloads.shapes import ODD_MODEL
from benchmarks.workloads.skeleton import skeleton
from slimadam import SlimAdam
from slimadam.state import second_moment


def steps_are_right(device: str) -> float:
    """Return the largest error of steps against float64, as a share of what rounding explains.

    Raises:
        WrongStepError: An error is larger.
    """
    plans: tuple[tuple[str, dict[str, Any]], ...] = (
        ("rules", {}),
        ("factored", {}),
        ("rules", {"momentum_dtype": "int8"}),
    )
    return max(exactness.run(skeleton(ODD_MODEL, device), plan, options=options).worst for plan, options in plans)


def check_loading(make: Make, settings: TrainingSettings, device: str) -> None:
    """Check that AdamW's checkpoint loaded over a state is averaged bit by bit as the plan says.

    Args:
        make: Makes the optimizer, one of ours.
        settings: Size of the model.
        device: Device of the model.

    Raises:
        WrongStepError: Names the parameter.
    """
    model = GPT2(settings).to(device)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    adamw, optimizer = AdamW(model.parameters()), make(model)
    adamw.step()
    for _ in range(STEPS):
        optimizer.step()
    assert isinstance(optimizer, SlimAdam)
    optimizer.load_state_dict(adamw.state_dict())
    plan = optimizer.plan
    for name, param in model.named_parameters():
        rules = [plan[key] for key in plan.keys_of(name)]
        wanted = second_moment.average(adamw.state[param]["exp_avg_sq"], rules)
        found = second_moment.moments_of(optimizer.state[param], rules)
        if len(wanted) != len(found) or not all(map(torch.equal, wanted, found)):
            raise exactness.WrongStepError(f"{name}: the loaded second moment is not the average of AdamW's")
