"""Parts of fused weights whose rows, or whose experts, lie apart in memory, in the implementations that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.kernels.layout import has_gaps, layout, overlap
from slimadam.layers.splits import Part
from slimadam.optim.step import tasks
from tests.reference import first_moment

ROWS = [(0,), (1,), (), "factored"]
EXPERTS = [(1,), (2,), (1, 2), (), "factored"]
CASES = {
    "columns of three": ((12, 21), (12, 21), 1, [5, 9, 7], ROWS),
    "large columns of three": ((190, 600), (190, 600), 1, [200, 200, 200], ROWS),
    "one column each": ((6, 3), (6, 3), 1, [1, 1, 1], ROWS),
    "long rows": ((5, 700), (5, 700), 1, [300, 400], ROWS),
    "experts": ((3, 8, 6), (3, 8, 6), 1, [5, 3], EXPERTS),
    "large experts": ((2, 500, 90), (2, 500, 90), 1, [250, 250], EXPERTS),
    "interleaved heads": ((24, 10), (4, 3, 2, 10), 1, [1, 1, 1], [(2, 3), (3,), ()]),
}
EACH = [(case, dims) for case, (*_, all_dims) in CASES.items() for dims in all_dims]


def _rules(case: str, dims: Any) -> list[Rule]:
    of, view, dim, sizes, _ = CASES[case]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts = [Part(label, of, view, dim, start, size) for label, start, size in zip("abc", starts, sizes, strict=False)]
    if dims == "factored":
        return [Rule(form="factored", shape=part.shape, part=part, batch_dims=len(of) - 2) for part in parts]
    others = [() if number == 1 else dims for number in range(len(parts))]
    return [
        Rule(own, "mean" if own else "full", shape=part.shape, part=part)
        for own, part in zip(others, parts, strict=True)
    ]


def _train(case: str, dims: Any, dtype: torch.dtype, options: dict[str, Any]) -> tuple[list[torch.Tensor], str]:
    generator = torch.Generator().manual_seed(3)
    param = torch.nn.Parameter(torch.randn(CASES[case][0], generator=generator).to(dtype))
    rules = {f"w[{rule.part.label}]": rule for rule in _rules(case, dims) if rule.part is not None}
    optimizer = SlimAdam([("w", param)], plan=CompressionPlan(rules), monitor=False, lr=1e-2, **options)
    for _ in range(4):
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return [param.detach(), first_moment(optimizer.state[param])], optimizer.backend("w")


@pytest.fixture(autouse=True)
def every_slice_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "WORTH_SLICING", 1)


@pytest.mark.parametrize(("case", "dims"), EACH, ids=str)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (torch.float32, {"maximize": True, "max_grad_norm": 0.5}),
        (torch.float32, {"amsgrad": True}),
        (torch.float64, {}),
        (torch.bfloat16, {}),
    ],
    ids=["plain", "clipped", "amsgrad", "float64", "bfloat16"],
)
def test_the_compiled_step_takes_them(case: str, dims: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if dims == "factored" and "amsgrad" in options:
        options = {}
    ours, backend = _train(case, dims, dtype, {"fused": True, **options})
    expected, _ = _train(case, dims, dtype, {"fused": False, **options})
    # In bfloat16 the reference rounds a parameter twice a step, where the compiled step does so once.
    tolerance = {torch.float32: 4e-6, torch.float64: 1e-13, torch.bfloat16: 2**-5}[dtype]
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert backend == ("reference" if case == "one column each" and dims in ((0,), "factored") else "compiled")


@pytest.mark.parametrize("momentum_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("dims", EXPERTS, ids=str)
@pytest.mark.parametrize("fused", [None, True])
def test_experts_one_by_one_with_small_first_moments(dims: Any, momentum_dtype: Any, fused: bool | None) -> None:
    options = {"momentum_dtype": momentum_dtype}
    for case in ("experts", "large experts"):
        ours, _ = _train(case, dims, torch.float32, {"fused": fused, **options})
        expected, _ = _train(case, dims, torch.float32, {"fused": False, **options})
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", EXPERTS, ids=str)
def test_the_default_step_takes_experts_one_by_one(dims: Any) -> None:
    for case in ("experts", "large experts"):
        ours, backend = _train(case, dims, torch.float32, {})
        expected, _ = _train(case, dims, torch.float32, {"fused": False})
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=4e-6, atol=4e-6)
        assert backend == "compiled"


def test_each_expert_is_rounded_at_random_by_itself() -> None:
    param = torch.nn.Parameter(torch.ones(4, 8, 6, dtype=torch.bfloat16))
    rules = {
        f"w[{label}]": Rule((1,), "mean", shape=(4, 4, 6), part=Part(label, (4, 8, 6), (4, 8, 6), 1, 4 * at, 4))
        for at, label in enumerate("ab")
    }
    optimizer = SlimAdam(
        [("w", param)], plan=CompressionPlan(rules), lr=1e-3, fused=True, bf16_stochastic_round=True, weight_decay=0.0
    )  # fmt: skip
    param.grad = torch.ones_like(param)
    optimizer.step()
    rounded = param.detach().float().view(4, 2, 24)
    assert set(rounded.unique().tolist()) == {1.0, 1.0 - 2**-8}
    flat = rounded.reshape(8, 24)
    assert all(not torch.equal(flat[one], flat[other]) for one in range(8) for other in range(one))


def test_what_has_no_equal_distances_is_not_taken() -> None:
    memory = torch.empty(5, 7, 9)
    assert layout(memory[:, :3, :2], [(2,)]) is None
    assert layout(memory.permute(2, 0, 1)[:, :, :3], [(0,)]) is None
    assert layout(torch.empty(6, 1).expand(6, 4), [(0,)]) is None
    assert has_gaps(memory[:, :3, :2])
    assert not has_gaps(memory.permute(2, 0, 1))


def test_parts_of_one_weight_do_not_overlap_but_tied_ones_do() -> None:
    whole = torch.empty(6, 12)
    parts = [whole[:, 4 * number : 4 * number + 4] for number in range(3)]
    after = torch.empty(0).set_(whole.untyped_storage(), 71, (1,))
    assert not overlap(parts)
    assert overlap([*parts, after])
    assert overlap([whole, *parts])
