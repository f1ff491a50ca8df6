from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimadam import AutoPlan, CompressionPlan, PlanError, SlimAdam, SNRHistory, SNRRecorder, snr
from slimadam.measurement.recorder import every
from slimadam.measurement.snr import measure
from slimadam.state.rule import dimension_subsets

# The package has a function of the same name.
SNR_MODULE = importlib.import_module("slimadam.measurement.snr")


def _direct(v: np.ndarray, dims: Any, batch_dims: int = 0) -> float:
    """The formula in numpy's float64. What is constant but for rounding is left out."""
    v = v.astype(np.float64) / v.max()
    if dims == "factored":
        matrices = v.reshape(math.prod(v.shape[:batch_dims]), v.shape[batch_dims], -1)
        residuals = [_residual(matrix) for matrix in matrices if matrix.any()]
        mean, variance = np.array([[f.mean(), f.var()] for f in residuals]).T
    else:
        mean, variance = v.mean(axis=dims), v.var(axis=dims)
    varies = variance > 1e-28 * mean**2
    return float((mean[varies] ** 2 / variance[varies]).mean()) if varies.any() else math.inf


def _residual(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix[matrix.any(1)][:, matrix.any(0)]
    return matrix * matrix.mean() / (matrix.mean(1, keepdims=True) * matrix.mean(0, keepdims=True))


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


SHAPES = [(50,), (40, 70), (90, 20), (5, 1, 30), (6, 40, 9), (3, 7, 4, 5), (1, 9, 3, 3)]


def _along(shape: tuple[int, ...], make: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The outer product of a vector along each dimension."""
    vectors = (make(size).view([-1 if d == dim else 1 for d in range(len(shape))]) for dim, size in enumerate(shape))
    return math.prod(vectors, start=torch.ones(()))


SPREADS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "uniform": torch.rand,
    "heavy tails": lambda shape: torch.rand(shape) ** 20,
    "one outlier": lambda shape: torch.rand(shape).index_put((torch.tensor(0),) * len(shape), torch.tensor(1e6)),
    "nearly constant": lambda shape: 1 + 1e-5 * torch.rand(shape),
    "nearly a product": lambda shape: _along(shape, lambda n: torch.rand(n) + 0.1) * (1 + 1e-4 * torch.rand(shape)),
    "zero rows and columns": lambda shape: torch.rand(shape) * _along(shape, lambda n: torch.arange(n) % 3 != 1),
}


@pytest.mark.parametrize("chunk", [1, 100, 1 << 19])
@pytest.mark.parametrize("scale", [1e-40, 1e-12, 1e37])
@pytest.mark.parametrize("spread", SPREADS)
def test_within_1e_6_of_float64_at_any_chunk_size(
    monkeypatch: pytest.MonkeyPatch, spread: str, scale: float, chunk: int
) -> None:
    monkeypatch.setattr(SNR_MODULE, "_CHUNK_ELEMENTS", chunk)
    for shape in SHAPES:
        v = SPREADS[spread](shape)
        v = v / v.max() * scale
        for batch_dims in range(max(1, len(shape) - 1)):
            for candidate, value in measure(v, batch_dims).items():
                expected = _direct(v.numpy(), candidate, batch_dims)
                assert value == pytest.approx(expected, rel=1e-6), (shape, candidate, batch_dims)


def test_float64_moments_of_any_size() -> None:
    v = torch.rand(30, 20, dtype=torch.float64)
    for scale in (1e-300, 1e300):
        assert measure(v * scale) == pytest.approx(measure(v), rel=1e-12)


def test_experts_are_separate_matrices() -> None:
    v = torch.rand(4, 6, 9) ** 3
    v[1, 2] = 0
    v[2, :, 5] = 0
    v[3] = 0
    each = [snr(v[expert], "factored") for expert in range(3)]
    assert snr(v, "factored", batch_dims=1) == pytest.approx(sum(each) / 3, rel=1e-12)
    assert measure(v, 1)["factored"] == snr(v, "factored", 1)
    assert snr(v, "factored") != pytest.approx(snr(v, "factored", 1), rel=1e-2)
    assert list(measure(v, 2)) == dimension_subsets(3)
    assert {**measure(v), "factored": None} == {**measure(v, 1), "factored": None}


@pytest.mark.parametrize("batch_dims", [-1, 1.0, True, None])
def test_wrong_batch_dims_are_refused(batch_dims: Any) -> None:
    with pytest.raises(ValueError, match="batch_dims="):
        measure(torch.rand(2, 3), batch_dims)
    with pytest.raises(ValueError, match="batch_dims="):
        snr(torch.rand(2, 3), 0, batch_dims)


def test_a_batch_of_vectors_has_no_factored_form() -> None:
    with pytest.raises(ValueError, match="batch_dims=1 leaves no matrix"):
        snr(torch.rand(2, 3), "factored", batch_dims=1)


def test_strides_do_not_matter() -> None:
    v = torch.rand(8, 6, 10)
    for strided in (v[::2], v[:, :, 1:7], v.permute(2, 0, 1), v[:, :1].expand(8, 6, 10), v.flip(1).transpose(0, 1)):
        assert measure(strided) == measure(strided.contiguous())


class _LargestAllocation(TorchDispatchMode):
    """Notes the most bytes that one operation allocates."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [(3000, 500), (500, 3000), (4, 250, 1500)])
def test_memory_does_not_grow_with_the_tensor(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(SNR_MODULE, "_CHUNK_ELEMENTS", 1 << 14)
    v = torch.rand(shape)
    with _LargestAllocation() as noted:
        measure(v, batch_dims=len(shape) - 2)
    two_chunks = 2 * 8 * (1 << 14)
    assert 0.9 * two_chunks < noted.largest <= two_chunks < v.nbytes / 20


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
    for candidate in (0, 1, (0, 1)):
        assert snr(v, candidate) == pytest.approx(_direct(torch.view_as_real(v).numpy(), candidate), rel=1e-10)
    parts = (snr(v.real, "factored") + snr(v.imag, "factored")) / 2
    assert snr(v, "factored") == pytest.approx(parts, rel=1e-10)
    assert measure(v.mT.conj()) == measure(v.mT.conj().resolve_conj())


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
        ('step,key,shape,compress_dims,snr\n1,,"(2, 3)","(0,)",1\n', "key='' must be a parameter"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(0,)",x\n', "could not convert"),
        ('step,key,shape,compress_dims,snr\n1,a,"(2, 3)","(0,)",1\n1,a,"(3, 2)","(0,)",1\n', "line 3.*shape"),
        ('step,key,shape,compress_dims,snr\n1,a,"' + "1" * 300 + '","(0,)",1\n', "shape="),
        ("step,key,shape,compress_dims,snr\n" + "9" * 400 + ',a,"(2, 3)","(0,)",1\n', "below 2"),
        ("step,key,shape,compress_dims,snr\n1," + "a" * 1001 + ',"(2, 3)","(0,)",1\n', "longer than 1000 characters"),
        ('step,key,shape,compress_dims,snr\n1,a,"(9223372036854775808, 3)","(0,)",1\n', "integers up to 2"),
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


SHAPES_OF_A_MODEL = {"clean": (8, 6), "now_and_then": (6, 9), "for_good": (7, 5), "from_the_start": (5, 9)}
NOT_FINITE = {("for_good", 3): math.nan, ("from_the_start", 1): math.inf}


def _gradient(name: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    gradient = torch.randn(SHAPES_OF_A_MODEL[name], generator=generator)
    gradient[2, 3] *= NOT_FINITE.get((name, step), 1.0)
    return gradient


def _train(optimizer: torch.optim.Optimizer, named: dict[str, torch.Tensor], steps: int) -> None:
    for step in range(1, steps + 1):
        for name, parameter in named.items():
            # What loss scaling does on overflow: the parameter sits out this step.
            parameter.grad = None if name == "now_and_then" and step == 4 else _gradient(name, step)
        optimizer.step()


def _finite_measurements(steps: int, measured: tuple[int, ...]) -> SNRHistory:
    """An independent AdamW's second moments, measured while they are finite."""
    history = SNRHistory()
    for name, shape in SHAPES_OF_A_MODEL.items():
        second_moment = torch.zeros(shape)
        history.record(0, name, shape, {})
        for step in range(1, steps + 1):
            if not (name == "now_and_then" and step == 4):
                second_moment = 0.999 * second_moment + 0.001 * _gradient(name, step) ** 2
            if step in measured and second_moment.isfinite().all():
                history.record(step, name, shape, measure(second_moment))
    return history


def _assert_same_choice(plan: CompressionPlan, expected: CompressionPlan) -> None:
    assert list(plan) == list(expected)
    for name, rule in plan.items():
        assert (rule.form, rule.dims) == (expected[name].form, expected[name].dims)
        assert rule.snr == pytest.approx(expected[name].snr, rel=1e-4)
    assert {rule.form for rule in (plan["clean"], plan["for_good"])} <= {"mean", "factored"}
    assert plan["from_the_start"].form == "full"
    assert plan["from_the_start"].snr == {}
    assert "measured" in plan["from_the_start"].reason


@pytest.mark.parametrize("forms", ["mean", "best", "closest"])
def test_recorder_leaves_non_finite_measurements_out(forms: Any) -> None:
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES_OF_A_MODEL.items()}
    optimizer = torch.optim.AdamW(named.items())
    recorder = SNRRecorder(optimizer, schedule=every(2))
    _train(optimizer, named, 6)
    expected = _finite_measurements(6, (1, 2, 4, 6))
    _assert_same_choice(
        CompressionPlan.from_snr(recorder.history, 0.1, forms=forms),
        CompressionPlan.from_snr(expected, 0.1, forms=forms),
    )
    assert all(math.isnan(value) for value in recorder.history["for_good"].values[6].values())


def test_auto_leaves_non_finite_measurements_out() -> None:
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES_OF_A_MODEL.items()}
    optimizer = SlimAdam(named.items(), plan=AutoPlan(calibration_steps=6, measurements=3, cutoff=0.1))
    _train(optimizer, named, 6)
    expected = _finite_measurements(6, (2, 4, 6))
    _assert_same_choice(optimizer.plan, CompressionPlan.from_snr(expected, 0.1, forms="closest"))
    assert optimizer.state[named["from_the_start"]]["exp_avg_sq"].shape == (5, 9)
    _train(optimizer, named, 3)
    assert named["clean"].isfinite().all()
    assert named["now_and_then"].isfinite().all()
