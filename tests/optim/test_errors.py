"""Wrong uses: each is refused with a message that says what is wrong and what to do, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import slimadam
from slimadam import CompressionPlan, PlanError, Rule, SlimAdam, SNRHistory, SNRRecorder

Use = Callable[[nn.Module], object]


def _with(error: type[Exception], message: str, **options: Any) -> Any:
    """A constructor call on the model with the given options."""
    return _use(error, message, lambda model: SlimAdam(model, **{"plan": None, **options}))


def _use(error: type[Exception], message: str, use: Use) -> Any:
    return pytest.param(use, error, message, id=message[:48])


def _plan(rules: dict[str, Any]) -> CompressionPlan:
    return CompressionPlan(
        {name: rule if isinstance(rule, Rule) else Rule(rule, "mean") for name, rule in rules.items()}
    )


def _measured() -> SNRHistory:
    history = SNRHistory()
    history.record(1, "w", (2, 2), {(0,): 2.0})
    return history


TWO = torch.tensor([0.1, 0.2])
WRONG_USES = [
    # numbers
    _with(ValueError, r"Invalid learning rate: -1 \(lr must be a number >= 0\)", lr=-1),
    _with(ValueError, r"Invalid learning rate: nan \(lr must be", lr=float("nan")),
    _with(TypeError, r"lr='1e-3x' must be a number or a 1-element tensor", lr="1e-3x"),
    _with(TypeError, r"lr=None must be a number", lr=None),
    _with(TypeError, r"lr=True must be a number", lr=True),
    _with(ValueError, r"Tensor lr must be 1-element, not of shape \(2,\)", lr=TWO),
    _with(ValueError, r"Invalid learning rate: -1.0", lr=torch.tensor(-1.0)),
    _with(ValueError, r"Invalid epsilon value: -1e-08 \(eps must be a number >= 0\)", eps=-1e-8),
    _with(ValueError, r"Invalid epsilon value: tiny", eps="tiny"),
    _with(ValueError, r"Invalid weight_decay value: -0.1 \(must be a number >= 0\)", weight_decay=-0.1),
    _with(TypeError, r"weight_decay=None must be a number", weight_decay=None),
    _with(ValueError, r"Invalid beta parameter at index 0: 1.0 \(must be in \[0, 1\)\)", betas=(1.0, 0.9)),
    _with(ValueError, r"Invalid beta parameter at index 1: -0.1", betas=(0.9, -0.1)),
    _with(ValueError, r"betas=0.9 must be a pair \(beta1, beta2\)", betas=0.9),
    _with(ValueError, r"betas=\(0.9, 0.99, 0.999\) must be a pair", betas=(0.9, 0.99, 0.999)),
    _with(TypeError, r"betas\[0\]='high' must be a number", betas=("high", 0.99)),
    _with(ValueError, r"Tensor betas\[1\] must be 1-element", betas=(torch.tensor(0.9), TWO)),
    _with(ValueError, r"betas must be either both floats or both Tensors", betas=(0.9, torch.tensor(0.99))),
    # flags and choices
    _with(TypeError, r"amsgrad='yes' must be True or False", amsgrad="yes"),
    _with(TypeError, r"maximize=2 must be True or False", maximize=2),
    _with(TypeError, r"capturable=None must be True or False", capturable=None),
    _with(TypeError, r"differentiable=0.0 must be True or False", differentiable=0.0),
    _with(TypeError, r"bf16_stochastic_round='on' must be True or False", bf16_stochastic_round="on"),
    _with(TypeError, r"foreach='auto' must be True, False or None", foreach="auto"),
    _with(TypeError, r"fused='auto' must be True, False or None", fused="auto"),
    _with(ValueError, r"variance_init='ones' must be 'zeros' or 'gradient'", variance_init="ones"),
    _with(ValueError, r"momentum_dtype=torch.float16 must be None, torch.float32", momentum_dtype=torch.float16),
    _with(ValueError, r"momentum_dtype='int4' must be", momentum_dtype="int4"),
    _with(RuntimeError, r"momentum_dtype='int8' does not support `differentiable`.*use torch.bfloat16", momentum_dtype="int8", differentiable=True),
    _with(RuntimeError, r"`fused` and `foreach` cannot be `True` together: set one", fused=True, foreach=True),
    _with(RuntimeError, r"`fused` does not support `differentiable`: set one", fused=True, differentiable=True),
    _with(ValueError, r"lr as a Tensor is not supported for capturable=False and foreach=True", lr=TWO[:1], foreach=True),
    # plans
    _with(PlanError, r"plan='ruels' is neither a file nor one of 'auto', 'rules' and 'factored'; did you mean 'rules'", plan="ruels"),
    _with(PlanError, r"plan='missing/plan.json' is neither a file", plan=Path("missing/plan.json")),
    _with(TypeError, r"plan=5 must be None, 'auto', 'rules', 'factored', an AutoPlan, a CompressionPlan or the path", plan=5),
    _with(PlanError, r"'0.wieght' matches no parameter.*did you mean '0.weight'\?", plan=_plan({"0.weight": (1,), "0.wieght": (1,)})),
    _with(PlanError, r"'0.weight': dims=\(2,\) is out of range for shape \(7, 5\); use 0..1", plan=_plan({"0.weight": (2,)})),
    _with(
        PlanError,
        r"'0.weight': the plan is for shape \(5, 7\), the parameter has \(7, 5\).*for_model",
        plan=_plan({"0.weight": Rule((1,), "mean", (5, 7))}),
    ),
    _with(PlanError, r"'0.bias': form='factored' needs two dimensions, the shape is \(7,\)", plan=_plan({"0.bias": Rule(form="factored")})),
    _with(PlanError, r"'0.weight': amsgrad=True has no factored form.*set amsgrad=False", plan="factored", amsgrad=True),
    _with(TypeError, r"model='gpt' must be an nn.Module or None", model="gpt"),
    _use(PlanError, "the plan goes by parameter names, but these parameters have none: pass model=model",
         lambda model: SlimAdam(model.parameters(), plan=_plan({"0.weight": (1,)}))),
    _use(PlanError, "plan='rules' goes by layer role, but these parameters have none",
         lambda model: SlimAdam([torch.ones(3, 4, requires_grad=True)], plan="rules")),
    _use(PlanError, "plan='auto' in a parameter group: 'auto' is for a whole optimizer",
         lambda model: SlimAdam([{"params": model.parameters(), "plan": "auto"}], plan=None)),
    _use(ValueError, "calibration_steps=0 must be an integer >= 1", lambda model: slimadam.AutoPlan(calibration_steps=0)),
    _use(ValueError, "measurements='5' must be an integer", lambda model: slimadam.AutoPlan(measurements="5")),  # type: ignore[arg-type]
    _use(ValueError, "keep='bias' must be a tuple of patterns", lambda model: slimadam.AutoPlan(keep="bias")),  # type: ignore[arg-type]
    # groups
    _use(ValueError, "Invalid learning rate: -2",
         lambda model: SlimAdam([{"params": model.parameters(), "lr": -2}], plan=None)),
    _use(TypeError, "param_group must be a dict",
         lambda model: SlimAdam(model, plan=None).add_param_group([torch.ones(1)])),  # type: ignore[arg-type]
    _use(TypeError, "unexpected keyword argument 'weigth_decay'",
         lambda model: SlimAdam(model, plan=None, weigth_decay=0.1)),  # type: ignore[call-arg]
    _use(KeyError, "'1.weight' is not a parameter of this optimizer; pass one of its tensors, or a name that it knows",
         lambda model: SlimAdam(model, plan=None).backend("1.weight")),
    # measuring
    _use(TypeError, "optimizer must be a torch.optim.Optimizer, not Sequential", lambda model: SNRRecorder(model)),  # type: ignore[arg-type]
    _use(TypeError, "schedule=100 must be callable: step -> bool; see slimadam.every",
         lambda model: SNRRecorder(torch.optim.AdamW(model.parameters()), schedule=100)),  # type: ignore[arg-type]
    _use(ValueError, "interval=0 must be an integer >= 1", lambda model: slimadam.every(0)),
    _use(ValueError, "steps=0 must be an integer >= 1", lambda model: slimadam.calibrate(model, lambda: torch.ones(()), 0)),
    _use(TypeError, "train_step must return the loss as a scalar tensor, not 1.0",
         lambda model: slimadam.calibrate(model, lambda: 1.0, 2)),  # type: ignore[arg-type,return-value]
    _use(ValueError, r"dims=\(2,\): 2 is not a dimension of a 2-dimensional tensor", lambda model: slimadam.snr(torch.ones(2, 2), (2,))),
    _use(ValueError, "the SNR history is empty", lambda model: CompressionPlan.from_snr(SNRHistory())),
    _use(ValueError, "cutoff=-1 must be a number >= 0", lambda model: CompressionPlan.from_snr(SNRHistory(), -1)),
    _use(PlanError, "'w': only form='mean' has dims|'w': form='full' with dims", lambda model: _plan({"w": Rule((1,), "full")})),
    _use(ValueError, "keep=5 must be a list or tuple of patterns", lambda model: CompressionPlan.from_snr(_measured(), keep=5)),  # type: ignore[arg-type]
    _use(ValueError, "keep=None must be a list or tuple of patterns", lambda model: CompressionPlan.from_snr(_measured(), keep=None)),  # type: ignore[arg-type]
    _use(TypeError, "model='gpt' must be an nn.Module, the one that the plan is for",
         lambda model: CompressionPlan.from_rules(model).for_model("gpt")),  # type: ignore[arg-type]
    _use(TypeError, "model=None must be an nn.Module", lambda model: CompressionPlan.factored(None)),  # type: ignore[arg-type]
    _use(ValueError, r"parts=5 must give a slimadam.Split for each pattern",
         lambda model: slimadam.calibrate(model, lambda: torch.ones(()), 1, parts=5)),  # type: ignore[arg-type]
    _use(ValueError, r"sizes=\{1: 4\} must give each part's label", lambda model: slimadam.Split({1: 4})),  # type: ignore[dict-item]
    _use(ValueError, r"sizes=\{'a': True\} must give each part's label", lambda model: slimadam.Split({"a": True})),
    _use(ValueError, "dim='0' must be an integer", lambda model: slimadam.Split({"a": 4}, "0")),  # type: ignore[arg-type]
    _use(ValueError, "dim=False must be an integer", lambda model: slimadam.Split({"a": 4}, False)),
    _use(ValueError, "batch_dims=None must be an integer", lambda model: slimadam.Split({"a": 4}, batch_dims=None)),  # type: ignore[arg-type]
    _use(ValueError, "view=5 must be a tuple of integers", lambda model: slimadam.Split({"a": 4}, view=5)),  # type: ignore[arg-type]
    _use(ValueError, r"view=\(4.0, 2\) must be a tuple of integers", lambda model: slimadam.Split({"a": 4}, view=(4.0, 2))),  # type: ignore[arg-type]
    # state dicts
    _use(TypeError, "plan='rules' must be a CompressionPlan",
         lambda model: slimadam.convert_state_dict(SlimAdam(model).state_dict(), "rules")),  # type: ignore[arg-type]
    _use(TypeError, "state_dict=None must be what an optimizer's state_dict\\(\\) returned",
         lambda model: SlimAdam(model).load_state_dict(None)),  # type: ignore[arg-type]
    _use(TypeError, "state_dict=5 must be what", lambda model: slimadam.convert_state_dict(5, None)),  # type: ignore[arg-type]
    _use(ValueError, "the state dict's 'slimadam' has plan=None; pass what",
         lambda model: SlimAdam(model).load_state_dict({**SlimAdam(model).state_dict(), "slimadam": {"format_version": 1}})),
    _use(PlanError, "'w': dims=\\(1, 1\\) names a dimension twice", lambda model: _plan({"w": (1, 1)})),
]  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len(WRONG_USES) >= 40


@pytest.mark.parametrize(("use", "error", "message"), WRONG_USES)
def test_wrong_use_is_refused_and_changes_nothing(use: Use, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    model[0].weight.grad = torch.ones(7, 5)
    before, hooks = copy.deepcopy(model.state_dict()), len(_global_optimizer_post_hooks)
    with pytest.raises(error, match=message):
        use(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert len(_global_optimizer_post_hooks) == hooks


def test_a_plan_of_positions_says_so_when_saved_and_where_names_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    path = tmp_path / "plan.json"
    SlimAdam(model.parameters(), plan="factored").plan.save(path)
    (record,) = caplog.records
    assert record.name == "slimadam"
    assert record.levelname == "WARNING"
    assert "4 of 4 names are positions (param_groups.0.params.0, ...)" in record.getMessage()
    assert "SlimAdam(model.named_parameters()) or model=model gives real names" in record.getMessage()
    assert SlimAdam(model.parameters(), plan=path).plan["param_groups.0.params.0"].form == "factored"
    with pytest.raises(
        PlanError, match=r"positions such as 'param_groups\.0\.params\.0'.*make it again with model\.named"
    ):
        SlimAdam(model.named_parameters(), plan=path)
    caplog.clear()
    SlimAdam(model.named_parameters(), plan="factored").plan.save(path)
    assert not caplog.records
