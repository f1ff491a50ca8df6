"""Second moments from one form to another, without more copies than are needed, and to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimadam import Rule
from slimadam.kernels import float8
from slimadam.layers.splits import Part
from slimadam.state import second_moment

SHAPE = (6, 5)
RULES: dict[str, list[Rule]] = {
    "full": [Rule(shape=SHAPE)],
    "mean": [Rule((1,), "mean", SHAPE)],
    "factored": [Rule(form="factored", shape=SHAPE)],
    "codes": [Rule(form="float8", shape=SHAPE)],
    "parts": [
        Rule(form="factored", shape=(2, 5), part=Part("query", SHAPE, SHAPE, 0, 0, 2)),
        Rule(shape=(4, 5), part=Part("value", SHAPE, SHAPE, 0, 2, 4)),
    ],
    "columns": [
        Rule(form="float8", shape=(6, 2), part=Part("query", SHAPE, SHAPE, 1, 0, 2)),
        Rule(form="factored", shape=(6, 3), part=Part("value", SHAPE, SHAPE, 1, 2, 3)),
    ],
}


def _full(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, dtype=dtype).square_()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_expanded_in_place_is_what_the_forms_stand_for(rules: list[Rule], dtype: torch.dtype) -> None:
    stored = second_moment.average(_full(dtype), rules)
    expanded = second_moment.expand(stored, rules, SHAPE)
    for rule, own in zip(rules, second_moment.by_rule(rules, stored), strict=True):
        assert torch.equal(rule.take(expanded), rule.stored_as.expand(own, 2).expand(rule.shape or ()).to(dtype))


def test_complex_rows_and_columns_expand_part_by_part() -> None:
    rules = RULES["factored"]
    full = torch.complex(_full(), _full())
    stored = second_moment.average(full, rules)
    expanded = second_moment.expand(stored, rules, SHAPE)
    for part in ("real", "imag"):
        rows, columns = (getattr(one, part) for one in stored)
        torch.testing.assert_close(getattr(expanded, part), rows * columns / rows.mean())


@pytest.mark.parametrize("after", RULES)
@pytest.mark.parametrize("before", RULES)
def test_converting_is_expanding_and_averaging(before: str, after: str) -> None:
    stored = second_moment.average(_full(), RULES[before])
    kept = [one.clone() for one in stored]
    expected = second_moment.average(second_moment.expand(stored, RULES[before], SHAPE), RULES[after])
    found = second_moment.converted(stored, RULES[before], RULES[after], SHAPE)
    assert all(map(torch.equal, found, expected))
    assert [one.shape for one in found] == [one.shape for one in expected]
    addresses = {one.untyped_storage().data_ptr() for one in stored}
    assert addresses.isdisjoint(one.untyped_storage().data_ptr() for one in found)
    assert all(map(torch.equal, stored, kept))


def test_a_transposed_moment_is_averaged_in_the_order_of_rows() -> None:
    full = torch.randn(300, 700).square_().T
    rules = [Rule((1,), "mean", (700, 300))]
    (found,) = second_moment.converted([full], [Rule(shape=(700, 300))], rules, (700, 300))
    assert torch.equal(found, full.contiguous().mean(1, keepdim=True))


def test_all_of_a_moment_is_itself_where_it_need_not_be_kept() -> None:
    full = _full()
    assert second_moment.average(full, RULES["full"], keep=False)[0] is full
    assert second_moment.average(full, RULES["full"])[0] is not full
    (part,) = second_moment.average(full, RULES["parts"][1:], keep=False)
    assert part.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()
    assert not second_moment.is_whole([replace(RULES["full"][0], form="float8")])


@pytest.mark.parametrize("layout", ["rows", "columns", "one long row"])
def test_large_codes_are_decoded_in_blocks_alike(layout: str, monkeypatch: Any) -> None:
    codes = torch.randint(0, 256, (37, 64), dtype=torch.uint8)
    codes = {"rows": codes, "columns": codes.T, "one long row": codes.reshape(1, -1)}[layout]
    at_once = float8.decode(codes)
    monkeypatch.setattr(float8, "_DECODED_AT_ONCE", 200)
    blocks = float8.decode(codes)
    assert torch.equal(blocks, at_once)
    assert blocks.stride() == at_once.stride()
    wide = float8.decode_to(torch.empty(codes.shape, dtype=torch.float64), codes)
    assert torch.equal(wide, at_once.double())
