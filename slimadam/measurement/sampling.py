"""Samples of second moments that are tracked in full: where they lie, when they need gradients, their SNR."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from slimadam.measurement.snr import snr
from slimadam.state.rule import FACTORED, Rule
from slimadam.utils import torch_private

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

LARGEST_SHARE: Final = 0.01
SMALLEST_SAMPLE: Final = 32

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

Index = tuple[slice, ...]
"""Evenly spaced indices along each dimension of a parameter, or of its elements laid end to end."""


def thinning(beta2: float) -> int:
    """Return every how many steps a sample needs to see the gradient.

    Independent Gaussian gradients whose variances differ within a slice by ``h = std / mean`` give a second moment
    with ``1 / SNR = h**2 + 2 (1 + h**2) / N``, where ``N = (1 + beta2) / (1 - beta2)`` is how many of them the
    exponential average holds. Seeing every ``n``-th with ``beta2**n`` keeps the time it looks back on and leaves
    ``N / n`` gradients, which divides the SNR by about ``1 + 2 (n - 1) (SNR + 1) / N``. With ``n = 0.03 / (1 - beta2)``
    that is at most 1.06 at ``SNR = 1`` and 1.33 at 10, where nothing is decided; up to ``beta2 = 0.97`` no step is
    left out.
    """
    return max(1, round(0.03 / (1 - beta2)))


def filling(beta2: float) -> int:
    """Return the steps after which a second moment has forgotten all but 5% of where it started."""
    return math.ceil(3 / (1 - beta2))


def next_look(step: int, beta2: float, interval: int) -> int:
    """Return the next step in which a sample sees the gradient.

    It rests until :func:`filling` steps before each measurement, then sees one in :func:`thinning` steps at irregular
    distances. At regular ones it would see always or never what has a gradient in each second or tenth step. The
    fractional parts of multiples of the golden ratio are evenly distributed and have no period.

    Args:
        step: The first step in question, from 0.
        beta2: Decay rate of second moments.
        interval: Steps between measurements.
    """
    every, rest = thinning(beta2), interval - filling(beta2)
    while True:
        first = max(step, step - step % interval + rest)
        in_turn = (
            number * every + int(every * (number * _GOLDEN_RATIO % 1)) for number in itertools.count(first // every)
        )
        look = next(at for at in in_turn if at >= first)
        if look % interval >= rest:
            return look
        step = look  # in the rest of a later interval


def place(rule: Rule, shape: tuple[int, ...]) -> Index | None:
    """Return the index of a parameter's sample: at most 1% of the second-moment elements that the rule saves.

    Slices that share one value (for the factored form: rows) are sampled whole and spread over as many different
    experts or heads as there are, so small dimensions are used up first. Where all dimensions are averaged, single
    elements are sampled at a distance that meets each row and column in turn.

    Args:
        rule: How the second moment is stored.
        shape: Shape of the parameter.

    Returns:
        None if so little is saved that the sample would hold no slice, or fewer than 32 elements.
    """
    elements = math.prod(shape)
    budget = int(LARGEST_SHARE * (elements - rule.stored_elements(shape)))
    if budget < SMALLEST_SAMPLE:
        return None
    single = range(rule.batch_dims + 1) if rule.form == FACTORED else set(range(len(shape))) - set(rule.dims)
    kept = [dim for dim in single if shape[dim] > 1]
    if kept:
        counts, slices = list(shape), budget // (elements // math.prod(shape[dim] for dim in kept))
        for dim in sorted(kept, key=shape.__getitem__):
            counts[dim] = min(shape[dim], slices)
            slices //= max(1, counts[dim])
        strides = [size // max(1, count) for size, count in zip(shape, counts, strict=True)]
    else:
        strides = [next(n for n in range(elements // budget + 1, elements) if math.gcd(n, elements) == 1)]
        counts = [elements // strides[0]]
    if math.prod(counts) < SMALLEST_SAMPLE:
        return None
    pairs = zip(counts, strides, strict=True)
    return tuple(slice(stride // 2, stride // 2 + count * stride, stride) for count, stride in pairs)


def counts_of(index: Index) -> tuple[int, ...]:
    """Return the number of indices along each dimension."""
    return tuple((one.stop - one.start) // (one.step or 1) for one in index)


def take(tensor: Tensor, index: Index) -> Tensor:
    """Return the sampled elements; a view unless all dimensions are averaged and the tensor is not contiguous.

    Args:
        tensor: The whole, or a shard.
        index: Position of the sample in it.
    """
    return (tensor if tensor.dim() == len(index) else tensor.reshape(-1))[index]


class SampleShard(NamedTuple):
    """A rank's shard of a DTensor that is sampled.

    Attributes:
        spans: First index along each dimension, and the number of indices.
        mesh: Mesh of the DTensor.
        mesh_dims: Dimensions of the mesh along which the DTensor is sharded.
    """

    spans: Sequence[tuple[int, int]]
    mesh: DeviceMesh
    mesh_dims: Sequence[int]

    @classmethod
    def of(cls, param: DTensor, is_flat: bool) -> SampleShard | None:
        """Return this rank's shard, or None where that is not one block of the parameter.

        Args:
            param: The parameter.
            is_flat: Lay its elements end to end.
        """
        from torch.distributed.tensor import Shard

        mesh = param.device_mesh
        cuts = {
            index: placement
            for index, placement in enumerate(param.placements)
            if not placement.is_replicate() and mesh.size(index) > 1
        }
        if any(type(cut) is not Shard or (is_flat and cut.dim > 0) for cut in cuts.values()):
            return None
        shape, offsets = torch_private.local_shape_and_offset(param)
        row = param.shape[1:].numel() if is_flat else 1
        spans = [(first * row, count * row) for first, count in zip(offsets, shape, strict=True)]
        return cls(spans[:1] if is_flat else spans, mesh, tuple(cuts))


def within(sampled: slice, first: int, count: int) -> tuple[slice, slice]:
    """Return which of some evenly spaced indices lie in a span: relative to its beginning, and their numbers.

    Args:
        sampled: The indices.
        first: First index of the span.
        count: Length of the span.
    """
    start, stop, stride = sampled.start, min(sampled.stop, first + count), sampled.step
    begin = max(0, -((start - first) // stride))
    end = max(begin, -((start - stop) // stride))
    at = start + begin * stride - first
    return slice(at, at + (end - begin) * stride, stride), slice(begin, end)


def sampled_snr(rule: Rule, index: Index, moment: Tensor, averages: Sequence[Tensor]) -> float:
    """Compute the SNR of a sample, defined as :func:`slimadam.snr` of the whole (arXiv 2503.01843).

    Args:
        rule: How the parameter is stored.
        index: Position of the sample in it.
        moment: The sample's full second moments.
        averages: The stored second moments. The factored form's row and column averages say what is expected of the
            sample; where leading dimensions count matrices the result is the mean over these.

    Returns:
        The ratio; infinity where the sample is constant or no gradient has reached it, NaN where it is not finite.
    """
    moment = moment.cpu()  # small, and the host would wait for each of the numbers that follow
    if rule.form != FACTORED:
        return snr(moment, rule.dims if len(index) > 1 else 0)
    row_dim = rule.batch_dims
    rows, columns = (one.cpu().to(torch.float64) for one in averages)
    relative = rows / rows.mean(row_dim, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    expected = relative[index[: row_dim + 1]] * columns[index[:row_dim]]
    matrices = [math.prod(moment.shape[:row_dim]), -1]
    pairs = zip((moment / expected).reshape(matrices), expected.reshape(matrices), strict=True)
    found = [snr(ratio[product != 0], 0) for ratio, product in pairs]
    telling = [value for value in found if value != math.inf]
    return math.fsum(telling) / len(telling) if telling else math.inf
