"""DTensors: their local shards, the full tensor, the ranks that share it."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, TypeGuard

import torch
from torch import Tensor

from slimadam.utils import torch_private

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


FLAT: Final = (
    "which lays parameters end to end and cuts them anywhere, so that rows and columns are gone; shard with "
    "torch.distributed.fsdp.fully_shard, which keeps them"
)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, sharing its memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    held = torch_private.local_tensor(tensor)
    if type(held) is Tensor or not hasattr(held, "wait"):
        return held
    return held.wait()  # type: ignore[no-any-return]  # what an asynchronous collective returned


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor, gathered on every rank, which all must ask; any other tensor as it is."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def fill(target: DTensor, values: Tensor) -> None:
    """Write to a DTensor what this rank holds of it.

    Args:
        target: Is written to.
        values: Of its global shape, the same on every rank.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = target.device_mesh
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local(target).copy_(local(everywhere.redistribute(mesh, target.placements)))


def laid_out_as(other: DTensor, held: Tensor, shape: Sequence[int] | None = None) -> DTensor:
    """A DTensor with the mesh and placements of another.

    Args:
        other: The other.
        held: What this rank holds.
        shape: The global shape; None: the other's.
    """
    from torch.distributed.tensor import DTensor

    size, strides = other.shape, other.stride()
    if shape is not None:
        size, strides = torch.Size(shape), torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(held, other.device_mesh, other.placements, run_check=False, shape=size, stride=strides)


def place(target: Tensor, source: Tensor) -> None:
    """Write a tensor of the same global shape to a DTensor, however that tensor lies; every rank must call.

    Args:
        target: A DTensor, which is written to.
        source: A DTensor, or a tensor that every rank has all of.
    """
    assert is_dtensor(target)
    alike = is_dtensor(source) and source.device_mesh == target.device_mesh and source.placements == target.placements
    if alike:
        local(target).copy_(local(source))
    else:
        fill(target, full_tensor(source).to(local(target).device))


def on_any_rank(flag: bool, params: Iterable[Tensor]) -> bool:
    """Whether something is so here, or on a rank that holds shards of the same parameters; all of those must ask."""
    groups = dict.fromkeys(
        (local(param).device, group)
        for param in params
        if is_dtensor(param) and param.device.type != "meta"
        for group in groups_of(param, range(param.device_mesh.ndim))
    )
    for device, group in groups:
        found = torch.tensor(int(flag), device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        flag = bool(found)
    return flag


def differing(described: Iterable[tuple[str, Tensor, str]]) -> str | None:
    """The name of a parameter of which another rank with shards of it has another description; all must ask.

    Args:
        described: Name, parameter and description; in the same order on every rank.
    """
    by_group: dict[tuple[torch.device, ProcessGroup], list[tuple[str, int]]] = {}
    for name, param, text in described:
        if is_dtensor(param) and param.device.type != "meta":
            for group in groups_of(param, range(param.device_mesh.ndim)):
                by_group.setdefault((local(param).device, group), []).append((name, zlib.crc32(text.encode())))
    found = None
    for (device, group), sums in by_group.items():
        own = torch.tensor([[value, -value] for _, value in sums], device=device)
        largest = own.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        found = found or next(
            (name for (name, _), same in zip(sums, largest == own, strict=True) if not same.all()), None
        )
    return found


def local_gradient(name: str, param: Tensor) -> Tensor:
    """What this rank holds of a parameter's gradient, laid out as the parameter is.

    Raises:
        RuntimeError: The gradient of a DTensor is none.
    """
    grad = param.grad
    assert grad is not None
    if not is_dtensor(param):
        return grad
    if not is_dtensor(grad):
        raise RuntimeError(
            f"{name!r}: the parameter is a DTensor, its gradient a {type(grad).__name__}; assign a DTensor with the "
            "parameter's mesh and placements (torch.distributed.tensor.distribute_tensor)"
        )
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def is_flat(param: Tensor) -> bool:
    """Whether another library laid parameters end to end to make this one, and said so."""
    return bool(
        getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id")
    )


def check_not_flat(name: str, param: Tensor) -> None:
    """Refuse what other libraries made of parameters by laying them end to end: rows and columns are gone.

    Raises:
        RuntimeError: Says what to use instead.
    """
    if is_flat(param):
        owner = "DeepSpeed's ZeRO" if hasattr(param, "ds_id") else "FullyShardedDataParallel"
        raise RuntimeError(f"{name!r} belongs to {owner}, {FLAT}, or use plan=None, which needs none")


def check_placement(name: str, param: DTensor) -> None:
    """Refuse a parameter that lies on other ranks only.

    Raises:
        RuntimeError: This rank is not part of the parameter's mesh.
    """
    if param.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"{name!r} lies on {param.device_mesh}, which this rank {torch.distributed.get_rank()} is not part of; "
            "build this rank's optimizer without it, or keep its second moment in full, CompressionPlan({name: Rule()})"
        )


def groups_of(param: DTensor, mesh_dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """The process groups of some dimensions of a parameter's mesh; none where this rank is not part of it."""
    if param.device_mesh.get_coordinate() is None:
        return ()
    return tuple(param.device_mesh.get_group(index) for index in mesh_dims)
