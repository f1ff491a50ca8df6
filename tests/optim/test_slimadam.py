"""SlimAdam as a torch optimizer: names, groups, plans, copies, memory, the pending direction."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam
from tests.reference import gradients, second_moments, train

ROWS = CompressionPlan({"0.weight": Rule((1,), "mean"), "2.weight": Rule((0,), "mean")})


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(4, 5, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    "params",
    [
        lambda model: {"params": model},
        lambda model: {"params": model.named_parameters()},
        lambda model: {"params": model.parameters(), "model": model},
        lambda model: {"params": [{"params": list(model.named_parameters())}]},
        lambda model: {
            "params": [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}],
            "model": model,
        },
    ],
)
def test_every_way_of_passing_parameters_finds_the_plan(params: Any) -> None:
    model = _model()
    optimizer = SlimAdam(**params(model), plan=ROWS)
    _step(model, optimizer)
    assert optimizer.state[model[0].weight]["exp_avg_sq"].shape == (7, 1)
    assert optimizer.state[model[2].weight]["exp_avg_sq"].shape == (1, 7)
    assert optimizer.state[model[0].bias]["exp_avg_sq"].shape == (7,)
    assert optimizer.plan["0.weight"].dims == (1,)
    assert list(optimizer.plan) == [name for name, _ in model.named_parameters()]


def test_plan_from_path_rules_and_factored(tmp_path: Path) -> None:
    model = _model()
    ROWS.save(tmp_path / "plan.json")
    for plan in (str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        assert SlimAdam(model, plan=plan).plan["2.weight"].dims == (0,)
    assert SlimAdam(model.parameters(), plan="factored").plan["param_groups.0.params.0"].form == "factored"
    named = [
        ("h.0.attn.q_proj.weight", nn.Parameter(torch.randn(4, 4))),
        ("h.0.mlp.x", nn.Parameter(torch.randn(3, 4))),
    ]
    by_name = SlimAdam(named, plan="rules").plan
    assert by_name["h.0.attn.q_proj.weight"].dims == (1,)
    assert by_name["h.0.mlp.x"].form == "full"


def test_groups_may_have_their_own_plan_and_options() -> None:
    model = _model()
    optimizer = SlimAdam(
        [
            {"params": model[0].named_parameters(), "plan": "factored", "lr": 0.5, "betas": (0.5, 0.6)},
            {"params": [("bias", model[2].bias)], "variance_init": "gradient"},
        ],
        plan=None,
    )
    optimizer.add_param_group(
        {"params": [("out", model[2].weight)], "plan": CompressionPlan({"out": Rule((0,), "mean")})}
    )
    _step(model, optimizer)
    assert [tuple(part.shape) for part in second_moments(optimizer.state[model[0].weight])] == [(7, 1), (1, 5)]
    assert optimizer.state[model[2].weight]["exp_avg_sq"].shape == (1, 7)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert "plan" not in optimizer.param_groups[0]


def test_failed_add_param_group_changes_nothing() -> None:
    model = _model()
    optimizer = SlimAdam(model[0].named_parameters(), plan=None)
    before = optimizer.plan
    for group in (
        {"params": [("w", model[2].weight)], "plan": CompressionPlan({"v": Rule()})},
        {"params": [("w", model[2].weight)], "plan": CompressionPlan({"w": Rule((3,), "mean")})},
        {"params": [("w", model[2].weight)], "lr": -1.0},
        {"params": [("w", model[2].weight)], "max_grad_norm": 1.0},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert optimizer.plan == before
        assert len(optimizer.param_groups) == 1


def test_a_parameter_the_plan_does_not_cover_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slimadam"):
        optimizer = SlimAdam(_model(), plan=CompressionPlan({"0.weight": Rule((1,), "mean")}))
    assert len(caplog.records) == 1
    assert "2.weight" in caplog.text
    assert optimizer.plan["2.weight"].reason == "not in the plan"


def test_part_of_a_model_takes_the_whole_models_plan() -> None:
    model = _model()
    optimizer = SlimAdam(model[2].parameters(), plan=ROWS, model=model)
    assert optimizer.plan["2.weight"].dims == (0,)
    with pytest.raises(PlanError, match=r"'0.weight' matches no parameter.*pass model=model"):
        SlimAdam([("2.weight", model[2].weight)], plan=ROWS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_train_on_as_the_original(copied: Any) -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=ROWS)
    _step(model, optimizer)
    model_copy, optimizer_copy = copied((model, optimizer))
    assert optimizer_copy.plan == optimizer.plan
    losses = [[_step(*pair, seed) for seed in range(3)] for pair in ((model, optimizer), (model_copy, optimizer_copy))]
    assert losses[0] == losses[1]
    assert "SlimAdam" in repr(optimizer_copy)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("plan", [None, "factored", ROWS], ids=["none", "factored", "rows"])
def test_memory_is_known_before_the_first_step(plan: Any, momentum_dtype: Any, amsgrad: bool) -> None:
    if plan == "factored" and amsgrad:
        plan = ROWS
    model = _model()
    optimizer = SlimAdam(model, plan=plan, amsgrad=amsgrad, momentum_dtype=momentum_dtype)
    before = optimizer.memory()
    _step(model, optimizer)
    counted = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"), 0)
    for state in optimizer.state.values():
        for key, value in state.items():
            counted[re.sub("_(row|col)$", "", key)] += value.numel() * value.element_size()
    assert {key: before[key] for key in counted} == counted
    assert before.total == before["total"] == sum(counted.values())
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert before.second_moments_saved == pytest.approx(1 - counted["exp_avg_sq"] / 4 / elements)
    assert before.bytes_per_parameter == pytest.approx(before.total / elements)
    adamw = torch.optim.AdamW(model.parameters(), amsgrad=amsgrad)
    _step(model, adamw)
    assert before.adamw_total == sum(
        tensor.numel() * tensor.element_size() for state in adamw.state.values() for tensor in state.values()
    )


def test_memory_leaves_out_what_is_frozen() -> None:
    model = _model()
    frozen, *trained = model.parameters()
    frozen.requires_grad_(False)
    optimizer = SlimAdam(model, plan="factored")
    before = optimizer.memory()
    _step(model, optimizer)
    assert frozen not in optimizer.state
    assert before.adamw_total == sum(2 * param.nbytes + 4 for param in trained)
    assert optimizer.memory() == before
    frozen.requires_grad_(True)
    assert optimizer.memory().adamw_total == before.adamw_total + 2 * frozen.nbytes + 4


def test_samples_of_frozen_weights_cost_nothing() -> None:
    layers = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    layers[0].requires_grad_(False)
    both = SlimAdam(layers, plan="factored").memory().monitor
    layers[0].requires_grad_(True)
    assert 2 * both == SlimAdam(layers, plan="factored").memory().monitor > 0


def test_repr_tells_the_plan() -> None:
    model = _model()
    optimizer = SlimAdam(model, plan=AutoPlan(calibration_steps=2, cutoff=0.0))
    _step(model, optimizer)
    assert "plan: auto, measures for 2 steps as AdamW, 1 of them done\n)" in repr(optimizer)
    _step(model, optimizer)
    assert repr(optimizer).endswith(f"plan: {optimizer.plan!r}\n)")


def test_memory_is_printed_in_words() -> None:
    weight = nn.Parameter(torch.zeros(1000, 500))
    printed = str(SlimAdam([("weight", weight)], plan="factored", momentum_dtype=torch.bfloat16).memory())
    assert printed.startswith("optimizer state 1.01 MB (AdamW 4 MB), 2.01 bytes per parameter: ")
    assert "first moments 1 MB, second moments 6 kB; 99.70% of the elements of AdamW's second moments saved" in printed
    in_full = str(SlimAdam([nn.Parameter(torch.zeros(3))], amsgrad=True).memory())
    assert in_full.endswith(
        "first moments 12 B, second moments 12 B, maxima 12 B; 0.00% of the elements of AdamW's second moments saved"
    )


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"plan": ROWS},
        {"plan": "factored", "maximize": True},
        {"plan": None, "amsgrad": True, "variance_init": "gradient"},
        {"plan": ROWS, "momentum_dtype": torch.bfloat16, "weight_decay": 0.0},
    ],
    ids=["rows", "factored", "gradient", "bf16"],
)
def test_update_direction_is_the_step_that_follows(options: dict[str, Any], steps_before: int) -> None:
    model = _model()
    optimizer = SlimAdam(model, **{"lr": 1e-2, "weight_decay": 0.3, **options})
    for seed in range(steps_before):
        _step(model, optimizer, seed)
    model(torch.randn(4, 5)).square().mean().backward()
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    directions = list(optimizer.update_direction())
    assert [id(parameter) for parameter, _ in directions] == [id(parameter) for parameter in model.parameters()]
    assert str(optimizer.state_dict()) == str(state)
    optimizer.step()
    for before, (parameter, direction) in zip(parameters, directions, strict=True):
        torch.testing.assert_close(parameter.detach(), before - 1e-2 * direction, rtol=2e-6, atol=1e-7)


def test_parameters_without_gradient_are_left_alone() -> None:
    model = _model()
    model[0].weight.requires_grad_(False)
    optimizer = SlimAdam(model, plan=ROWS)
    frozen, unused = model[0].weight.clone(), nn.Parameter(torch.randn(2, 2))
    optimizer.add_param_group({"params": [("unused", unused)], "plan": None})
    _step(model, optimizer)
    assert torch.equal(model[0].weight, frozen)
    assert not optimizer.state[unused]
    model[0].weight.requires_grad_(True)
    _step(model, optimizer)
    assert optimizer.state[model[0].weight]["step"] == 1
    assert optimizer.state[model[2].weight]["step"] == 2


def test_sparse_gradient_is_refused_before_anything_moves() -> None:
    embedding, linear = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)
    optimizer = SlimAdam([*linear.parameters(), *embedding.parameters()], plan=None)
    before = [parameter.clone() for parameter in linear.parameters()]
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"'param_groups.0.params.2': .*sparse gradients.*SparseAdam"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, linear.parameters(), strict=True))
    assert not any(optimizer.state.values())


def test_hooks_fire_once_and_closure_is_evaluated() -> None:
    model = _model()
    optimizer, seen = SlimAdam(model, plan=ROWS), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        seen.append("closure")
        return loss

    assert isinstance(optimizer.step(closure), Tensor)  # type: ignore[arg-type]
    assert seen == ["pre", "closure", "post"]


def test_tied_weights_are_updated_once() -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    plan = CompressionPlan({"embedding.weight": Rule((1,), "mean"), "head.weight": Rule((1,), "mean")})
    optimizer = SlimAdam(model, plan=plan)
    head(embedding(torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    assert list(optimizer.plan) == ["embedding.weight"]
    assert optimizer.state[embedding.weight]["step"] == 1


@pytest.mark.parametrize("lr", [torch.tensor(1e-2), torch.tensor([1e-2])])
@pytest.mark.parametrize("implementation", [{}, {"foreach": False}], ids=str)
def test_tensor_learning_rate_and_betas(lr: Tensor, implementation: dict[str, Any]) -> None:
    grads = [[grad] for grad in gradients((4, 3), 4)]
    start = [torch.randn(4, 3)]
    plan = CompressionPlan({"w": Rule((1,), "mean")})
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    with_tensors, _ = train(
        start, lambda p: SlimAdam([("w", p[0])], lr=lr, betas=betas, plan=plan, **implementation), grads
    )
    with_numbers, _ = train(start, lambda p: SlimAdam([("w", p[0])], lr=1e-2, betas=(0.8, 0.95), plan=plan), grads)
    torch.testing.assert_close(with_tensors[0], with_numbers[0], rtol=1e-5, atol=1e-7)


def test_stochastic_rounding_is_unbiased_and_repeats() -> None:
    # 1 + 2**-10 lies an eighth of the way between two bfloat16 neighbours, 1 and 1 + 2**-7.
    n = 1_000_000
    runs = []
    for _ in range(2):
        param = torch.ones(n, dtype=torch.bfloat16).requires_grad_()
        param.grad = torch.full((n,), -1.0, dtype=torch.bfloat16)
        SlimAdam([param], lr=2**-10, weight_decay=0.0, eps=0.0, bf16_stochastic_round=True, plan=None).step()
        runs.append(param.detach().double())
    assert torch.equal(*runs)
    assert set(runs[0].unique().tolist()) == {1.0, 1 + 2**-7}
    standard_error = 2**-7 * (0.125 * 0.875 / n) ** 0.5
    assert abs(runs[0].mean().item() - (1 + 2**-10)) < 3 * standard_error


def test_fused_true_refuses_complex_parameters() -> None:
    param = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    param.grad = torch.ones_like(param)
    complex_fused = SlimAdam([("0", param)], plan=None, fused=True)
    with pytest.raises(RuntimeError, match="'0': `fused=True` requires all the params to be floating point"):
        complex_fused.step()


def test_failed_group_can_be_added_again_under_its_name() -> None:
    optimizer = SlimAdam([("a", nn.Parameter(torch.randn(4, 4)))], plan=None)
    weight = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(PlanError, match="'zzz' matches no parameter"):
        optimizer.add_param_group({"params": [("b", weight)], "plan": CompressionPlan({"zzz": Rule((0,), "mean")})})
    optimizer.add_param_group({"params": [("b", weight)], "plan": CompressionPlan({"b": Rule((0,), "mean")})})
    assert optimizer.plan["b"].dims == (0,)


def test_groups_can_be_added_to_a_copy() -> None:
    original = SlimAdam([("a", nn.Parameter(torch.randn(4, 4)))], plan=CompressionPlan({"a": Rule((0,), "mean")}))
    copied = copy.deepcopy(original)
    copied.add_param_group({"params": [("c", nn.Parameter(torch.randn(3, 2)))]})
    copied.add_param_group({"params": [("a", nn.Parameter(torch.randn(5, 2)))], "plan": None})
    assert [rule.shape for rule in copied.plan.values()] == [(4, 4), (3, 2), (5, 2)]
    assert len(original.param_groups) == 1


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
@pytest.mark.parametrize("plan", [None, "factored"])
def test_any_shape_goes_to_adamw_and_back(shape: tuple[int, ...], plan: Any) -> None:
    param = nn.Parameter(torch.ones(shape))
    optimizer = SlimAdam([param], plan=plan)
    param.grad = torch.ones(shape)
    optimizer.step()
    adamw = torch.optim.AdamW([param])
    adamw.load_state_dict(optimizer.adamw_state_dict())
    assert adamw.state[param]["exp_avg_sq"].shape == torch.Size(shape)
    optimizer.load_state_dict(adamw.state_dict())


def test_reordered_and_removed_groups_keep_their_rules() -> None:
    p, q = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))
    plan = CompressionPlan({"a": Rule((0,), "mean"), "b": Rule((1,), "mean")})
    optimizer = SlimAdam([{"params": [("a", p)]}, {"params": [("b", q)]}], plan=plan)
    for param in (p, q):
        param.grad = torch.randn(5, 5)
    optimizer.step()
    optimizer.param_groups.reverse()
    optimizer.step()
    assert list(optimizer.plan.items()) == [("b", optimizer.plan["b"]), ("a", optimizer.plan["a"])]
    assert [optimizer.state[param]["exp_avg_sq"].shape for param in (p, q)] == [(1, 5), (5, 1)]
    optimizer.param_groups.pop()
    optimizer.step()
    assert list(optimizer.plan) == ["b"]
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (2, 3)


def test_stochastic_rounding_differs_between_groups() -> None:
    params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SlimAdam(
        [{"params": [param]} for param in params], lr=2**-10, weight_decay=0.0, bf16_stochastic_round=True, plan=None
    )
    for param in params:
        param.grad = torch.full_like(param, -1.0)
    optimizer.step()
    assert not torch.equal(*params)
