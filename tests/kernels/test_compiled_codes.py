"""The compiled step on second moments in codes, against its own on the numbers they stand for and the reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimadam.kernels.cpp.update import Table, compiled_update, supports
from slimadam.kernels.float8 import LARGEST, NOT_FINITE, decode, encode
from slimadam.kernels.interface import Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.layout import has_gaps
from slimadam.kernels.reference import reference_update
from slimadam.optim.step.dispatch import BACKENDS
from tests.kernels.test_compiled import _clone

# Without a compiler there is no compiled step to compare; lists of tensors are taken then, which other tests cover.
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

F32, F64, BF16, F16, INT8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8
DTYPES = [(F32, F32), (F32, BF16), (F32, INT8), (F64, F64), (F64, F32), (F64, BF16), (F64, INT8)]
DTYPES += [(BF16, BF16), (BF16, F32), (BF16, INT8), (F16, F16), (F16, F32), (F16, BF16), (F16, INT8)]
SHAPES = [(), (1,), (11,), (7, 3), (1, 257), (3, 20, 33), (523, 129)]
HYPER = Hyperparameters(lr=3e-2, beta1=0.8, beta2=0.95, eps=1e-5, weight_decay=0.1)
OTHERS = {
    "plain": HYPER,
    "ascending, no decay": HYPER._replace(beta1=0.3, maximize=True, weight_decay=0.0),
    "clipped": HYPER._replace(clip_factor=torch.tensor(0.3)),
    "rounded at random": HYPER._replace(beta2=0.999, stochastic_round=True),
}


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def _at_odd_offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def _rows_apart(tensor: Tensor) -> Tensor:
    memory = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 5)
    return memory[..., 2:-3].copy_(tensor)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((37, 130), _transposed),
    "channels last": ((6, 5, 4, 3), _channels_last),
    "at an odd offset": ((9, 35), _at_odd_offset),
    "rows apart": ((21, 67), _rows_apart),
    "short rows apart": ((40, 3), _rows_apart),
    "slices apart": ((3, 4, 70), _rows_apart),
}
LAID = [(name, dtypes) for name in LAYOUTS for dtypes in DTYPES]
LAID = [(name, dtypes) for name, dtypes in LAID if dtypes[1] is not INT8 or LAYOUTS[name][1] is not _rows_apart]


def _entry(
    shape: tuple[int, ...],
    dtype: torch.dtype = F32,
    momentum: torch.dtype | None = None,
    step: float = 3.0,
    step_dtype: torch.dtype = F32,
) -> Entry:
    """A step in the middle of a run: codes of every size that gradients have a part in, and some zeros in both."""
    generator = torch.Generator().manual_seed(7)
    param, grad, exp_avg, size = (torch.randn(shape, generator=generator) for _ in range(4))
    grad = grad * size.mul(3).exp() * 0.1
    grad = torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, grad).to(dtype)
    codes = torch.randint(60, 190, shape, generator=generator, dtype=torch.uint8)
    codes = torch.where(torch.rand(shape, generator=generator) < 0.1, 0, codes).to(torch.uint8)
    scale = None
    if momentum is INT8:
        exp_avg = torch.randint(-127, 128, shape, generator=generator, dtype=INT8)
        scale = torch.randint(122, 128, (-(-param.numel() // 256),), generator=generator, dtype=torch.uint8)
    else:
        exp_avg = exp_avg.to(momentum or dtype)
    return Entry(
        param.to(dtype), grad, exp_avg, [codes], (), torch.tensor(step, dtype=step_dtype), ((),), 12345, scale
    )  # fmt: skip


def _laid(entry: Entry, lay: Callable[[Tensor], Tensor]) -> Entry:
    """The same tensors laid out otherwise; second moments have no gaps."""
    param, grad, exp_avg = map(lay, entry[:3])
    second = list(entry.exp_avg_sq) if has_gaps(param) else [lay(part) for part in entry.exp_avg_sq]
    return entry._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=second)


def _in_numbers(entry: Entry) -> Entry:
    """The same step with the second moment that the codes stand for."""
    wide = second_moment_dtype(entry.param.dtype)
    return _clone(entry)._replace(exp_avg_sq=[decode(entry.exp_avg_sq[0]).to(wide)])


def _assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _check(entry: Entry, hyper: Hyperparameters, lay: Callable[[Tensor], Tensor] = Tensor.clone) -> Entry:
    """Compare to the last bit with a step on numbers whose second moment is encoded afterwards; return the step's."""
    found, exact = _laid(_clone(entry), lay), _laid(_in_numbers(entry), lay)
    compiled_update([found], hyper)
    compiled_update([exact], hyper)
    _assert_same(found.exp_avg_sq[0], encode(exact.exp_avg_sq[0], entry.param, entry.step))
    _assert_same(found.param, exact.param)
    _assert_same(found.exp_avg, exact.exp_avg)
    if found.exp_avg_scale is not None and exact.exp_avg_scale is not None:
        _assert_same(found.exp_avg_scale, exact.exp_avg_scale)
    return found


@pytest.mark.parametrize("which", OTHERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_one_step_is_that_on_numbers(
    dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...], which: str
) -> None:
    _check(_entry(shape, *dtypes), OTHERS[which])


@pytest.mark.parametrize(("layout", "dtypes"), LAID, ids=str)
def test_layouts(layout: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    shape, lay = LAYOUTS[layout]
    for hyper in OTHERS.values():
        _check(_entry(shape, *dtypes), hyper, lay)


def test_codes_in_another_order_than_the_parameter() -> None:
    entry = _entry((37, 130))
    found = _laid(_clone(entry), _transposed)._replace(exp_avg_sq=[entry.exp_avg_sq[0].clone()])
    compiled_update([found], HYPER)
    _assert_same(found.exp_avg_sq[0], _check(entry, HYPER).exp_avg_sq[0])


@pytest.mark.parametrize("step_dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("step", [1, 2, 4099, (1 << 24) - 3])
def test_every_step_rounds_otherwise(step: int, step_dtype: torch.dtype) -> None:
    found = _check(_entry((60, 70), step=step, step_dtype=step_dtype), HYPER)
    later = _check(_entry((60, 70), step=step + 1, step_dtype=step_dtype), HYPER)
    rounded_otherwise = (found.exp_avg_sq[0] != later.exp_avg_sq[0]).float().mean()
    assert 0.1 < rounded_otherwise < 0.6


@pytest.mark.parametrize("which", ["plain", "ascending, no decay", "clipped"])
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if pair[1] is not INT8], ids=str)
def test_one_step_agrees_with_the_reference(dtypes: tuple[torch.dtype, torch.dtype], which: str) -> None:
    dtype, momentum = dtypes
    hyper = OTHERS[which]
    before = _entry((523, 129), dtype, momentum)
    ours, theirs = _clone(before), _clone(before)
    compiled_update([ours], hyper)
    reference_update([theirs], hyper)
    # A code differs where two second moments, a unit in the last place apart, are on either side of a random number.
    differs = ours.exp_avg_sq[0].int() - theirs.exp_avg_sq[0].int()
    assert differs.count_nonzero() <= 1
    assert differs.abs().max() <= 1
    precision = max(torch.finfo(part).eps for part in (dtype, momentum))
    torch.testing.assert_close(ours.param, theirs.param, rtol=8 * precision, atol=8 * precision)
    torch.testing.assert_close(ours.exp_avg, theirs.exp_avg, rtol=precision, atol=precision)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_every_code_survives_a_step_that_changes_nothing(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).repeat(3)
    entry = _entry(codes.shape, dtype)._replace(grad=torch.zeros(codes.shape, dtype=dtype), exp_avg_sq=[codes.clone()])
    found = _check(entry, HYPER._replace(beta2=1 - 1e-12))
    _assert_same(found.exp_avg_sq[0], codes)


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_numbers_beyond_the_codes(dtype: torch.dtype) -> None:
    """Of no number and of infinity, too large for a code and too small for one."""
    grad = [float("nan"), float("inf"), float("-inf"), 1e30, 1e15, 1e-14, 1e-30, 0.0]
    expected = [NOT_FINITE] * 4 + [LARGEST, 1, 0, 0]
    for repeated in (1, 40):
        entry = _entry((8 * repeated,), dtype)
        second = [torch.zeros(8 * repeated, dtype=torch.uint8)]
        entry = entry._replace(grad=torch.tensor(grad, dtype=dtype).repeat(repeated), exp_avg_sq=second)
        found = _check(entry, HYPER)
        assert found.exp_avg_sq[0].tolist() == expected * repeated
        again = _check(found._replace(grad=torch.zeros_like(found.grad)), HYPER)
        assert again.exp_avg_sq[0].tolist()[:4] == [NOT_FINITE] * 4
        assert again.param.isnan().tolist() == [number % 8 < 3 for number in range(8 * repeated)]


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_many_steps_keep_the_expectation(dtype: torch.dtype) -> None:
    """Where rounding to nearest would stop the average: a step changes it by a hundredth, codes are a third apart."""
    count, hyper = 8192, HYPER._replace(beta2=0.99)
    generator = torch.Generator().manual_seed(3)
    size = torch.randn(count, generator=generator).exp()
    entry = _entry((count,), dtype)._replace(exp_avg_sq=[torch.zeros(count, dtype=torch.uint8)])
    exact = torch.zeros(count, dtype=F64)
    for step in range(1, 401):
        grad = (torch.randn(count, generator=generator) * size).to(dtype)
        exact = exact * hyper.beta2 + (1 - hyper.beta2) * grad.double() ** 2
        compiled_update([entry._replace(grad=grad, step=torch.tensor(float(step)))], hyper)
    error = decode(entry.exp_avg_sq[0]).double() / exact - 1
    assert 0.1 < error.std() < 0.7
    assert error.mean().abs() < 5 * error.std() / count**0.5


def test_without_gradients_codes_go_down_to_the_smallest_and_zeros_stay() -> None:
    entry = _entry((300,))
    entry = entry._replace(grad=torch.zeros(300))
    zeros = entry.exp_avg_sq[0] == 0
    for step in range(1, 2001):  # 0.95**2000 is 1e-45
        compiled_update([entry._replace(step=torch.tensor(float(step)))], HYPER)
    assert zeros.any()
    _assert_same(entry.exp_avg_sq[0], torch.where(zeros, 0, 1).to(torch.uint8))


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    hyper = HYPER._replace(stochastic_round=True)
    entries = [_entry((700, 600), *dtypes) for dtypes in [(F32, F32), (BF16, INT8), (BF16, BF16)]]
    plain = _entry((700, 600))._replace(exp_avg_sq=[torch.rand(700, 1)], averaged_dims=((1,),))
    alone = [_check(entry, hyper) for entry in entries]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = [_clone(entry) for entry in [entries[0], plain, *entries[1:]]]
            compiled_update(found, hyper)
            del found[1]
            for one, other in zip(found, alone, strict=True):
                _assert_same(one.exp_avg_sq[0], other.exp_avg_sq[0])
                _assert_same(one.param, other.param)
    finally:
        torch.set_num_threads(threads)


def test_the_table_counts_before_it_rounds() -> None:
    counted = _entry((60, 70), step=4.0)
    expected = _check(counted._replace(step=torch.tensor(5.0)), HYPER)
    Table([counted], counts=True).run([counted.grad], [0], HYPER)
    assert counted.step == 5
    _assert_same(counted.exp_avg_sq[0], expected.exp_avg_sq[0])


@pytest.mark.parametrize("maximize", [False, True])
def test_clipping_to_nothing_rounds_by_the_gradient_in_memory(maximize: bool) -> None:
    hyper = HYPER._replace(clip_factor=torch.tensor(0.0), maximize=maximize)
    entries = [_entry((60, 70)), _entry((60, 70))._replace(exp_avg_sq=[torch.rand(60, 1)], averaged_dims=((1,),))]
    for entry in entries:
        entry.grad[3, 5] = float("inf")
    ours, theirs = ([_clone(entry) for entry in entries] for _ in range(2))
    compiled_update(ours, hyper)
    reference_update(theirs, hyper)
    _assert_same(ours[0].exp_avg_sq[0], theirs[0].exp_avg_sq[0])
    assert ours[0].exp_avg_sq[0][3, 5] == NOT_FINITE
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.param, other.param, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_codes_of_single_elements_are_taken() -> None:
    entry, compiled = _entry((6, 8)), BACKENDS["compiled"]
    codes = entry.exp_avg_sq[0]
    assert compiled.supports(entry)
    assert compiled.supports(_laid(entry, _transposed))
    assert compiled.supports(_laid(entry, _rows_apart))
    assert not compiled.supports(entry._replace(precomputed=True))
    assert not compiled.supports(entry._replace(max_exp_avg_sq=[codes.clone()]))
    assert not compiled.supports(entry._replace(max_exp_avg_sq=[torch.zeros(6, 8)]))
    assert not compiled.supports(entry._replace(exp_avg_sq=[codes[:, :1].contiguous()], averaged_dims=((1,),)))
    assert not compiled.supports(entry._replace(exp_avg_sq=[codes.to(torch.int16)]))
    assert not compiled.supports(entry._replace(exp_avg_sq=[codes.t().contiguous().t()]))
    assert not supports(codes, F32, ((),))
