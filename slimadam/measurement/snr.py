"""Signal-to-noise ratio of second moments.

Source: Kalra et al., "When Can You Get Away with Low Memory Adam?" (arXiv 2503.01843), equation for ``SNR_K``. The
factored form judges Shazeer & Stern's row-column product (arXiv 1804.04235) on the same scale.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, dimension_subsets, normalize_candidate

CONSTANT_RELATIVE_VARIANCE = 1e-28
# 4 MB in float64, which a processor's cache holds; an accelerator needs more to be busy.
_CHUNK_ELEMENTS = 1 << 19
_CHUNK_ELEMENTS_ON_ACCELERATORS = 1 << 23


def snr(v: Tensor, dims: int | Sequence[int] | Literal["factored"], batch_dims: int = 0) -> float:
    """Compute the signal-to-noise ratio of a second moment for one way of compressing it.

    ``SNR_K(v)`` is the mean over the remaining dimensions of ``mean_K(v)**2 / var_K(v)`` with the population
    variance. For ``"factored"`` it is ``mean(f)**2 / var(f)`` of the residual
    ``f = v * mean(v) / (r c)``, where ``r`` averages over all dimensions but the first and ``c`` over the
    first (of each matrix); entries whose row or column is zero are left out.

    Slices that are constant lose nothing by being averaged and are left out of the outer mean.

    Args:
        v: Second moment, any shape, real or complex (real and imaginary parts count as a last dimension
            that is kept). Computed in float64.
        dims: Dimension or dimensions to average over, negative ones counted from the end, or ``"factored"``
            (at least two dimensions).
        batch_dims: Number of leading dimensions that count separate matrices, such as experts. The factored
            form's ratio is that of each matrix, averaged over them; the other ratios do not depend on it.

    Returns:
        The ratio; infinity if every slice is constant; NaN if ``v`` has a NaN or infinite entry.

    Raises:
        ValueError: ``dims`` is empty, repeated or out of range, or ``batch_dims`` leaves no matrix to factor.
    """
    candidate = normalize_candidate(dims, v.dim())
    check_count("batch_dims", batch_dims, 0)
    if candidate == FACTORED and v.dim() < batch_dims + 2:
        raise ValueError(f"batch_dims={batch_dims} leaves no matrix of shape {tuple(v.shape)} for dims='factored'")
    return _ratios(v, [candidate], batch_dims)[candidate]


def measure(v: Tensor, batch_dims: int = 0) -> dict[Candidate, float]:
    """Compute the SNR of every candidate of one second moment, in the order of :func:`dimension_subsets`.

    Takes a few passes over ``v`` and a few MB of memory besides averages of ``v``.

    Args:
        v: Second moment of any shape.
        batch_dims: Number of leading dimensions that count separate matrices, as in :func:`snr`.

    Returns:
        Each candidate's SNR; ``"factored"`` is among them from two dimensions per matrix on. Empty for scalars,
        and for more than 8 dimensions, which have too many subsets.

    Raises:
        ValueError: ``batch_dims`` is negative.
    """
    check_count("batch_dims", batch_dims, 0)
    if v.dim() > MAX_NDIM:
        return {}
    wanted: list[Candidate] = [*dimension_subsets(v.dim())]
    if v.dim() >= batch_dims + 2:
        wanted.append(FACTORED)
    return _ratios(v, wanted, batch_dims)


def check_count(name: str, value: object, least: int) -> None:
    """Raise :class:`ValueError` unless an argument is an integer that is large enough.

    Args:
        name: Its name.
        value: Its value.
        least: The smallest that is.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer >= {least}")


class _Moments(NamedTuple):
    """Mean of each slice of ``size`` entries, and the sum of squared distances from it (None: zero)."""

    size: int
    mean: Tensor
    spread: Tensor | None

    def pooled(self, dim: int, scratch: Tensor) -> _Moments:
        """Merge the slices along a dimension."""
        mean = self.mean.mean(dim, keepdim=True)
        distance = torch.sub(self.mean, mean, out=scratch[: self.mean.numel()].view(self.mean.shape))
        spread = distance.square_().sum(dim, keepdim=True).mul_(self.size)
        if self.spread is not None:
            spread += self.spread.sum(dim, keepdim=True)
        return _Moments(self.size * self.mean.shape[dim], mean, spread)

    def joined(self, other: _Moments) -> _Moments:
        """Merge each slice with more entries of it (Chan, Golub & LeVeque, 1979)."""
        assert self.spread is not None
        assert other.spread is not None
        size = self.size + other.size
        distance = other.mean - self.mean
        mean = self.mean + distance * (other.size / size)
        spread = self.spread + other.spread + distance.square_() * (self.size * other.size / size)
        return _Moments(size, mean, spread)

    def ratios(self) -> Tensor:
        assert self.spread is not None
        return _sum_and_number(self.mean, self.spread / self.size)


def _sum_and_number(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the sum and number of the ratios of the slices that are not constant."""
    signal = mean.square()
    varies = ~(variance <= CONSTANT_RELATIVE_VARIANCE * signal)
    return torch.stack([torch.where(varies, signal / variance, 0.0).sum(), varies.sum()])


_Known = dict[tuple[int, ...], _Moments]


class _Chunks:
    """A tensor in float64, a few slices along its longest dimension at a time, in reused memory.

    float64 tensors are divided by their largest entry so that squares do not underflow; in narrower types they cannot.
    Complex tensors get a last dimension for real and imaginary parts.
    """

    def __init__(self, v: Tensor) -> None:
        self.shape = v.shape
        self.longest = max(range(v.dim()), key=lambda dim: v.shape[dim])
        self._v = torch.view_as_real(v.resolve_conj()) if v.is_complex() else v
        slice_elements = self._v.numel() // v.shape[self.longest]
        elements = _CHUNK_ELEMENTS if v.is_cpu else _CHUNK_ELEMENTS_ON_ACCELERATORS
        self._length = min(v.shape[self.longest], max(1, elements // slice_elements))
        self._values, self.scratch = torch.empty(
            2, self._length * slice_elements, dtype=torch.float64, device="cpu" if v.is_mps else v.device
        )
        self._scale: Tensor | None = None
        if self._v.dtype == torch.float64:
            largest = self._v.amax()
            self._scale = torch.where(largest > 0, largest, 1.0)

    def __iter__(self) -> Iterator[Tensor]:
        for part in torch.split(self._v, self._length, self.longest):
            chunk = self._values[: part.numel()].view(part.shape).copy_(part)
            yield chunk if self._scale is None else chunk.div_(self._scale)

    def split(self, kept: Tensor) -> Sequence[Tensor]:
        """Split a tensor with some dimensions averaged to size 1 as the chunks are."""
        if kept.shape[self.longest] > 1:
            return torch.split(kept, self._length, self.longest)
        return [kept] * math.ceil(self.shape[self.longest] / self._length)

    def moments(self, dims: tuple[int, ...], known: _Known) -> _Moments:
        """Compute moments over ``dims`` from those of a subset, which leaves out the shortest dimension."""
        if dims not in known:
            shortest = min(dims, key=lambda dim: (self.shape[dim], dim == self.longest))
            subset = tuple(dim for dim in dims if dim != shortest)
            known[dims] = self.moments(subset, known).pooled(shortest, self.scratch)
        return known[dims]


@torch.no_grad()
def _ratios(v: Tensor, wanted: Sequence[Candidate], batch_dims: int) -> dict[Candidate, float]:
    if v.numel() == 0 or not wanted:
        return dict.fromkeys(wanted, math.inf)
    chunks = _Chunks(v)
    subsets = [candidate for candidate in wanted if candidate != FACTORED]
    row_dims, column_dims = tuple(range(batch_dims + 1, v.dim())), (batch_dims,)
    averages = [row_dims, column_dims] if FACTORED in wanted else []
    sums, means = _subset_sums(chunks, subsets, averages)
    if averages:
        rows, columns = means
        sums[FACTORED] = _residual_sum(chunks, rows, columns, row_dims, column_dims)
    # One transfer from the device for all candidates.
    found = torch.stack([sums[candidate] for candidate in wanted]).tolist()
    pairs = zip(wanted, found, strict=True)
    return {candidate: total / number if number else math.inf for candidate, (total, number) in pairs}


def _subset_sums(
    chunks: _Chunks, subsets: Sequence[tuple[int, ...]], averages: Sequence[tuple[int, ...]]
) -> tuple[dict[Candidate, Tensor], list[Tensor]]:
    """Return the sum and number of each subset's ratios, and the means over the subsets in ``averages``."""
    within = [dims for dims in subsets if chunks.longest not in dims]
    sums: dict[Candidate, Tensor] = {}
    means: list[list[Tensor]] = [[] for _ in averages]
    along: _Moments | None = None
    for chunk in chunks:
        known: _Known = {(): _Moments(1, chunk, None)}
        for dims in within:
            ratios = chunks.moments(dims, known).ratios()
            sums[dims] = sums[dims] + ratios if dims in sums else ratios
        for dims, found in zip(averages, means, strict=True):
            if chunks.longest not in dims:
                found.append(chunks.moments(dims, known).mean)
        more = chunks.moments((chunks.longest,), known)
        along = more if along is None else along.joined(more)
    assert along is not None
    known = {(chunks.longest,): along}
    sums |= {dims: chunks.moments(dims, known).ratios() for dims in subsets if chunks.longest in dims}
    full = [
        torch.cat(found, chunks.longest) if found else chunks.moments(dims, known).mean
        for dims, found in zip(averages, means, strict=True)
    ]
    return sums, full


def _residual_sum(
    chunks: _Chunks, rows: Tensor, columns: Tensor, row_dims: tuple[int, ...], column_dims: tuple[int, ...]
) -> Tensor:
    """Return the sum and number of the ratios of each matrix's residual ``f = v * mean(v) / (r c)``.

    Row by row, ``sum(f - 1)`` and ``sum((f - 1)**2)`` are those of ``(v mean(v) / c - r) / r``.
    """
    kept_rows, kept_columns = (rows != 0).double(), (columns != 0).double()
    mean = rows.mean(column_dims, keepdim=True)
    by_columns = torch.where(columns != 0, mean / columns, 0.0)
    first, second = torch.zeros_like(rows), torch.zeros_like(rows)
    split = map(chunks.split, (rows, kept_columns, by_columns, first, second))
    for chunk, row, kept, by_column, firsts, seconds in zip(chunks, *split, strict=True):
        distance = chunk.mul_(by_column).addcmul_(row, kept, value=-1)
        firsts += distance.sum(row_dims, keepdim=True)
        seconds += distance.square_().sum(row_dims, keepdim=True)
    by_rows = torch.where(rows != 0, 1 / rows, 0.0)
    number = (kept_rows.sum(column_dims, keepdim=True) * kept_columns.sum(row_dims, keepdim=True)).clamp_min_(1)
    excess = (first * by_rows).sum(column_dims, keepdim=True) / number
    variance = (second * by_rows.square()).sum(column_dims, keepdim=True) / number - excess.square()
    return _sum_and_number(1 + excess, variance)


def small_snr(v: NDArray[np.float64], dims: Sequence[int]) -> float:
    """Compute the SNR of a few thousand entries, as :func:`snr` of more.

    Args:
        v: The entries, not negative.
        dims: Dimensions to average over, not negative; each once.
    """
    largest = v.max(initial=0.0)
    scaled = v / largest if 0 < largest < math.inf else v
    axes = tuple(dims)
    with np.errstate(invalid="ignore"):  # what is not finite makes the result NaN
        mean = scaled.mean(axes, keepdims=True)
        signal, variance = mean.squeeze(axes) ** 2, np.square(scaled - mean).mean(axes)
        varies = ~(variance <= CONSTANT_RELATIVE_VARIANCE * signal)
        return float((signal[varies] / variance[varies]).mean()) if varies.any() else math.inf


def average_snr(measurements: Iterable[Mapping[Candidate, float]]) -> dict[Candidate, float]:
    """Return the mean of each candidate's SNR; NaN does not count, infinity only where nothing else was measured."""
    collected: dict[Candidate, list[float]] = {}
    for measured in measurements:
        for candidate, value in measured.items():
            if not math.isnan(value):
                collected.setdefault(candidate, []).append(value)
    return {
        candidate: statistics.fmean(list(filter(math.isfinite, values)) or [math.inf])
        for candidate, values in collected.items()
    }
