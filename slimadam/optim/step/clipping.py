"""Clipping the global norm of gradients (arXiv 1211.5063) without writing them: the norm, and the factor it makes.

As ``torch.nn.utils.clip_grad_norm_``. Of many elements in float32 torch's norm loses precision on a CPU, 0.3% of 38
million; here it is taken of 16384 at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimadam.kernels.interface import second_moment_dtype
from slimadam.utils.dtensor import check_placement, groups_of, is_dtensor, is_flat, local_gradient
from slimadam.utils.torch_private import disable_dynamo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LONGEST_SUM = 1 << 14
"""Elements whose squares are summed by one ``vector_norm``: longer running sums lose precision."""

_CONVERTED_AT_ONCE = 1 << 18
_SMALL = 1e-6  # torch's


def check_have_norm(params: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters of whose gradients this rank cannot know the norm; they come with their names.

    Raises:
        RuntimeError: Says what to use instead.
    """
    for name, param in params:
        _check_has_norm(name, param)


def _check_has_norm(name: str, param: Tensor) -> None:
    if is_flat(param):
        raise RuntimeError(
            f"max_grad_norm: {name!r} is a flat parameter, of which each rank holds a piece that it knows nothing more "
            "about; use max_grad_norm=None and the clip_grad_norm_ of the library that made it, or shard with "
            "torch.distributed.fsdp.fully_shard"
        )
    if is_dtensor(param):
        try:
            check_placement(name, param)
        except RuntimeError as error:
            raise RuntimeError(f"max_grad_norm: {error}, or use max_grad_norm=None") from None


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``: what gradients of a global norm are multiplied by.

    Zero for an infinite norm, and NaN for one that is NaN, as in torch.

    Args:
        norm: 0-dimensional.
        max_norm: What it is clipped to.
    """
    return (max_norm / (norm + _SMALL)).clamp(max=1.0)


def global_norm(params: Iterable[tuple[str, Tensor]]) -> Tensor:
    """The L2 norm of all gradients together, on the device of the first; all ranks that share DTensors must ask.

    Args:
        params: Parameters that have a gradient, with their names. Tensors that are no DTensors count on every rank as
            its own.

    Returns:
        0-dimensional, in float32, or float64 where a gradient is.
    """
    held: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for name, param in params:
        held.setdefault(_sharing(param), []).append(local_gradient(name, param))
    norms = [_over_ranks(_combined(_norms(grads)), groups) for groups, grads in held.items()]
    return _combined(norms) if norms else torch.zeros(())


def norm_in_step(params: Iterable[tuple[str, Tensor]]) -> Tensor:
    """:func:`global_norm`, which ``torch.compile`` does not trace where it waits for other ranks."""
    held = list(params)
    if torch.compiler.is_compiling() and any(is_dtensor(param) for _, param in held):
        return _untraced_norm(held)
    return global_norm(held)


@disable_dynamo
def _untraced_norm(params: list[tuple[str, Tensor]]) -> Tensor:
    return global_norm(params)


def _sharing(param: Tensor) -> tuple[ProcessGroup, ...]:
    """The process groups over which a parameter is sharded."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements
    return groups_of(
        param, [dim for dim, one in enumerate(placements) if not one.is_replicate() and mesh.size(dim) > 1]
    )


def _over_ranks(norm: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    if not groups:
        return norm
    total = norm.square()
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt()


def _combined(norms: Iterable[Tensor]) -> Tensor:
    """The norm of what has these norms, on the first one's device."""
    flat = [norm.reshape(-1) for norm in norms]
    dtype = reduce(torch.promote_types, (norm.dtype for norm in flat))
    norm: Tensor = torch.linalg.vector_norm(torch.cat([norm.to(flat[0].device, dtype) for norm in flat]))
    return norm


def _norms(grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """Norms of the gradients, or of pieces of them."""
    at_once: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        wide = second_moment_dtype(real.dtype)
        if real.device.type == "cpu" and real.numel() > LONGEST_SUM and not torch.compiler.is_compiling():
            yield from _norms_of_pieces(real, wide)
        else:
            at_once.setdefault(wide, []).append(real)
    for wide, reals in at_once.items():
        yield from torch._foreach_norm(reals, 2, dtype=wide)


def _norms_of_pieces(grad: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Norms of at most ``LONGEST_SUM`` elements each; what must be converted is so some elements at a time."""
    strides = grad.stride()
    flat = grad.permute(sorted(range(grad.dim()), key=lambda dim: -strides[dim])).reshape(-1)
    together = flat.numel() if flat.dtype == dtype else _CONVERTED_AT_ONCE
    for start in range(0, flat.numel(), together):
        block = flat[start : start + together].to(dtype)
        rows = block.numel() // LONGEST_SUM
        yield torch.linalg.vector_norm(block[: rows * LONGEST_SUM].view(rows, LONGEST_SUM), dim=1)
        yield torch.linalg.vector_norm(block[rows * LONGEST_SUM :])
