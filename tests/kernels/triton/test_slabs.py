"""The order of the work of ``update_spread``, and its results where tensors fall into many slabs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only installed on Linux")

import slimadam.kernels.triton.launch as launch
import slimadam.kernels.triton.slabs as slabs
from slimadam.kernels.interface import Dims, Hyperparameters
from slimadam.kernels.triton import kernels
from slimadam.kernels.triton.tiling import Tiling, tiling
from tests.kernels.triton.test_launch import _assert_agree, _entry, _expected, _run

SHAPES: dict[str, tuple[tuple[int, ...], tuple[Dims, ...], bool]] = {
    "strips": ((8192, 2048), ((0,),), True),
    "strips, the last one narrow": ((2048, 1300), ((0,),), True),
    "strips of slices": ((3, 4096, 512), ((1,),), True),
    "several slices": ((300, 64, 256), ((1,),), True),
    "factored": ((5000, 768), ((1,), (0,)), True),
    "short rows": ((5000, 70), ((0,),), False),
    "one average": ((3_000_000,), ((0,),), False),
}


def _tilings() -> list[tuple[int, Tiling]]:
    found = []
    for number, (shape, dims, _) in enumerate(SHAPES.values()):
        one = tiling(torch.empty(shape, device="meta"), dims)
        assert one is not None
        assert one.kind == "spread"
        found.append((number, one))
    return found


@pytest.mark.parametrize("slab_bytes", [1 << 16, slabs.SLAB_BYTES])
@pytest.mark.parametrize("in_rows", [True, False])
def test_what_a_program_waits_for_has_started(slab_bytes: int, in_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", slab_bytes)
    tensors = [(n, one) for n, one in _tilings() if list(SHAPES.values())[n][2] or not in_rows]
    programs, count = slabs.work(tensors, 4, in_rows, 4)
    announced: Counter[int] = Counter()
    for _, stage, _, awaited, _, _, _, _, slab in programs.tolist():
        assert announced[slab] == awaited if stage == kernels.UPDATE.value else announced[slab] >= awaited
        announced[slab] += stage != kernels.UPDATE.value
    assert set(announced) == set(range(count))


@pytest.mark.parametrize("slab_bytes", [1 << 16, slabs.SLAB_BYTES])
def test_slabs_cover_every_element_once(slab_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", slab_bytes)
    for number, found in _tilings():
        for in_rows in {False, slabs.is_in_rows(found, codes=False)}:
            parts = list(slabs.slabs(number, found, in_rows, 4))
            height = found.slice_count // found.width
            assert sum(part.slices * height * part.columns for part in parts) == found.pre * found.slice_count
            assert all(part.first_column % 256 == 0 for part in parts)


@pytest.mark.parametrize(
    ("shape", "dims"), [((2**31,), ((0,),)), ((262144, 8192), ((0, 1),)), ((2, 2**31 + 128), ((1,),))]
)
def test_what_needs_64_bits_is_not_in_the_list(shape: tuple[int, ...], dims: tuple[Dims, ...]) -> None:
    for precomputed in (False, True):
        found = tiling(torch.empty(shape, device="meta"), dims, precomputed=precomputed)
        assert found is not None
        if precomputed:
            programs = slabs.updates([(0, found)], 1 << 16, in_rows=True)
        else:
            programs, _ = slabs.work([(0, found)], 1 << 16, in_rows=True, itemsize=4)
        assert programs.dtype == torch.int32
        assert programs[:, 7].eq(0).all()


def test_strips_stay_within_the_size_of_a_slab() -> None:
    found = tiling(torch.empty(8192, 2048, device="meta"), ((0,),))
    assert found is not None
    parts = list(slabs.slabs(0, found, True, 4))
    assert [part.columns for part in parts] == [256] * 8
    assert all(found.red * part.columns * 4 <= slabs.SLAB_BYTES for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_slabs_agree_with_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 14)
    entries = [
        _entry((40, 1280), (0,), dtype),  # strips of 256 columns, several to a row of tiles
        _entry((70, 1100), (0,), dtype),  # the last strip is 76 columns wide
        _entry((2, 33, 1536), (1,), dtype),
        _entry((9, 3, 512), (1,), dtype),  # several slices to a slab
        _entry((30, 1030), "factored", dtype),
        _entry((50, 70), (0,), dtype),
    ]
    expected = _expected(entries)
    _run(entries)
    _assert_agree(entries, expected)


@pytest.mark.parametrize(
    ("width", "dtype", "aligned"),
    [(1000, torch.float32, 4), (1000, torch.bfloat16, 8), (1028, torch.float32, 4), (1028, torch.bfloat16, 0)],
)
@pytest.mark.parametrize("dims", [(0,), (1,)])
def test_rows_of_any_16_bytes_are_read_wide(width: int, dtype: torch.dtype, aligned: int, dims: Dims) -> None:
    entry = _entry((8, width), dims, dtype)
    found = tiling(entry.param, entry.averaged_dims)
    assert found is not None
    options = dict(launch._key(entry, found, Hyperparameters()).options)
    assert options["ALIGNED"] == aligned
    assert options.get("SUMS_ALIGNED", aligned) == aligned
