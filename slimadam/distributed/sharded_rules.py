"""DTensors: what a rank holds of a parameter, where its second moments lie, and whom an average asks.

Nothing here is imported before a DTensor exists: ``torch.distributed.tensor`` takes a second to load, and builds
without it work.
"""

from __future__ import annotations

import logging
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeGuard

import torch
from torch import Tensor

from slimadam.kernels.reference import second_moment_dtype
from slimadam.layers.splits import Part
from slimadam.state import second_moment
from slimadam.state.rule import Dims, Rule
from slimadam.utils import torch_private

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("slimadam")

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


@cache
def warn_of_old_torch() -> None:
    """Say once where this torch is older than what sharded parameters are tested with."""
    if torch.__version__ < "2.7":
        logger.warning(
            "torch %s: its DTensors may have no uneven or empty shards, and its FSDP2 does not run on a CPU; use torch "
            "2.7 or later for sharded parameters",
            torch.__version__,
        )


def whole(tensor: Tensor) -> Tensor:
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
        fill(target, whole(source).to(local(target).device))


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


def refuse_flat(name: str, param: Tensor) -> None:
    """Refuse what other libraries made of parameters by laying them end to end: rows and columns are gone.

    Raises:
        RuntimeError: Says what to use instead.
    """
    if is_flat(param):
        owner = "DeepSpeed's ZeRO" if hasattr(param, "ds_id") else "FullyShardedDataParallel"
        raise RuntimeError(f"{name!r} belongs to {owner}, {FLAT}, or use plan=None, which needs none")


def refuse_elsewhere(name: str, param: DTensor) -> None:
    """Refuse a parameter that lies on other ranks only.

    Raises:
        RuntimeError: This rank is not part of the parameter's mesh.
    """
    if param.device_mesh.get_coordinate() is None:
        raise RuntimeError(
            f"{name!r} lies on {param.device_mesh}, which this rank {torch.distributed.get_rank()} is not part of; "
            "build this rank's optimizer without it, or keep its second moment in full, CompressionPlan({name: Rule()})"
        )


class LocalRule(NamedTuple):
    """A rule as it applies to what this rank holds of a parameter.

    Attributes:
        rule: The rule, its part in the coordinates of the local shard.
        shape: The global shape of what the rule is for.
        local_shape: What this rank holds of it.
        placements: For each dimension of the mesh, how it shards that shape, None where it does not.
        cut: Dimension of a part along which shards end elsewhere than an even division of the part would: second
            moments are replicated along it. None: there is none.
        start: Where along it this rank's piece begins.
    """

    rule: Rule
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placements: tuple[Any, ...]
    cut: int | None = None
    start: int = 0

    def summed_over(self, dims: Dims) -> tuple[int, ...]:
        """Dimensions of the mesh whose ranks each hold a share of what is averaged over ``dims``."""
        shared = {*dims, self.cut}
        return tuple(
            index
            for index, placement in enumerate(self.placements)
            if placement is not None and placement.dim in shared
        )

    def count(self, dims: Dims) -> int:
        """Number of elements of the global tensor averaged together."""
        return math.prod(self.shape[dim] for dim in dims)

    def own(self, moment: Tensor) -> Tensor:
        """What this rank's piece needs of a second moment, or of sums of its shape."""
        if self.cut is None or moment.shape[self.cut] != self.shape[self.cut] or self.shape[self.cut] == 1:
            return moment
        return moment.narrow(self.cut, self.start, self.local_shape[self.cut])

    def stored_shape(self, dims: Dims) -> tuple[int, ...]:
        """Shape of what this rank keeps of a second moment averaged over ``dims``."""
        return tuple(
            1 if dim in dims else self.shape[dim] if dim == self.cut else size
            for dim, size in enumerate(self.local_shape)
        )

    def wrap(self, moment: Tensor, param: DTensor, dims: Dims) -> DTensor:
        """The second moment averaged over ``dims`` as a DTensor of its global shape."""
        from torch.distributed.tensor import DTensor, Replicate

        summed = self.summed_over(dims)
        placements = [
            Replicate() if placement is None or index in summed else placement
            for index, placement in enumerate(self.placements)
        ]
        shape = torch.Size(1 if dim in dims else size for dim, size in enumerate(self.shape))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(moment, param.device_mesh, placements, shape=shape, stride=strides)


def local_rules(name: str, rules: Sequence[Rule], param: DTensor) -> list[LocalRule]:
    """Each rule of a parameter as it applies to this rank.

    Raises:
        RuntimeError: Shards end where a part cannot be followed; the remedy is told.
    """
    mesh, held = param.device_mesh, local(param)
    placements = tuple(
        None if placement.is_replicate() or mesh.size(index) == 1 else placement
        for index, placement in enumerate(param.placements)
    )
    if any(placement is not None and placement.is_partial() for placement in placements):
        raise RuntimeError(f"{name!r}: a parameter cannot be Partial; redistribute it to Shard or Replicate")
    if rules[0].part is None:
        return [LocalRule(rules[0], tuple(param.shape), tuple(held.shape), placements)]
    return [_local_part(name, rule, rule.part, param, placements) for rule in rules if rule.part is not None]


def _local_part(name: str, rule: Rule, part: Part, param: DTensor, placements: tuple[Any, ...]) -> LocalRule:
    """A part's rule, with the part cut to the shard."""
    from torch.distributed.tensor import Shard

    shape, offsets = torch_private.local_shape_and_offset(param)
    view, start, end, missed = list(part.view), part.start, part.start + part.size, 0
    cut: int | None = None
    in_part: list[Any] = [None] * len(placements)
    for index, placement in enumerate(placements):
        if placement is None:
            continue
        first, inner = _in_view(part, placement.dim)
        rows, begin = shape[placement.dim] // inner, offsets[placement.dim] // inner
        if (
            type(placement) is not Shard
            or rows * inner != shape[placement.dim]
            or begin * inner != offsets[placement.dim]
        ):
            raise RuntimeError(_cannot_follow(name, part, f"{placement} cuts through its slices"))
        in_part[index] = Shard(first)
        view[first] = rows
        if first == part.dim:
            cut = first
            start, end = (min(max(bound - begin, 0), rows) for bound in (part.start, part.start + part.size))
            missed = min(max(begin - part.start, 0), part.size)
    if cut is not None and rule.form == "full":
        raise RuntimeError(
            _cannot_follow(name, part, "it keeps a full second moment, and shards end elsewhere than it")
        )
    here = Part(part.label, tuple(shape), tuple(view), part.dim, start, end - start)
    own = replace(rule, part=here, shape=here.shape)
    return LocalRule(own, part.shape, here.shape, tuple(in_part), cut, missed)


def _in_view(part: Part, dim: int) -> tuple[int, int]:
    """The first dimension of the view that a dimension of the parameter becomes, and what it strides over there."""
    before, size = math.prod(part.of[:dim]), part.of[dim]
    starts = (at for at in range(len(part.view)) if math.prod(part.view[:at]) == before)
    first = next(at for at in starts if part.view[at] > 1 or size == 1)
    return first, size // part.view[first]


def _cannot_follow(name: str, part: Part, why: str) -> str:
    return (
        f"{name!r}: its part {part.label!r} cannot be followed through these shards: {why}; shard it along another "
        "dimension (fully_shard(..., shard_placement_fn=lambda parameter: Shard(1))), or give the whole parameter one "
        "rule, CompressionPlan({name: Rule(...)})"
    )


def groups_of(param: DTensor, mesh_dims: Sequence[int]) -> tuple[ProcessGroup, ...]:
    """The process groups of some dimensions of a parameter's mesh; none where this rank is not part of it."""
    if param.device_mesh.get_coordinate() is None:
        return ()
    return tuple(param.device_mesh.get_group(index) for index in mesh_dims)


def zeros(rule: LocalRule, param: DTensor, dims: Dims) -> Tensor:
    """A second moment of zero as a DTensor of the global shape: replicated where ranks average together."""
    held = torch.zeros(rule.stored_shape(dims), dtype=second_moment_dtype(param.dtype), device=local(param).device)
    return rule.wrap(held, param, dims)


def local_state(name: str, rules: Sequence[LocalRule], param: DTensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank holds of a parameter's state.

    Raises:
        RuntimeError: It does not lie as the parameter does.
    """
    own: dict[str, Any] = {"step": state["step"]}
    key = "exp_avg_codes" if "exp_avg_codes" in state else "exp_avg"
    own[key] = local(state[key])
    _check_lies(name, key, [tuple(own[key].shape)], [tuple(local(param).shape)])
    if "exp_avg_scale" in state:
        own["exp_avg_scale"] = local(state["exp_avg_scale"]).view(-1)
    wanted = _stored_shapes(rules)
    plain = [one.rule for one in rules]
    for kind in second_moment.SECOND_MOMENTS:
        held = [local(moment) for moment in second_moment.moments_of(state, plain, kind)]
        if held:
            _check_lies(name, kind, [tuple(moment.shape) for moment in held], wanted)
            own.update(second_moment.by_key(held, plain, kind))
    return own


def _check_lies(name: str, key: str, found: list[tuple[int, ...]], wanted: list[tuple[int, ...]]) -> None:
    if found != wanted:
        raise RuntimeError(
            f"{name!r}: this rank holds {key} of shape {' and '.join(map(str, found))}, its shard of the parameter "
            f"needs {' and '.join(map(str, wanted))}; shard the model before the optimizer is built, and load its "
            "checkpoints by torch.distributed.checkpoint"
        )


def kept_shapes(name: str, rules: Sequence[Rule], param: Tensor) -> Sequence[tuple[int, ...]]:
    """Shapes of the second moments that this rank keeps of a parameter."""
    if is_dtensor(param):
        return _stored_shapes(local_rules(name, rules, param))
    return second_moment.state_shapes(rules, tuple(param.shape))


def _stored_shapes(rules: Sequence[LocalRule]) -> list[tuple[int, ...]]:
    return [rule.stored_shape(dims) for rule in rules for dims in rule.rule.averaged_dims(len(rule.shape))]
