"""The pending update of any torch optimizer as a direction: its next step is ``parameter - lr * D``.

SlimAdam computes its own. For optimizers of ``torch.optim`` whose step is linear in the learning rate it is one step,
on copies of one parameter's gradient and state at a time, from zero with learning rate 1: nothing cancels. Any other
optimizer steps once on a copy of itself and all that it holds, in float64, at its own learning rate.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from slimadam.kernels.interface import Scalar, second_moment_dtype
from slimadam.optim.slimadam import SlimAdam
from slimadam.optim.step.direction import Shared, row_blocks, with_decay
from slimadam.utils.dtensor import is_dtensor, laid_out_as, local, local_gradient
from slimadam.utils.torch_private import global_step_hooks

_NAMES = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "SGD")
LINEAR_IN_LR = [getattr(torch.optim, name) for name in _NAMES if hasattr(torch.optim, name)]
"""Their step is linear in lr, and depends on the parameter's value through weight decay alone."""
_MUON = getattr(torch.optim, "Muon", None)  # since torch 2.9; works on whole matrices


class PendingUpdate(NamedTuple):
    """The pending step of a parameter: ``parameter - lr rate (update + weight_decay parameter)``.

    Attributes:
        param: The parameter.
        update: The part that gradient and state decide, of its shape, in at least float32.
        weight_decay: Decoupled weight decay.
        rate: The learning rate of its group, as a share of the largest of all groups.
    """

    param: Tensor
    update: Tensor
    weight_decay: Scalar
    rate: float

    def direction(self) -> Tensor:
        """Return ``D`` of :func:`pending_directions`; overwrites ``update``."""
        direction = with_decay(self.update, self.param.detach(), self.weight_decay)
        if self.rate != 1:
            local(direction).mul_(self.rate)
        return direction


def pending_directions(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the direction of the next step for each parameter that has a gradient; nothing is changed.

    Weight decay is part of it (arXiv 2601.16979). Where parameter groups have different learning rates they keep
    their ratios: ``eta`` is the rate of the group with the largest one, :func:`reference_lr`.

    Args:
        optimizer: :class:`~slimadam.SlimAdam` or any torch optimizer whose ``step()`` needs no closure.

    Yields:
        ``(parameter, D)`` with ``D`` of the parameter's shape, in at least float32: a step at learning rate ``eta``
        is ``parameter - eta * D``. That of a DTensor is one, laid out alike; all ranks must iterate.

    Raises:
        RuntimeError: No gradient is pending, one is sparse, or the optimizer cannot be copied.
        TypeError: It is no torch optimizer, or its step needs a closure.
        ValueError: A parameter group has no finite learning rate.
    """
    for pending in pending_updates(optimizer):
        yield pending.param, pending.direction()


@torch.no_grad()
def pending_updates(optimizer: Optimizer, averages: Shared | None = None) -> Iterator[PendingUpdate]:
    """Yield the updates behind :func:`pending_directions`, with the decoupled weight decay apart; raises as that does.

    Args:
        optimizer: As there.
        averages: From :func:`averages_of_ranks`, so that no collective is needed again.
    """
    optimizer = unwrapped(optimizer)
    check_pending(optimizer)
    rates = _relative_rates(optimizer)
    if isinstance(optimizer, SlimAdam):
        for param, group, update in optimizer.updates_without_decay(averages):
            yield PendingUpdate(param, update, group["weight_decay"], rates[id(group)])
        return
    is_linear = type(optimizer) in LINEAR_IN_LR
    stepped = {} if is_linear else _trial_step(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            if is_linear:
                coupled, decoupled = weight_decays(optimizer, group)
                update = _step_from_zero(optimizer, group, param, coupled)
                yield PendingUpdate(param, update, decoupled, rates[id(group)])
            else:
                after = stepped.pop(id(param)).detach()
                moved = (param.detach().to(after.dtype) - after).div_(group["lr"])
                yield PendingUpdate(param, moved.to(second_moment_dtype(param.dtype)), 0.0, rates[id(group)])


def averages_of_ranks(optimizer: Optimizer) -> Shared:
    """Return the averages over ranks that SlimAdam's pending update needs (collective)."""
    return optimizer.averages_after_step() if isinstance(optimizer, SlimAdam) else Shared({})


def depends_on_parameters(optimizer: Optimizer) -> bool:
    """Return whether ``update`` of :func:`pending_updates` depends on the parameters' values."""
    if type(optimizer) in LINEAR_IN_LR:
        return any(weight_decays(optimizer, group)[0] != 0 for group in optimizer.param_groups)
    return not isinstance(optimizer, SlimAdam)


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps: the one inside Accelerate's wrapper.

    Raises:
        TypeError: It is no torch optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # others may do something of their own in step()
        return unwrapped(optimizer.optimizer)  # type: ignore[attr-defined]
    return optimizer


def check_pending(optimizer: Optimizer) -> None:
    """Raise RuntimeError for an optimizer without pending gradients, or with sparse ones."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        raise RuntimeError(
            "no parameter of the optimizer has a gradient: there is no pending update; call this after backward() "
            "and before step() and zero_grad()"
        )
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError(
            "a gradient is sparse, and its update has no direction for all elements; use a dense one (sparse=False in "
            "the embedding)"
        )


def reference_lr(optimizer: Optimizer) -> float:
    """Return the largest learning rate of the groups: the ``eta`` of ``parameter - eta * D``.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: A parameter group has no finite learning rate.
    """
    return max(map(float, _rates(unwrapped(optimizer))))


def _relative_rates(optimizer: Optimizer) -> dict[int, float]:
    """Return each group's learning rate over the largest, by ``id``; where all are zero, the initial ones count."""
    groups, rates = optimizer.param_groups, _rates(optimizer)
    if len(rates) == 1:
        return {id(groups[0]): 1.0}
    if not any(rates):  # as at the start of a warmup
        rates = [group.get("initial_lr", 0.0) for group in groups]
    largest = max(map(float, rates))
    return {id(group): float(rate) / largest if largest else 1.0 for group, rate in zip(groups, rates, strict=True)}


def _rates(optimizer: Optimizer) -> list[Scalar]:
    for index, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ValueError(
                f"param_groups[{index}] of {type(optimizer).__name__} has no 'lr': its step has no learning rate to "
                "measure along"
            )
        if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:
            raise ValueError(f"param_groups[{index}]['lr']={group['lr']} must be a finite number >= 0")
    return [group["lr"] for group in optimizer.param_groups]


def weight_decays(optimizer: Optimizer, group: dict[str, Any]) -> tuple[Scalar, Scalar]:
    """Return the weight decay that is added to the gradient, and the decoupled one; one of them is 0.

    Args:
        optimizer: One of :data:`LINEAR_IN_LR`.
        group: One of its parameter groups.
    """
    decay = group.get("weight_decay", 0.0)
    is_decoupled = type(optimizer) in (AdamW, _MUON) or group.get("decoupled_weight_decay", False)
    return (0.0, decay) if is_decoupled else (decay, 0.0)


def _step_from_zero(optimizer: Optimizer, group: dict[str, Any], param: Tensor, coupled: Scalar) -> Tensor:
    """Return minus where one step with learning rate 1 takes a parameter from zero, with its gradient and state.

    Goes by blocks of rows where the optimizer treats elements one by one; adds the coupled weight decay.
    """
    is_by_matrix = type(optimizer) is _MUON
    if is_by_matrix and is_dtensor(param):
        raise RuntimeError(
            f"the direction of {type(optimizer).__name__} on sharded parameters (DTensors) is not known: it works on "
            "whole matrices; measure on a model that is not sharded"
        )
    own, pending_grad = local(param).detach(), local_gradient("a parameter", param)
    direction = torch.empty_like(own, dtype=second_moment_dtype(own.dtype))
    state = dict(optimizer.state.get(param, {}))
    for key, value in state.items():
        if is_dtensor(value) and is_dtensor(param):
            if value.placements != param.placements or value.device_mesh != param.device_mesh:
                value = value.redistribute(param.device_mesh, param.placements)
            state[key] = local(value)
    shadow = _shadow(optimizer)
    shadow.defaults = {**optimizer.defaults, "differentiable": False}
    for rows in [...] if is_by_matrix else row_blocks(own.shape):
        grad = pending_grad[rows].to(direction.dtype, copy=True)
        if coupled != 0:
            sign = -1 if group.get("maximize", False) else 1
            grad.add_(own[rows].to(grad.dtype) * (sign * coupled))
        from_zero = torch.zeros_like(grad).requires_grad_()
        from_zero.grad = grad
        options = {"lr": 1.0, "weight_decay": 0.0, "differentiable": False, "params": [from_zero]}
        shadow.param_groups = [{**group, **options}]
        shadow.state = defaultdict(dict)
        if state:
            shadow.state[from_zero] = {
                key: _state_of_rows(value, rows, own.shape, None if key == "step" else grad.dtype)
                for key, value in state.items()
            }
        _step_of(optimizer)(shadow)
        torch.neg(from_zero.detach(), out=direction[rows])
    return laid_out_as(param, direction) if is_dtensor(param) else direction


def _state_of_rows(value: Any, rows: Any, shape: torch.Size, dtype: torch.dtype | None) -> Any:
    """Return a copy of a state's value for some rows; floating-point numbers in at least ``dtype``."""
    if not isinstance(value, Tensor):
        return copy.copy(value)
    own = value[rows] if value.shape == shape else value
    if dtype is None or not (value.is_floating_point() or value.is_complex()):
        return own.clone()
    return own.to(torch.promote_types(value.dtype, dtype), copy=True)


def _trial_step(optimizer: Optimizer) -> dict[int, Tensor]:
    """Return by ``id`` of each parameter a copy of it after one step of a copy of the optimizer."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if group["lr"] == 0 and any(param.grad is not None for param in group["params"]):
            raise RuntimeError(
                f"the learning rate of {name} is 0, and only a step tells its direction; measure from the first step "
                "with a positive rate on"
            )
    try:
        return _stepped_copies(optimizer, torch.float64)
    except Exception as wide:
        stepped = _stepped_copies(optimizer, None)
        warnings.warn(
            f"the direction of {name} comes from a step in its parameters' own precision, because one in float64 "
            f"failed ({wide}): it is lost in rounding where the learning rate is as small as the parameters' last "
            "place",
            stacklevel=2,
        )
        return stepped


def _stepped_copies(optimizer: Optimizer, dtype: torch.dtype | None) -> dict[int, Tensor]:
    """Return what :func:`_trial_step` does, in a wider precision where one is given."""
    name = type(optimizer).__name__
    copies: dict[int, Tensor] = {}
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        own = param.dtype if dtype is None else torch.promote_types(param.dtype, dtype)
        copies[id(param)] = param.detach().to(own, copy=True).requires_grad_(param.requires_grad)
        copies[id(param)].grad = None if param.grad is None else param.grad.detach().to(own, copy=True)
    shadow = _shadow(optimizer)
    try:
        shadow.__dict__.update(copy.deepcopy(shadow.__dict__, dict(copies)))
    except Exception as error:
        raise RuntimeError(f"{name} cannot be copied to try its step out: {error}") from error
    for one, state in shadow.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                state[key] = value.to(torch.promote_types(value.dtype, one.dtype))
    # A subclass's step runs the hooks of the process through its parent's.
    kept = [(hooks, dict(hooks)) for hooks in global_step_hooks()]
    try:
        for hooks, _ in kept:
            hooks.clear()
        _step_of(optimizer)(shadow)
    except (TypeError, AssertionError) as error:
        raise TypeError(f"the step of {name} cannot be tried out by itself, without a closure: {error}") from error
    finally:
        for hooks, before in kept:
            hooks.update(before)
    return copies


def _shadow(optimizer: Optimizer) -> Any:
    """Return an optimizer of the same class and attributes, without hooks; its groups and state are shared."""
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update({key: value for key, value in optimizer.__dict__.items() if key != "step"})
    shadow._optimizer_step_pre_hooks = OrderedDict()
    shadow._optimizer_step_post_hooks = OrderedDict()
    return shadow


def _step_of(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """Return the class's ``step`` without the wrapper that runs hooks, process-wide ones included."""
    step: Any = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[no-any-return]
