"""First moments in 8 bits: the code against a float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimadam import SlimAdam
from slimadam.state import int8
from tests.reference import Array

FLOAT32 = np.finfo(np.float32)
SIZES = [0, 1, 2, 255, 256, 257, 600, 256 * 1025 + 3]


# -- the oracle ------------------------------------------------------------------------------------------


def _oracle_exponent(block: Array) -> int:
    """What is added to -127 in the power of two that the absolute maximum is rounded up to; 0 is zero, 255 infinity."""
    largest = float(np.abs(block).max())
    if largest == 0:
        return 0
    if not np.isfinite(largest):
        return 255
    mantissa, exponent = np.frexp(largest)  # a mantissa in [0.5, 1)
    power = int(exponent) - (mantissa == 0.5)
    return min(max(power, -126) + 127, 255)


def _per_element(exponents: Array, size: int) -> Array:
    """Each block's scale, for each of its elements."""
    scales = np.array([0.0 if e == 0 else np.inf if e == 255 else 2.0 ** (int(e) - 127) for e in exponents])
    return np.repeat(scales, 256)[:size]


def _oracle(value: Array, grad: Array) -> tuple[Array, Array, Array]:
    """Codes before rounding, codes, and exponents of flat arrays."""
    starts = range(0, value.size, 256)
    exponents = np.array([_oracle_exponent(value[start : start + 256]) for start in starts])
    with np.errstate(all="ignore"):
        exact = 127 * np.sqrt(np.abs(value) / _per_element(exponents, value.size))
    exact[~np.isfinite(exact)] = 0
    codes = np.sign(value) * np.where(grad == 0, np.floor(exact), np.rint(exact))
    return exact, np.nan_to_num(codes), exponents


def oracle_decoded(value: Array, grad: Array) -> Array:
    _, codes, exponents = _oracle(value.ravel(), grad.ravel())
    decoded: Array = np.sign(codes) * (codes / 127) ** 2 * _per_element(exponents, value.size)
    return decoded.reshape(value.shape)


def encoded(value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    codes = int8.new_codes(value)
    scales = int8.new_scales(codes)
    int8.encode(value, grad, codes, scales)
    return codes, scales


def twelve_decades(size: int) -> Tensor:
    """Numbers whose sizes differ from block to block."""
    return torch.randn(size) * 10.0 ** torch.linspace(-6, 6, size)


# -- encode and decode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share_without_gradient", [0.0, 0.5])
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_scales_are_the_oracles(size: int, share_without_gradient: float) -> None:
    value = twelve_decades(size)
    grad = torch.where(torch.rand(size) < share_without_gradient, 0.0, 1.0)
    codes, scales = encoded(value, grad)
    exact, wanted, exponents = _oracle(value.double().numpy(), grad.double().numpy())
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.uint8
    assert np.array_equal(scales.numpy(), exponents)
    # Only where the exact code lies within float32's error of where rounding goes the other way may it be the other.
    turn = np.where(grad.numpy() == 0, np.rint(exact), np.floor(exact) + 0.5)
    # That is half a unit for the root and half for the product: dividing by a power of two rounds nothing.
    undecided = np.abs(exact - turn) <= 1.001 * FLOAT32.eps * exact
    off = np.abs(codes.double().numpy() - wanted)
    assert (off[~undecided] == 0).all()
    assert (off <= 1).all()
    decoded = int8.decode(codes, scales).double().numpy()
    kept = codes.double().numpy()
    expected = np.sign(kept) * (kept / 127) ** 2 * _per_element(exponents, size)
    # Half a unit for the quotient, which counts twice, and half for the square.
    np.testing.assert_allclose(decoded, expected, rtol=1.501 * FLOAT32.eps)


@pytest.mark.parametrize("rounded_down", [False, True])
def test_the_error_is_bounded_by_half_a_code_or_a_whole_one(rounded_down: bool) -> None:
    value = twelve_decades(10_000)
    codes, scales = encoded(value, torch.zeros_like(value) if rounded_down else value)
    scale = torch.from_numpy(_per_element(scales.numpy(), 10_000))
    error = (int8.decode(codes, scales).double() - value.double()).abs()
    exact = 127 * (value.double().abs() / scale).sqrt()
    # q = t + d with |d| <= w changes (t / 127)**2 by (2 t d + d**2) / 127**2.
    width = 1.0 if rounded_down else 0.5
    bound = scale * (2 * width * exact + width**2) / 127**2
    assert (error <= bound * (1 + 1e-5) + 4 * FLOAT32.eps * value.double().abs()).all()
    # The scale is less than twice the largest: a hundredth of the largest is 127 / 200**0.5 or more before rounding.
    largest = torch.stack([block.abs().max() for block in value.split(256)]).double()
    hundredth = largest.repeat_interleave(256)[:10_000] / 100
    least = 127 / 200**0.5
    relative = (2 * width * least + width**2) / least**2
    assert (error <= relative * (1 + 1e-5) * torch.maximum(value.double().abs(), hundredth)).all()


@pytest.mark.parametrize("largest", [1e30, 1.2e38, 2.0**127, 1e-30, 1e-37, 2.0**-126, 1e-38, 1e-40, 1e-45])
def test_blocks_of_every_magnitude(largest: float) -> None:
    value = torch.linspace(-1, 1, 300) * largest
    value[0] = largest
    codes, scales = encoded(value, value)
    exact, wanted, exponents = _oracle(value.double().numpy(), np.ones(300))
    assert np.array_equal(scales.numpy(), exponents)
    assert 0 < scales.min() <= scales.max() < 255
    assert np.abs(codes.double().numpy() - wanted).max() <= (np.abs(exact - np.floor(exact) - 0.5) < 1e-4).any()
    decoded, kept = int8.decode(codes, scales).double().numpy(), codes.double().numpy()
    expected = np.sign(kept) * (kept / 127) ** 2 * _per_element(exponents, 300)
    # Below 2**-126 floats are 2**-149 apart.
    np.testing.assert_allclose(decoded, expected, rtol=1.501 * FLOAT32.eps, atol=2.0**-150)


def test_a_block_of_zeros_is_zero_and_one_that_is_not_finite_reads_as_nan() -> None:
    value = torch.ones(6 * 256)
    value[:256] = 0
    value[256] = float("nan")
    value[512] = float("inf")
    value[768] = -float("inf")
    value[1024] = -(2.0**127 + 2.0**104)  # the next above 2**127: rounded up it is infinity
    codes, scales = encoded(value, value)
    assert scales.tolist() == [0, 255, 255, 255, 255, 127]
    assert not codes[: 5 * 256].any()
    decoded = int8.decode(codes, scales).view(6, 256)
    assert not decoded[0].any()
    assert decoded[1:5].isnan().all()
    assert torch.equal(decoded[5], torch.ones(256))


def test_scales_are_powers_of_two_not_below_the_largest() -> None:
    powers = 2.0 ** np.arange(-126, 128)
    above = np.nextafter(powers.astype(np.float32), np.float32(np.inf))
    below = np.nextafter(powers.astype(np.float32), np.float32(0))
    for offset, largest in ((1, powers), (2, above), (1, below)):
        value = torch.from_numpy(largest.astype(np.float32)).repeat_interleave(256)
        codes, scales = encoded(value, value)
        assert scales.tolist() == list(range(offset, offset + 254))
        finite = scales < 255
        assert (codes.view(254, 256)[finite, 0] == (90 if offset == 2 else 127)).all()


def test_a_gpus_nan_does_not_overflow_when_rounded_up() -> None:
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert int8._exponent_above(all_ones).tolist() == [255, 255]


def test_blocks_follow_the_memory_and_not_the_dimensions() -> None:
    value = twelve_decades(3 * 5 * 7 * 4).view(3, 5, 7, 4).to(memory_format=torch.channels_last)
    codes, scales = encoded(value, value.contiguous())
    assert codes.stride() == value.stride()
    flat = value.permute(0, 2, 3, 1).reshape(-1)
    expected, expected_scales = encoded(flat, flat)
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(-1), expected)
    assert torch.equal(scales, expected_scales)
    decoded = int8.decode(codes, scales)
    assert decoded.stride() == value.stride()
    assert torch.equal(decoded.permute(0, 2, 3, 1).reshape(-1), int8.decode(expected, expected_scales))


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_momentum_without_gradient_decays_to_zero(beta1: float) -> None:
    torch.manual_seed(3)
    embedding = nn.Embedding(40, 8)
    optimizer = SlimAdam(embedding, plan=None, betas=(beta1, 0.999), weight_decay=0.0, momentum_dtype="int8")
    for step in range(160):
        optimizer.zero_grad()
        tokens = torch.arange(40) if step == 0 else torch.arange(20, 40)
        (embedding(tokens) * torch.randn(len(tokens), 8)).sum().backward()
        before = embedding.weight.detach().clone()
        optimizer.step()
    first = optimizer.adamw_state_dict()["state"][0]["exp_avg"]
    # The root of beta1 takes every code down by at least one: 127 steps are enough.
    assert not first[:20].any()
    assert first[20:].all(1).any()
    assert torch.equal(embedding.weight[:20], before[:20])
    assert not torch.equal(embedding.weight[20:], before[20:])


def test_a_block_without_gradient_decays_as_fast_as_its_factor_says_and_reaches_zero() -> None:
    value = twelve_decades(256)
    none = torch.zeros(256)
    for _ in range(1000):  # 0.9**1000 of anything is less than 2**-149
        codes, scales = encoded(value, none)
        decoded = int8.decode(codes, scales)
        assert (decoded.abs() <= value.abs() * (1 + 4 * FLOAT32.eps)).all()
        value = 0.9 * decoded
    assert not codes.any()
    assert not scales.any()
