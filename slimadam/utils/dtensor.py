"""DTensors: their shards, the full tensor, and the ranks that share it."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Placement


FLAT: Final = (
    "which lays parameters end to end and cuts them anywhere, so that rows and columns are gone; shard with "
    "torch.distributed.fsdp.fully_shard, which keeps them"
)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor
    if type(shard) is Tensor or not hasattr(shard, "wait"):
        return shard
    return shard.wait()  # type: ignore[no-any-return]  # the result of an asynchronous collective


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor on every rank; any other tensor as it is. Collective."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def laid_out_as(
    other: DTensor, held: Tensor, shape: Sequence[int] | None = None, placements: Sequence[Placement] | None = None
) -> DTensor:
    """Return a DTensor on the mesh of another.

    Args:
        other: The other DTensor.
        held: This rank's shard.
        shape: The global shape; None for the other's.
        placements: The placements; None for the other's.
    """
    from torch.distributed.tensor import DTensor

    size, strides = other.shape, other.stride()
    if shape is not None:
        size, strides = torch.Size(shape), torch.empty(tuple(shape), device="meta").stride()
    lies = other.placements if placements is None else placements
    return DTensor.from_local(held, other.device_mesh, lies, run_check=False, shape=size, stride=strides)


def place(target: Tensor, source: Tensor) -> None:
    """Write a tensor of the same global shape to a DTensor. Collective.

    Args:
        target: The DTensor.
        source: A DTensor of any placements, or a full tensor that every rank has.
    """
    from torch.distributed.tensor import DTensor, Replicate

    assert is_dtensor(target)
    mesh, own = target.device_mesh, local(target)
    if not is_dtensor(source) or source.device_mesh != mesh or source.placements != target.placements:
        full = full_tensor(source).to(own.device)
        source = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        source = source.redistribute(mesh, target.placements)
    own.copy_(local(source))


def _groups_by_device(param: Tensor) -> Iterator[tuple[torch.device, ProcessGroup]]:
    """Yield the process groups that share a DTensor, with the device of this rank's shard."""
    if is_dtensor(param) and param.device.type != "meta":
        for group in groups_of(param, range(param.device_mesh.ndim)):
            yield local(param).device, group


def on_any_rank(flag: bool, params: Iterable[Tensor]) -> bool:
    """Return whether a flag is true on any rank that holds shards of the same parameters. Collective.

    Args:
        flag: This rank's flag.
        params: The parameters.
    """
    for device, group in dict.fromkeys(found for param in params for found in _groups_by_device(param)):
        found = torch.tensor(int(flag), device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group)
        flag = bool(found)
    return flag


def differing(described: Iterable[tuple[str, Tensor, str]]) -> str | None:
    """Return the name of a parameter that another rank with shards of it describes otherwise. Collective.

    Args:
        described: Name, parameter and description; in the same order on every rank.
    """
    by_group: dict[tuple[torch.device, ProcessGroup], list[tuple[str, int]]] = {}
    for name, param, text in described:
        for key in _groups_by_device(param):
            by_group.setdefault(key, []).append((name, zlib.crc32(text.encode())))
    found = None
    for (device, group), sums in by_group.items():
        own = torch.tensor([[value, -value] for _, value in sums], device=device)
        largest = own.clone()
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
        differ = (largest != own).any(dim=1).tolist()
        found = found or next((name for (name, _), differs in zip(sums, differ, strict=True) if differs), None)
    return found


def local_gradient(name: str, param: Tensor) -> Tensor:
    """Return this rank's shard of a parameter's gradient, with the placements of the parameter.

    Args:
        name: The parameter's name, for errors.
        param: The parameter, with a gradient.

    Raises:
        RuntimeError: The parameter is a DTensor and its gradient is not.
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
    """Return whether another library has marked a parameter as made of several, laid end to end."""
    return bool(
        getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False) or hasattr(param, "ds_id")
    )


def check_not_flat(name: str, param: Tensor) -> None:
    """Raise if another library made a parameter by laying several end to end: rows and columns are gone.

    Args:
        name: The parameter's name.
        param: The parameter.

    Raises:
        RuntimeError: The message says what to use instead.
    """
    if is_flat(param):
        owner = "DeepSpeed's ZeRO" if hasattr(param, "ds_id") else "FullyShardedDataParallel"
        raise RuntimeError(f"{name!r} belongs to {owner}, {FLAT}, or use plan=None, which needs none")


def check_placement(name: str, param: DTensor) -> None:
    """Raise if a parameter lies on other ranks only.

    Args:
        name: The parameter's name.
        param: The parameter.

    Raises:
        RuntimeError: This rank is not part of the parameter's mesh.
    """
    if param.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"{name!r} lies on {param.device_mesh}, which this rank {torch.distributed.get_rank()} is not part of; "
            "build this rank's optimizer without it, or keep its second moment in full, CompressionPlan({name: Rule()})"
        )


def groups_of(param: DTensor, mesh_dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """Return process groups of a parameter's mesh; none where this rank is not part of it.

    Args:
        param: The parameter.
        mesh_dims: The dimensions of the mesh.
    """
    if param.device_mesh.get_coordinate() is None:
        return ()
    return tuple(param.device_mesh.get_group(index) for index in mesh_dims)
