"""Grids of second moments: a few rows by a few columns of a matrix that is stored as averages, tracked in full.

They tell while ``AutoPlan(start="slim")`` measures what each candidate would average away, without the full moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from slimadam.kernels.interface import second_moment_dtype
from slimadam.measurement.slices import Index, TrackedSlices, counts_of, shard_of, take
from slimadam.measurement.snr import small_snr
from slimadam.state import second_moment
from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, Rule, dimension_subsets
from slimadam.utils.dtensor import full_tensor, is_dtensor
from slimadam.utils.errors import shown

SMALLEST_GRID: Final = 64
"""Elements of a grid, at least."""
LARGEST_GRID: Final = 1 << 13
"""And at most: a ratio is then known to a few percent, and seeing each gradient costs little."""
_NOT_THINNED: Final = 4
"""The largest size of a dimension that is not thinned."""
_FEWEST: Final = 8
"""Elements of a slice from which its ratio is estimated, at least."""


@dataclass
class Grid(TrackedSlices):
    """The tracked second moments of one parameter, or part, that is stored as row and column averages."""

    @classmethod
    def of(cls, param: Tensor, rule: Rule, share: float) -> Grid | str:
        """Return the grid of a parameter, or of a part; in words why there is none.

        Args:
            param: The parameter.
            rule: Stores its second moment, or the part's, as row and column averages.
            share: Share of AdamW's second moment that the grid and the averages may take together.
        """
        assert rule.shape is not None
        if len(rule.shape) > MAX_NDIM:
            return f"not measured: more than {MAX_NDIM} dimensions"
        dtype = second_moment_dtype(param.dtype)
        allowed = int(share * math.prod(rule.shape) * param.dtype.itemsize / dtype.itemsize)
        index = place_grid(rule.shape, min(LARGEST_GRID, allowed - rule.stored_elements(rule.shape)))
        if index is None:
            return f"too small to measure within calibration_memory={share:g}"
        shard = None
        if is_dtensor(param):
            shard = None if rule.part else shard_of(param, is_flat=False)
            if shard is None:
                return "cannot be measured through these shards"
        return cls(rule, index, dtype, shard)

    @torch.no_grad()
    def measured(self, state: Mapping[str, Any]) -> dict[Candidate, float]:
        """Return the SNR of each candidate, estimated from the grid (collective); none before the first gradient.

        Args:
            state: The parameter's state, with its row and column averages.
        """
        averages = second_moment.moments_of(state, [self.rule])
        if self.moment is None or not averages:
            return {}
        assert self.rule.shape is not None
        moment, shape = self.full_moment().cpu(), self.rule.shape
        entries = moment.double().numpy()
        found: dict[Candidate, float] = {}
        for dims in dimension_subsets(len(shape)):
            seen, size = (math.prod(sizes[dim] for dim in dims) for sizes in (moment.shape, shape))
            if seen == size or seen >= _FEWEST:
                found[dims] = _of_all(small_snr(entries, dims), seen, size)
        found[FACTORED] = self.factored_snr(moment, [full_tensor(one) for one in averages])
        return found

    def begun(self, full: Tensor | None) -> Grid:
        """Return this grid at its beginning.

        Args:
            full: The parameter's second moment, where it is known; its elements are copied.
        """
        found = None
        if full is not None:
            found = take(self.rule.take(full.detach()), self.index)[self.there].to(self.dtype, copy=True)
        return replace(self, moment=found)

    def forget(self, found: Tensor | None = None, dim: int = 0) -> None:
        """Begin anew, or with zeros at some positions along a dimension of the parameter.

        Args:
            found: The positions; None: all.
            dim: The dimension.
        """
        if found is None or self.moment is None:
            self.moment = None
            return
        shape = self.rule.owner_shape
        assert shape is not None
        chosen = torch.zeros(shape, dtype=torch.bool).index_fill_(dim, found.cpu(), True)
        self.moment.masked_fill_(take(self.rule.take(chosen), self.here).to(self.moment.device), 0)

    def to_dict(self) -> dict[str, Any]:
        """Return what is tracked, for a checkpoint; nothing for a DTensor, of which each rank has its own."""
        return {} if self.shard is not None or self.moment is None else {"moment": self.moment}

    def load(self, key: str, saved: Mapping[str, Any]) -> None:
        """Go on from the result of :meth:`to_dict`; the tensor is copied.

        Args:
            key: Name of the parameter, for errors.
            saved: The result.

        Raises:
            ValueError: It is damaged, or of another shape.
        """
        moment = saved.get("moment") if isinstance(saved, Mapping) else saved
        if moment is None:
            return
        if not isinstance(moment, Tensor) or tuple(moment.shape) != counts_of(self.index):
            raise ValueError(
                f"{key!r}: moment={shown(moment)} must be a tensor of shape {counts_of(self.index)}; pass the state "
                "dict as it was saved"
            )
        self.moment = moment.detach()[self.there].to(self.dtype, copy=True)


def place_grid(shape: Sequence[int], elements: int) -> Index | None:
    """Return a grid, thinned alike in all dimensions; None where it would be smaller than 64 elements.

    Distances are odd, so that they do not keep step with heads and other blocks, whose sizes are even.

    Args:
        shape: Shape of the parameter, or part.
        elements: How many the grid may have.
    """
    strides, counts = [1] * len(shape), list(shape)
    while math.prod(counts) > elements:
        long = [dim for dim, count in enumerate(counts) if count > _NOT_THINNED]
        if not long:
            return None
        dim = min(long, key=lambda dim: (strides[dim], -counts[dim]))
        strides[dim] += 2
        counts[dim] = shape[dim] // strides[dim]
    if math.prod(counts) < SMALLEST_GRID:
        return None
    pairs = zip(counts, strides, strict=True)
    return tuple(slice(stride // 2, stride // 2 + count * stride, stride) for count, stride in pairs)


def _of_all(ratio: float, seen: int, size: int) -> float:
    """Return an estimate of the mean of ``mean**2 / var`` of whole slices from that of some elements of each.

    The mean of ``n`` elements has the variance ``var / n``, the population variance of ``n`` is too small by
    ``(n - 1) / n``, and the expectation of its inverse too large by ``(n - 1) / (n - 3)``, the latter where the
    elements are normally distributed.

    Args:
        ratio: The mean ratio of the elements seen.
        seen: Elements seen of each slice.
        size: Elements of each slice.
    """
    if seen == size or not math.isfinite(ratio):
        return ratio
    return max(0.0, ratio * (seen - 3) / seen - (1 - seen / size) / seen)
