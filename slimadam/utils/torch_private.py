"""The private names of torch that slimadam calls. Checked with torch 2.6.0, 2.8.0, 2.11.0 and 2.13.0.

Used in place are ``torch._foreach_*``, of which all of torch's own optimizers are made; names that torch looks for in
subclasses of its optimizers and schedulers (``_init_group``, ``_step_supports_amp_scaling``, ``_last_lr``), with the
hooks that it keeps for them; marks that tell classes and parameters apart (``_ConvNd``, ``_is_flat_param``); and the
shard of a DTensor (``_local_tensor``), because ``to_local()`` would make a new view of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

neg_view = torch._neg_view

# -- optimizers --------------------------------------------------------------------------------------------

_CAPTURE_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
"""Renamed in torch 2.11; the old name still works in 2.13, with a warning."""
_CAPTURE_CHECK = next((name for name in _CAPTURE_CHECKS if hasattr(Optimizer, name)), None)


def check_graph_capture(optimizer: Optimizer) -> None:
    """Raise where a graph is being captured and a parameter group is not ``capturable``, as torch's optimizers do."""
    if _CAPTURE_CHECK is not None:
        getattr(optimizer, _CAPTURE_CHECK)()


use_grad_for_differentiable = cast(Callable[[_Function], _Function], _use_grad_for_differentiable)
"""Decorate ``step()`` to record gradients only for ``differentiable=True``."""
disable_dynamo = cast(Callable[[_Function], _Function], torch._disable_dynamo)  # type: ignore[attr-defined]
"""Decorate a function that ``torch.compile`` must not trace, without importing Dynamo before it is needed."""


def global_step_hooks() -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the hooks that run before, and after, every optimizer's step in this process."""
    return _global_optimizer_pre_hooks, _global_optimizer_post_hooks


# -- tensors -----------------------------------------------------------------------------------------------


def version(tensor: Tensor) -> int:
    """Return how often autograd knows a tensor to have been changed in place."""
    return tensor._version


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether several of a tensor's elements surely share memory, as those of an expanded one do."""
    return torch._debug_has_internal_overlap(tensor) == 1


def layout_check(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that returns True only if each of as many tensors has the layout of its forerunner.

    Layout: class, precision, device, sizes and strides. It compares in C++, as code that Dynamo has compiled does
    before it runs. It may return False for equal layouts, as it does where operations are intercepted.

    Args:
        tensors: The forerunners, which are not kept alive.
    """
    if not hasattr(torch._C._dynamo.guards, "TensorGuards"):
        return lambda *others: False
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return cast(Callable[..., bool], guards.check)


def intercepts_operations() -> bool:
    """Return whether this thread has entered a mode that intercepts tensor operations."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def is_autocast_entered(context: torch.autocast) -> bool:
    """Return whether entering an autocast context switches it on."""
    return bool(context._enabled)


# Before, a tensor that is only weakly referred to may lose its Python object.
HAS_WEAK_TENSORS = torch.__version__ >= "2.11"


def by_tensor() -> MutableMapping[Tensor, Any]:
    """Return a dict with tensors as keys, which keeps none of them alive where this torch can do so safely."""
    return WeakIdKeyDictionary() if HAS_WEAK_TENSORS else {}


def reference(tensor: Tensor) -> Callable[[], Tensor | None]:
    """Return a reference to a tensor, called to get it; it keeps the tensor alive only where a weak one is not safe."""
    return TensorWeakRef(tensor) if HAS_WEAK_TENSORS else lambda: tensor


# -- modules -----------------------------------------------------------------------------------------------


def buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, the very dictionary that it keeps."""
    return module._buffers


def parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, the very dictionary that it keeps."""
    return module._parameters


# -- DTensors ----------------------------------------------------------------------------------------------


def local_shape_and_offset(tensor: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of this rank's shard of a DTensor, and its offset in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


# -- FSDP2 -------------------------------------------------------------------------------------------------


def fsdp_params(module: Any) -> list[nn.Parameter]:
    """Return the sharded parameters of an ``FSDPModule``, also while its attributes are full tensors."""
    groups = _fsdp_groups(module._get_fsdp_state())
    return [one.sharded_param for group in groups for one in group.fsdp_params]


def fsdp_precision(module: Any) -> torch.dtype | None:
    """Return the precision of an ``FSDPModule``'s forward pass, or None where its policy leaves it alone."""
    policy = getattr(module._get_fsdp_state(), "_mp_policy", None)
    return getattr(policy, "param_dtype", None)


def fsdp_forget_forward(module: Any) -> None:
    """Let an ``FSDPModule`` begin a forward pass after one that an exception has ended."""
    state = module._get_fsdp_state()
    state._state_ctx.iter_forward_root = None
    state._modules_to_run_forward.clear()
    groups = _fsdp_groups(state)
    for one in (state, *groups):
        one._training_state = type(one._training_state).IDLE
    for group in groups:
        group._all_gather_result = None  # sent for ahead of time, of parameters as they were then


def _fsdp_groups(state: Any) -> list[Any]:
    """Return FSDP2's groups of parameters; earlier releases of torch have one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
