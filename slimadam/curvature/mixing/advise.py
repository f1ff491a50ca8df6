"""Advice on how much of each domain to train on next, from relative critical sharpness over the mixing ratio.

Source: arXiv 2601.16979, the section on data mixing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations_with_replacement, pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from slimadam.curvature.critical import CriticalSharpness, SharpnessMeasurement
from slimadam.curvature.mixing.advice import MixAdvice
from slimadam.curvature.probe.directions import LINEAR_IN_LR, unwrapped, weight_decays
from slimadam.curvature.probe.displacement import Memory
from slimadam.curvature.probe.snapshot import Buffers, RandomState
from slimadam.kernels.reference import scale_grad
from slimadam.layers.names import owning_modules
from slimadam.optim.slimadam import SlimAdam
from slimadam.utils.dtensor import is_dtensor

Momentum = Literal["settled", "kept"]
BatchLoss = Callable[[int], Tensor]
"""The mean loss of a task on its batch of a number, with a graph; the same number gives the same batch."""

_Weights = tuple[float, ...]

_DIVISIONS, _DIVISIONS_OF_MANY = 10, 4


def advise_mix(
    optimizer: Optimizer,
    losses: Mapping[str, BatchLoss],
    *,
    tasks: Mapping[str, BatchLoss] | None = None,
    ratios: Sequence[float | Sequence[float]] | None = None,
    batches: int = 8,
    seed: int = 0,
    level: float = 0.9,
    tol: float = 1 / 16,
    momentum: Momentum = "settled",
    max_grad_norm: float | None = None,
    memory: Memory = "copy",
    progress: Callable[[int, int], None] | None = None,
) -> MixAdvice:
    """Return the mix of domains whose next update may go farthest before it hurts any task (arXiv 2601.16979).

    For each mix the update ``D`` that the optimizer would take on the mixed gradient ``sum_i w_i g_i`` is measured
    against each task's loss on a batch that the gradient has not seen: its relative critical sharpness is two over
    the learning rate at which ``theta - eta D`` first raises that loss. Over several batches the median is taken. It
    is infinite where the update does not lower a task's loss, because no step is safe. The advised mix is that at
    which the largest of the tasks' sharpnesses is smallest.

    Nothing is updated: parameters, gradients, optimizer state, buffers and random-number generators are left as
    they were. ``D`` comes from the state that the optimizer has, such as second moments. First moments remember the
    data before, which at a converged checkpoint drowns the mix; by default they are taken as they become when the
    mix stays. Takes memory for a gradient of each domain and a copy of the first moments, and about 6 forward passes
    for each task, mix and batch.

    Example:
        >>> losses = {"prose": lambda batch: loss_on(prose, batch), "code": ...}  # doctest: +SKIP
        >>> slimadam.advise_mix(optimizer, losses).ratio  # the share of prose  # doctest: +SKIP
        0.6

    Args:
        optimizer: SlimAdam, or any torch optimizer whose step needs no closure, over the model's parameters.
        losses: The domains that are mixed, by name, two or more; each gives its mean loss on the batch of a number.
        tasks: The losses that must not get worse, by name; None: the domains themselves.
        ratios: The mixes to try. Of two domains: shares of the first, in 0..1. Of any number: the weights of all,
            which sum to 1. None: steps of 0.1 between two domains, of 0.25 between more.
        batches: How often all is measured, each time on other batches. Numbers ``2 n`` give the gradients and
            ``2 n + 1`` the losses that they are judged by, so that ``2 * batches`` are used of each loss.
        seed: The seed of the resampling that the intervals come from.
        level: Share of the resamples that the intervals hold.
        tol: The tolerance of the search for each crossing, see :class:`~slimadam.CriticalSharpness`.
        momentum: ``"settled"``: first moments as they become under the mix, see
            :class:`SettledMomentum`. ``"kept"``: as they are; the very next step.
        max_grad_norm: Mixed gradients are clipped to this norm, as in training.
        memory: See :class:`~slimadam.CriticalSharpness`.
        progress: Called after each mix of each batch with how many are done, and of how many.

    Returns:
        The advised mix, the curves behind it, and their intervals.

    Raises:
        TypeError: A loss is no function of the batch's number that returns a tensor with a graph, or there are too few.
        ValueError: An argument is out of range, or a loss or gradient is not finite at the checkpoint.
        RuntimeError: A parameter is sharded.
    """
    tasks = losses if tasks is None else tasks
    _check(optimizer, losses, tasks, batches, level)
    if momentum not in get_args(Momentum):
        raise ValueError(f"momentum={momentum!r} must be 'settled' or 'kept'")
    mixes = _mixes(list(losses), ratios)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    modules = owning_modules(params)
    probe = CriticalSharpness(optimizer, tol, memory=memory, max_forwards=100, modules=modules)
    settled = SettledMomentum(optimizer) if momentum == "settled" else None
    sharpness = np.empty((len(tasks), len(mixes), batches))
    with ExitStack() as afterwards:
        afterwards.callback(RandomState([param.device for param in params]).restore)
        afterwards.callback(Buffers(modules).restore)
        if settled is not None:
            afterwards.callback(settled.restore)
        for param in params:
            afterwards.callback(setattr, param, "grad", param.grad)
        for batch in range(batches):
            gradients = [_gradients(name, loss, params, 2 * batch) for name, loss in losses.items()]
            for index, weights in enumerate(mixes):
                for param, *domains in zip(params, *gradients, strict=True):
                    param.grad = _mixed(param, domains, weights)
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
                if settled is not None:
                    settled.settle()
                sharpness[:, index, batch] = [
                    _safe_sharpness(probe.measure(partial(loss, 2 * batch + 1), task=name))
                    for name, loss in tasks.items()
                ]
                if progress is not None:
                    progress(batch * len(mixes) + index + 1, batches * len(mixes))
    return MixAdvice.from_sharpness(list(losses), list(tasks), mixes, sharpness, level, seed)


def _gradients(name: str, closure: BatchLoss, params: Sequence[Tensor], batch: int) -> list[Tensor | None]:
    """Return the gradients of a domain's loss, in the order of the parameters."""
    with torch.enable_grad():
        loss = closure(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(f"losses[{name!r}] returned {loss!r:.80}, not a tensor of one element with a graph")
        if not math.isfinite(loss.item()):
            raise ValueError(f"losses[{name!r}] returned {loss.item()} at the checkpoint")
        trained = [param for param in params if param.requires_grad]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
    if not all(grad is None or bool(grad.isfinite().all()) for grad in grads):
        raise ValueError(f"the gradient of losses[{name!r}] on batch {batch} is not finite")
    by_param = dict(zip(trained, grads, strict=True))
    return [by_param.get(param) for param in params]


def _safe_sharpness(measured: SharpnessMeasurement) -> float:
    """Return the sharpness to count on: infinite where no step is known to be safe, 0 where every step is."""
    if measured.status == "not finite":
        raise ValueError(f"the loss of task {measured.task!r} is not finite at the checkpoint: nothing can be measured")
    if measured.status == "out of evaluations":
        lower, _ = measured.bracket
        return 2 / lower if lower else math.inf
    return math.inf if measured.status in ("no descent", "too noisy") else measured.sharpness


def _mixed(param: Tensor, grads: Sequence[Tensor | None], weights: _Weights) -> Tensor | None:
    """Return ``sum_i w_i g_i``, summed in at least float32; None for a parameter that no domain in the mix uses."""
    parts = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if grad is not None and weight]
    if not parts:
        return None
    wide = torch.promote_types(param.dtype, torch.float32)
    total = torch.zeros_like(param, dtype=wide)
    for grad, weight in parts:
        total.add_(grad.to(wide), alpha=weight)
    return total.to(param.dtype)


def _mixes(names: Sequence[str], ratios: Sequence[float | Sequence[float]] | None) -> list[_Weights]:
    if ratios is None:
        # All weights that are multiples of ``1 / divisions`` and sum to 1; of two, with the first one rising.
        divisions = _DIVISIONS if len(names) == 2 else _DIVISIONS_OF_MANY
        bars = combinations_with_replacement(range(divisions + 1), len(names) - 1)
        cuts = [(0, *inner, divisions) for inner in bars]
        return [tuple((high - low) / divisions for low, high in pairwise(cut)) for cut in cuts]
    mixes = [_weights(names, ratio) for ratio in ratios]
    if len(set(mixes)) < 2:
        raise ValueError(f"ratios={list(ratios)!r} must hold at least two different mixes")
    return sorted(set(mixes))


def _weights(names: Sequence[str], ratio: float | Sequence[float]) -> _Weights:
    if isinstance(ratio, (int, float)):
        if len(names) != 2:
            raise ValueError(f"ratios: {ratio!r} is one number, but {len(names)} domains are mixed; give their weights")
        weights: _Weights = (float(ratio), 1 - float(ratio))
    else:
        weights = tuple(float(weight) for weight in ratio)
    if len(weights) != len(names) or not all(0 <= weight <= 1 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"ratios: {ratio!r} must be {len(names)} weights in 0..1 that sum to 1, for {', '.join(names)}"
        )
    return weights


def _check(
    optimizer: Optimizer, losses: Mapping[str, BatchLoss], tasks: Mapping[str, BatchLoss], batches: int, level: float
) -> None:
    if any(is_dtensor(param) for group in unwrapped(optimizer).param_groups for param in group["params"]):
        raise RuntimeError(
            "parameters are sharded (DTensors), of which advise_mix cannot take each domain's gradient apart; load the "
            "checkpoint into a model that is not sharded"
        )
    for label, closures, least in (("losses", losses, 2), ("tasks", tasks, 1)):
        if not isinstance(closures, Mapping) or len(closures) < least:
            raise TypeError(f"{label} must be a dict of at least {least} losses by name, not {closures!r:.80}")
        for name, closure in closures.items():
            if not isinstance(name, str) or not callable(closure):
                raise TypeError(f"{label}[{name!r}] must be a function of the batch's number, under a name")
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches={batches!r} must be an integer >= 1")
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1, both excluded")


class SettledMomentum:
    """Sets first moments to where they settle under the pending gradient, and puts the real ones back.

    ``exp_avg`` (of Adam and its kin, SlimAdam, Lion) settles at the gradient, SGD's ``momentum_buffer`` at the gradient
    over ``1 - momentum``; weight decay that is part of the gradient, and clipping by SlimAdam, included.

    Raises:
        ValueError: Its first moments are kept in another way.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer = unwrapped(optimizer)
        self._kept: list[tuple[Tensor, dict[str, Any], Tensor, Tensor]] = []
        for param, group in [(one, owner) for owner in optimizer.param_groups for one in owner["params"]]:
            state = optimizer.state.get(param, {})
            moment = next((state[key] for key in ("exp_avg", "exp_avg_codes", "momentum_buffer") if key in state), None)
            if moment is None:
                continue
            is_known = "exp_avg" in state or isinstance(optimizer, SGD)
            if not (is_known and isinstance(moment, Tensor) and (moment.is_floating_point() or moment.is_complex())):
                raise ValueError(
                    f"momentum='settled' knows exp_avg in floating point and the momentum_buffer of SGD, not what "
                    f"{type(optimizer).__name__} keeps here; use momentum='kept'"
                )
            self._kept.append((param, group, moment, moment.clone()))

    @torch.no_grad()
    def settle(self) -> None:
        """Overwrite the first moments of parameters that have a gradient."""
        optimizer = self._optimizer
        factor = optimizer.clip_factor() if isinstance(optimizer, SlimAdam) else None
        for param, group, moment, _ in self._kept:
            if param.grad is not None:
                grad = scale_grad(param.grad, factor)
                settled = -grad if group.get("maximize", False) else grad
                if type(optimizer) in LINEAR_IN_LR:
                    coupled, _ = weight_decays(optimizer, group)
                    settled = settled + coupled * param if coupled else settled
                if isinstance(optimizer, SGD):
                    settled = settled * ((1 - group["dampening"]) / (1 - group["momentum"]))
                moment.copy_(settled)

    @torch.no_grad()
    def restore(self) -> None:
        """Put all first moments back, bit for bit."""
        for _, _, moment, original in self._kept:
            moment.copy_(original)
