from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimadam import PlanError, SNRHistory, snr
from slimadam.snr import dimension_subsets, measure


def _direct(v: np.ndarray, dims: Any) -> float:
    v = v.astype(np.float64)
    if dims == "factored":
        matrix = v.reshape(v.shape[0], -1)
        product = matrix.mean(1, keepdims=True) * matrix.mean(0, keepdims=True)
        kept = product > 0
        f = matrix[kept] * matrix.mean() / product[kept]
        return float(f.mean() ** 2 / f.var())
    mean, variance = v.mean(axis=dims), v.var(axis=dims)
    varies = variance > 0
    return float((mean[varies] ** 2 / variance[varies]).mean())


@pytest.mark.parametrize("shape", [(6,), (5, 7), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30])
def test_every_candidate_equals_numpy(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    v = (torch.rand(shape, dtype=torch.float64) ** 3 * scale).to(dtype)
    values = v.double().numpy()
    measured = measure(v)
    expected = [*dimension_subsets(len(shape)), *(["factored"] if len(shape) > 1 else [])]
    assert list(measured) == expected
    for candidate in expected:
        assert measured[candidate] == pytest.approx(_direct(values, candidate), rel=1e-10)
        assert snr(v, candidate) == measured[candidate]


def test_known_values() -> None:
    v = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    # Row 0 has mean 2, variance 1: 4. Row 1 is constant and left out.
    assert snr(v, 1) == pytest.approx(4.0, rel=1e-14)
    # Columns (1, 2): 2.25 / 0.25 = 9; (3, 2): 6.25 / 0.25 = 25.
    assert snr(v, (0,)) == pytest.approx(17.0, rel=1e-14)
    # All four: mean 2, variance 0.5.
    assert snr(v, (0, 1)) == snr(v, (-1, -2)) == pytest.approx(8.0, rel=1e-14)
    assert snr(torch.outer(torch.rand(4) + 1, torch.rand(5) + 1), "factored") > 1e12


@pytest.mark.parametrize("dims", [0, 1, (0, 1), "factored"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 3e38])
def test_constant_is_perfectly_compressible(dims: Any, value: float) -> None:
    assert snr(torch.full((700, 900), value), dims) == math.inf


def test_unseen_embedding_rows_are_left_out() -> None:
    v = torch.rand(6, 5)
    v[2:4] = 0
    assert snr(v, 1) == pytest.approx(snr(v[[0, 1, 4, 5]], 1), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_entries_give_nan(bad: float) -> None:
    v = torch.rand(3, 4)
    v[1, 2] = bad
    assert all(math.isnan(value) for value in measure(v).values())


def test_empty_and_complex() -> None:
    assert snr(torch.rand(0, 4), 0) == math.inf
    assert measure(torch.tensor(1.0)) == {}
    v = torch.complex(torch.rand(3, 4), torch.rand(3, 4))
    assert snr(v, 1) == pytest.approx(_direct(torch.view_as_real(v).numpy(), 1), rel=1e-10)


@pytest.mark.parametrize("dims", [2, -3, (0, 0), (0, -2), (), "rows", 1.0, True, None])
def test_wrong_dims_are_refused(dims: Any) -> None:
    with pytest.raises(ValueError, match="dims="):
        snr(torch.rand(2, 3), dims)


def test_averages_leave_out_nan_and_count_infinity_only_alone() -> None:
    history = SNRHistory()
    for step, value in ((1, math.inf), (100, 2.0), (200, math.nan), (300, 4.0)):
        history.record(step, "w", (2, 3), {(0,): value, (1,): math.inf})
    assert history["w"].average() == {(0,): 3.0, (1,): math.inf}
    assert history.steps == [1, 100, 200, 300]
    with pytest.raises(ValueError, match="recorded with shape"):
        history.record(400, "w", (3, 2), {(0,): 1.0})


def test_csv_round_trip(tmp_path: Path) -> None:
    history = SNRHistory()
    history.record(1, 'a,"b"\n.weight', (5, 7), measure(torch.rand(5, 7)))
    history.record(100, "conv", (2, 3, 1, 1), {(1, 2, 3): math.inf, "factored": math.nan})
    history.save_csv(tmp_path / "snr.csv")
    loaded = SNRHistory.load_csv(tmp_path / "snr.csv")
    assert list(loaded) == list(history)
    assert loaded['a,"b"\n.weight'].values == history['a,"b"\n.weight'].values
    assert math.isnan(loaded["conv"].values[100]["factored"])


def test_reads_the_authors_columns(tmp_path: Path) -> None:
    path = tmp_path / "snr.csv"
    path.write_text(
        "step,key,shape,compress_dims,snr,mean_sqr,var\n"
        '1,h.0.w,"torch.Size([768, 64])","(0,)",0.5,1e-9,2e-9\n'
        '1,h.0.w,"(768, 64)",1,2.5,1e-9,4e-10\n'
        '1,h.0.w,"[768, 64]","(0, 1)",0.25,1e-9,4e-9\n'
    )
    assert SNRHistory.load_csv(path)["h.0.w"].average() == {(0,): 0.5, (1,): 2.5, (0, 1): 0.25}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,key,snr\n1,a,2\n", "columns .*shape.* are missing"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(2,)",1\n', "line 2.*not a dimension"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(0,)",-1\n', "must be >= 0, and the step below"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","__import__",1\n', "tuple of at most"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)"\n', "compress_dims=None"),
        ('step,key,shape,compress_dims,snr\n1,,"(2, 3)","(0,)",1\n', "key is empty"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(0,)",x\n', "could not convert"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(0,)",1\n1,a,"(3, 2)","(0,)",1\n', "line 3.*shape"),
        ('step,key,shape,compress_dims,snr\n1,a,"' + "1" * 300 + '","(0,)",1\n', "shape="),
        ("step,key,shape,compress_dims,snr\n" + "9" * 400 + ',a,"(2, 3)","(0,)",1\n', "below 2"),
        ("\x00\x01", "snr.csv"),
        ("", "missing"),
    ],
)
def test_hostile_csv_is_a_plan_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "snr.csv"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        SNRHistory.load_csv(path)
    with pytest.raises(PlanError, match="cannot be read"):
        SNRHistory.load_csv(tmp_path / "missing.csv")


def test_odd_names_survive_csv(tmp_path: Path) -> None:
    history = SNRHistory()
    for name in ("a\rb", "a\r\nb", " c ", "d;e", "f'g"):
        history.record(1, name, (2,), {(0,): 1.0})
    history.save_csv(tmp_path / "snr.csv")
    assert list(SNRHistory.load_csv(tmp_path / "snr.csv")) == list(history)
    history.record(1, "lone \ud800 surrogate", (2,), {(0,): 1.0})
    history.save_csv(tmp_path / "snr.csv")
    assert len(SNRHistory.load_csv(tmp_path / "snr.csv")) == len(history)
