"""State of parameters of which rows or columns are reset, dropped or added, beside AdamW's full state treated alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, PlanError, Rule, SlimAdam
from slimadam.state import second_moment
from slimadam.state.first_moment import stored_first_moment

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
    grad = grad * (1 + torch.arange(param.shape[0])[:, None]) * (1 + torch.arange(param.shape[1])[None, :]) / 20
    param.grad = grad.to(param.dtype)
    optimizer.step()


def full_second_moment(slim: SlimAdam, param: Tensor) -> Tensor:
    rules = [slim.plan["w"]]
    stored = second_moment.moments_of(slim.state[param], rules)
    return second_moment.expand(stored, rules, tuple(param.shape)).expand(param.shape)


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
    momentum = stored_first_moment(slim.state[ours]).clone()
    slim.reset_state(ours, [1, 6], dim)
    others = torch.tensor([row for row in range(SHAPE[dim]) if row not in (1, 6)])
    after = full_second_moment(slim, ours)
    torch.testing.assert_close(after.index_select(dim, others), before.index_select(dim, others))
    assert after.index_select(dim, torch.tensor([1, 6])).count_nonzero() == 0
    stored = stored_first_moment(slim.state[ours])
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
    (lambda slim, w: slim.reset_state(w, [0], dim=2), IndexError, r"dim=2 is no dimension .*; pass one of -2..1"),
    (lambda slim, w: slim.reset_state(w, True), IndexError, "index=True does not index dimension 0"),
    (lambda slim, w: slim.reset_state(w, [[0], [1]]), IndexError, r"index=\[\[0\], \[1\]\] does not index dimension 0"),
    (
        lambda slim, w: slim.reset_state(w, torch.zeros(2, 2, dtype=torch.int64)),
        IndexError,
        "does not index dimension 0",
    ),
    (lambda slim, w: slim.reset_state(w, [0.5]), IndexError, r"index=\[0.5\] does not index dimension 0"),
    (
        lambda slim, w: slim.reset_state("w[query]"),
        KeyError,
        r"'w\[query\]' is a part of a parameter; pass all of it, 'w'",
    ),
    (
        lambda slim, w: slim.replace_param(w, torch.zeros(12, 8).to_sparse()),
        ValueError,
        "'w': new is .*torch.sparse_coo",
    ),
    (lambda slim, w: slim.replace_param(w, torch.zeros(12, 8, device="meta")), ValueError, "'w': new is .* on meta"),
    (
        lambda slim, w: slim.replace_param(w, torch.zeros(12, 8).long()),
        ValueError,
        "'w': new is torch.int64 .*floating",
    ),
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


def test_a_row_of_codes_that_a_nan_has_reached_is_cured() -> None:
    """AdamW with the rows of its state zeroed trains on; so does an 8-bit first moment, whose blocks are rows here."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1024).reshape(4, 256)) for _ in range(2))
    slim = SlimAdam([("w", ours)], plan=None, momentum_dtype="int8", **HYPER)
    adamw = torch.optim.AdamW([theirs], **HYPER)
    for step in range(4):
        grad = torch.randn((4, 256), generator=torch.Generator().manual_seed(step))
        if step == 1:
            grad[1] = torch.nan
        for param, optimizer in ((ours, slim), (theirs, adamw)):
            param.grad = grad.clone()
            optimizer.step()
            if step == 1:
                with torch.no_grad():
                    param[1] = 0.0
        if step == 1:
            others = slim.state[ours]["exp_avg_codes"][[0, 2, 3]].clone()
            slim.reset_state(ours, [1])
            assert torch.equal(slim.state[ours]["exp_avg_codes"][[0, 2, 3]], others)
            assert (slim.state[ours]["exp_avg_scale"] > 0).tolist() == [True, False, True, True]
            for key in ("exp_avg", "exp_avg_sq"):
                adamw.state[theirs][key][1] = 0.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("columns", [100, 300])
@pytest.mark.parametrize("found", [[1], [1, 5]], ids=str)
def test_a_block_of_codes_with_a_nan_is_reset_as_a_whole(found: list[int], columns: int) -> None:
    """Rows that share it train on; a NaN in a block without rows that are reset stays."""
    param = nn.Parameter(torch.ones(12, columns))
    slim = SlimAdam([("w", param)], plan=None, momentum_dtype="int8")
    param.grad = torch.randn(12, columns)
    param.grad[[1, 5]] = torch.nan
    slim.step()
    with torch.no_grad():
        param[found] = 0.0
    slim.reset_state(param, found)
    param.grad = torch.randn(12, columns)
    slim.step()
    is_nan = param.isnan().any(1)
    assert not is_nan[:2].any()
    assert not is_nan[8:].any()
    assert bool(is_nan.any()) is (5 not in found)


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("index", [[], (), torch.tensor([]), torch.tensor([], dtype=torch.int64), slice(0, 0)], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_no_slices_are_none(plan: str, index: Any, momentum_dtype: Any) -> None:
    ours, slim, *_ = both(PLANS[plan], momentum_dtype=momentum_dtype)
    before = {key: value.clone() for key, value in slim.state[ours].items()}
    slim.reset_state(ours, index)
    for key, value in before.items():
        torch.testing.assert_close(slim.state[ours][key], value, rtol=1e-6, atol=0)
    new = nn.Parameter(torch.ones(5, 8))
    slim.replace_param(ours, new, keep=index, added=5)
    assert stored_first_moment(slim.state[new]).count_nonzero() == 0
    assert slim.state[new]["step"] == 5
    advance(slim, new, 1)
    empty = nn.Parameter(torch.ones(0, 8))
    slim.replace_param(new, empty, keep=index)
    empty.grad = torch.ones(0, 8)
    slim.step()
    assert all(bool(value.isfinite().all()) for value in slim.state[empty].values())
    grown = nn.Parameter(torch.ones(2, 8))
    slim.replace_param(empty, grown, added=2)
    advance(slim, grown, 1)
    assert grown.isfinite().all()


def test_slices_may_be_kept_twice_as_where_neurons_are_split() -> None:
    ours, slim, theirs, adamw = both(None)
    keep = [0, 3, 3, 11, 0]
    slim.replace_param(ours, new := nn.Parameter(ours.detach()[keep]), keep=keep)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(slim.state[new][key], adamw.state[theirs][key][keep])


@pytest.mark.parametrize("plan", [None, "factored", "auto"], ids=str)
def test_scalars_are_replaced_and_reset(plan: Any) -> None:
    ours, theirs = (nn.Parameter(torch.tensor(0.5)) for _ in range(2))
    slim, adamw = SlimAdam([("w", ours)], plan=plan), torch.optim.AdamW([theirs])
    for param, optimizer in ((ours, slim), (theirs, adamw)):
        param.grad = torch.tensor(2.0)
        optimizer.step()
    new = nn.Parameter(torch.tensor(0.25))
    slim.replace_param(ours, new)
    for key, value in adamw.state[theirs].items():
        torch.testing.assert_close(slim.state[new][key], value)
    slim.reset_state(new, [0])
    assert slim.state[new]["exp_avg"] == 0
    assert slim.state[new]["step"] == 1
    new.grad = torch.tensor(1.0)
    slim.step()
    for misuse in ({"added": 1}, {"keep": []}, {"dim": 1}):
        with pytest.raises((ValueError, IndexError), match=r"of shape \(\)|kept of \(\)"):
            slim.replace_param(new, nn.Parameter(torch.tensor(1.0)), **misuse)  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum_dtype", MOMENTA, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_state_takes_the_precision_of_what_replaces(plan: str, dtype: torch.dtype, momentum_dtype: Any) -> None:
    ours, slim, *_ = both(PLANS[plan], momentum_dtype=momentum_dtype)
    before = full_second_moment(slim, ours).clone()
    new = nn.Parameter(ours.detach().to(dtype))
    slim.replace_param(ours, new)
    fresh = SlimAdam(
        [("w", beside := nn.Parameter(new.detach().clone()))], plan=PLANS[plan], momentum_dtype=momentum_dtype
    )
    advance(fresh, beside, 1)
    found = {key: (value.dtype, value.device) for key, value in slim.state[new].items()}
    assert found == {key: (value.dtype, value.device) for key, value in fresh.state[beside].items()}
    torch.testing.assert_close(full_second_moment(slim, new).float(), before, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(1)
    new.grad = torch.randn(SHAPE, generator=generator).to(dtype)
    slim.step()
    assert new.isfinite().all()


@pytest.mark.parametrize(("before", "after"), [((8, 1), (8, 300)), ((1, 8), (300, 8)), ((1, 64, 3, 3), (32, 64, 3, 3))])
@pytest.mark.parametrize("by_hand", [False, True])
def test_what_the_size_decides_is_decided_anew(before: Any, after: Any, by_hand: bool) -> None:
    dim = next(index for index, size in enumerate(before) if size != after[index])
    old, new = nn.Parameter(torch.randn(before)), nn.Parameter(torch.randn(after))
    optimizer = SlimAdam([("w", old)], plan="factored")
    old.grad = torch.randn(before)
    optimizer.step()
    full = (
        optimizer.state[old]["exp_avg_sq"]
        if "exp_avg_sq" in optimizer.state[old]
        else full_second_moment(optimizer, old)
    )
    if by_hand:
        optimizer.state.pop(old)
        optimizer.param_groups[0]["params"][0] = new
    else:
        optimizer.replace_param(old, new, added=after[dim] - before[dim], dim=dim)
    fresh = SlimAdam([("w", nn.Parameter(new.detach().clone()))], plan="factored")
    assert [rule.storage for rule in optimizer.plan.values()] == [rule.storage for rule in fresh.plan.values()]
    assert optimizer.memory() == fresh.memory()
    if not by_hand:
        kept = full_second_moment(optimizer, new).narrow(dim, 0, before[dim])
        torch.testing.assert_close(kept, full, rtol=1e-4, atol=0)
        fresh.load_state_dict(optimizer.state_dict())
    new.grad = torch.randn(after)
    optimizer.step()
    assert new.isfinite().all()
    back = nn.Parameter(torch.randn(before))
    optimizer.replace_param(new, back, keep=[0] if before[dim] == 1 else None, dim=dim)
    assert (
        optimizer.plan["w"].form == SlimAdam([("w", nn.Parameter(torch.randn(before)))], plan="factored").plan["w"].form
    )


def test_what_the_papers_rule_leaves_out_as_too_small_it_averages_once_it_has_grown() -> None:
    old, new = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.randn(8, 4))
    optimizer = SlimAdam([("layers.0.self_attn.q_proj.weight", old)], plan="rules")
    assert optimizer.plan["layers.0.self_attn.q_proj.weight"].form == "full"
    old.grad = torch.randn(8, 1)
    optimizer.step()
    before = optimizer.state[old]["exp_avg_sq"].clone()
    optimizer.replace_param(old, new, added=3, dim=1)
    assert optimizer.plan["layers.0.self_attn.q_proj.weight"].dims == (1,)
    torch.testing.assert_close(optimizer.state[new]["exp_avg_sq"], before)


def test_what_becomes_a_matrix_under_amsgrad_is_refused_as_by_a_fresh_optimizer() -> None:
    old = nn.Parameter(torch.randn(8, 1))
    optimizer = SlimAdam([("w", old)], plan="factored", amsgrad=True)
    with pytest.raises(PlanError, match="'w': amsgrad=True has no factored form"):
        optimizer.replace_param(old, nn.Parameter(torch.randn(8, 300)), added=299, dim=1)
    assert optimizer.param_groups[0]["params"][0] is old
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.randn(8, 300))
    with pytest.raises(PlanError, match="'w': amsgrad=True has no factored form"):
        optimizer.step()


@pytest.mark.parametrize("plan", [None, "factored"], ids=str)
def test_every_place_of_a_parameter_is_taken_also_in_a_tuple(plan: Any) -> None:
    old, other = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    optimizer = SlimAdam([old, other], plan=plan)
    optimizer.param_groups[0]["params"] = (old, other, old)
    old.grad = torch.randn(8, 8)
    optimizer.step()
    before = optimizer.state[old]["exp_avg"].clone()
    new = nn.Parameter(torch.randn(9, 8))
    optimizer.replace_param(old, new, added=1)
    assert [param is new for param in optimizer.param_groups[0]["params"]] == [True, False, True]
    assert old not in optimizer.state
    torch.testing.assert_close(optimizer.state[new]["exp_avg"][:8], before)
    new.grad = torch.randn(9, 8)
    optimizer.step()


def test_users_keys_are_carried_over_and_stay_when_all_is_reset() -> None:
    for options in ({}, {"variance_init": "gradient"}):
        ours, slim, *_ = both("factored", **options)
        slim.state[ours]["mine"] = "kept"
        slim.reset_state(ours)
        new = nn.Parameter(torch.ones(SHAPE))
        slim.replace_param(ours, new)
        assert slim.state[new]["mine"] == "kept"
        advance(slim, new, 1)
        assert slim.state[new]["step"] == 1


def test_a_fused_weight_says_that_its_parts_are_the_reason() -> None:
    attention = nn.MultiheadAttention(8, 2)
    optimizer = SlimAdam(attention, plan="factored")
    weight = attention.in_proj_weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = optimizer.state[weight]
    with pytest.raises(RuntimeError, match=r"'in_proj_weight': .*one for each of its parts \(query, key, value\)"):
        optimizer.replace_param(weight, nn.Parameter(torch.ones(27, 8)), added=3)
    assert optimizer.state[weight] is before
    with pytest.raises(KeyError, match=r"'in_proj_weight\[query\]' is a part of a parameter"):
        optimizer.reset_state("in_proj_weight[query]")
