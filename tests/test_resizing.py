"""State of parameters of which rows or columns are reset, dropped or added, beside AdamW's full state treated alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam
from slimadam import state as state_format

SHAPE = (12, 8)
PLANS: dict[str, Any] = {
    "none": None,
    "factored": "factored",
    "rows": CompressionPlan({"w": Rule((1,), "mean")}),
    "columns": CompressionPlan({"w": Rule((0,), "mean")}),
}
MOMENTA = (None, torch.bfloat16, "int8")
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
KEEP = [7, 0, 3, 11]


def both(plan: Any, **options: Any) -> tuple[nn.Parameter, SlimAdam, nn.Parameter, torch.optim.AdamW]:
    """The same parameter under SlimAdam and under AdamW, after five steps on the same gradients."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 96).reshape(SHAPE)) for _ in range(2))
    slim = SlimAdam([("w", ours)], plan=plan, **HYPER, **options)
    adamw = torch.optim.AdamW([theirs], **HYPER)
    for step in range(5):
        advance(slim, ours, step)
        advance(adamw, theirs, step)
    return ours, slim, theirs, adamw


def advance(optimizer: torch.optim.Optimizer, param: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(param.shape, generator=generator)
    param.grad = grad * (1 + torch.arange(param.shape[0])[:, None]) * (1 + torch.arange(param.shape[1])[None, :]) / 20
    optimizer.step()


def full_second_moment(slim: SlimAdam, param: Tensor) -> Tensor:
    rules = [slim.plan["w"]]
    stored = state_format.moments_of(slim.state[param], rules)
    return state_format.expand(stored, rules, tuple(param.shape)).expand(param.shape)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("index", [[2, 5], torch.tensor([2, 5]), slice(2, 6, 3), 3], ids=str)
def test_uncompressed_slices_are_reset_as_adamws(index: Any, dim: int) -> None:
    ours, slim, theirs, adamw = both(None)
    slim.reset_state(ours, index=index, dim=dim)
    rows = torch.arange(SHAPE[dim])[index].reshape(-1)
    for key in ("exp_avg", "exp_avg_sq"):
        adamw.state[theirs][key].index_fill_(dim, rows, 0)
    for step in range(5, 10):
        advance(slim, ours, step)
        advance(adamw, theirs, step)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_mask_and_a_name_will_do() -> None:
    ours, slim, *_ = both(None)
    mask = torch.zeros(SHAPE[0], dtype=torch.bool)
    mask[4] = True
    slim.reset_state("w", mask)
    assert slim.state[ours]["exp_avg"][4].count_nonzero() == 0
    assert slim.state[ours]["exp_avg"].count_nonzero() == 88
    assert slim.state[ours]["step"] == 5


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_a_whole_parameter_starts_anew(plan: str, momentum_dtype: Any) -> None:
    ours, slim, *_ = both(PLANS[plan], momentum_dtype=momentum_dtype)
    slim.reset_state(ours)
    fresh = nn.Parameter(ours.detach().clone())
    beside = SlimAdam([("w", fresh)], plan=PLANS[plan], momentum_dtype=momentum_dtype, **HYPER)
    for step in range(5):
        advance(slim, ours, step)
        advance(beside, fresh, step)
    assert torch.equal(ours, fresh)
    assert slim.state[ours]["step"] == 5


def test_a_gradient_initialised_parameter_starts_at_its_next_gradient() -> None:
    ours, slim, *_ = both("factored", variance_init="gradient")
    slim.reset_state(ours)
    fresh = nn.Parameter(ours.detach().clone())
    beside = SlimAdam([("w", fresh)], plan="factored", variance_init="gradient", **HYPER)
    advance(slim, ours, 1)
    advance(beside, fresh, 1)
    assert torch.equal(ours, fresh)


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize(("plan", "dim"), [("factored", 0), ("factored", 1), ("rows", 0), ("columns", 1)])
def test_compressed_slices_are_the_averages_of_reset_ones(plan: str, dim: int, momentum_dtype: Any) -> None:
    ours, slim, *_ = both(PLANS[plan], momentum_dtype=momentum_dtype)
    before = full_second_moment(slim, ours).clone()
    momentum = state_format.first_moment(slim.state[ours]).clone()
    slim.reset_state(ours, [1, 6], dim)
    others = torch.tensor([row for row in range(SHAPE[dim]) if row not in (1, 6)])
    after = full_second_moment(slim, ours)
    torch.testing.assert_close(after.index_select(dim, others), before.index_select(dim, others))
    assert after.index_select(dim, torch.tensor([1, 6])).count_nonzero() == 0
    stored = state_format.first_moment(slim.state[ours])
    assert stored.index_select(dim, torch.tensor([1, 6])).count_nonzero() == 0
    assert torch.equal(stored.index_select(dim, others), momentum.index_select(dim, others))


@pytest.mark.parametrize(("plan", "dim"), [("rows", 1), ("columns", 0)])
def test_an_average_over_the_reset_slices_is_the_others_too(plan: str, dim: int) -> None:
    ours, slim, *_ = both(PLANS[plan])
    before = slim.state[ours]["exp_avg_sq"].clone()
    slim.reset_state(ours, [1, 6], dim)
    assert torch.equal(slim.state[ours]["exp_avg_sq"], before)


@pytest.mark.parametrize("dim", [0, 1])
def test_uncompressed_parameters_grow_and_shrink_as_adamws(dim: int) -> None:
    ours, slim, theirs, adamw = both(None)
    keep, added = torch.tensor([5, 0, 3]), 2
    new, beside = (nn.Parameter(resized(param, keep, added, dim)) for param in (ours, theirs))
    slim.replace_param(ours, new, keep=keep, added=added, dim=dim)
    state = adamw.state.pop(theirs)
    adamw.param_groups[0]["params"][0] = beside
    adamw.state[beside] = {
        key: resized(value, keep, added, dim) if value.dim() else value for key, value in state.items()
    }
    for step in range(5, 10):
        advance(slim, new, step)
        advance(adamw, beside, step)
    torch.testing.assert_close(new, beside, rtol=0, atol=1e-6)
    assert slim.state[new]["step"] == 10
    assert ours not in slim.state
    assert slim.plan["w"].shape == tuple(new.shape)


def resized(tensor: Tensor, keep: Tensor, added: int, dim: int) -> Tensor:
    chosen = tensor.detach().index_select(dim, keep)
    shape = list(chosen.shape)
    shape[dim] = added
    return torch.cat([chosen, chosen.new_zeros(shape)], dim)


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_compressed_parameters_keep_what_their_slices_had(plan: str, momentum_dtype: Any) -> None:
    ours, slim, *_ = both(PLANS[plan], momentum_dtype=momentum_dtype)
    before = full_second_moment(slim, ours).clone()
    new = nn.Parameter(torch.randn(len(KEEP) + 3, SHAPE[1]))
    slim.replace_param("w", new, keep=KEEP, added=3)
    after = full_second_moment(slim, new)
    torch.testing.assert_close(after[: len(KEEP)], before[KEEP], rtol=1e-5, atol=0)
    if plan != "columns":
        assert after[len(KEEP) :].count_nonzero() == 0
    for step in range(3):
        advance(slim, new, step)
    assert new.isfinite().all()


def test_it_may_grow_while_the_plan_is_measured_and_afterwards() -> None:
    param = nn.Parameter(torch.randn(64, 32))
    optimizer = SlimAdam([("w", param)], plan=AutoPlan(calibration_steps=8, cutoff=0.0), **HYPER)
    for step in range(16):
        advance(optimizer, param, step)
        if step in (3, 12):
            new = nn.Parameter(torch.cat([param.detach(), torch.randn(4, 32)]))
            optimizer.replace_param(param, new, added=4)
            param = new
    assert optimizer.plan["w"].shape == (72, 32)
    assert optimizer.plan.second_moments_saved > 0
    assert optimizer.snr_check().keys() == {"w"}


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda slim, w: slim.reset_state(w, 12), IndexError, r"index=12 does not index dimension 0 .*positions in 0..11"),
    (lambda slim, w: slim.reset_state(w, [True] * 5), IndexError, "does not index dimension 0"),
    (lambda slim, w: slim.reset_state(w, [0], dim=2), IndexError, "dim=2 is no dimension"),
    (lambda slim, w: slim.reset_state("v"), KeyError, "'v' is not a parameter of this optimizer"),
    (lambda slim, w: slim.replace_param(w, torch.zeros(3, 8), keep=[1]), ValueError, r"make a shape of \(1, 8\)"),
    (lambda slim, w: slim.replace_param(w, torch.zeros(12, 8), added=-1), ValueError, "added=-1 must be"),
    (lambda slim, w: slim.replace_param(w, w), ValueError, "is a parameter of this optimizer already"),
    (lambda slim, w: slim.replace_param(w, "w"), TypeError, "new='w' must be a tensor"),
]


@pytest.mark.parametrize(("misuse", "error", "message"), BAD)
def test_misuse_is_told_before_anything_changes(misuse: Any, error: type[Exception], message: str) -> None:
    ours, slim, *_ = both("factored")
    before = {key: value.clone() for key, value in slim.state[ours].items()}
    with pytest.raises(error, match=message):
        misuse(slim, ours)
    assert slim.param_groups[0]["params"][0] is ours
    assert all(torch.equal(slim.state[ours][key], value) for key, value in before.items())
