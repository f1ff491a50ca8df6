"""Update tasks: a parameter, or a part of one, and the implementation that updates it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimadam.distributed.sharded_moments import SharedPart
from slimadam.distributed.slots import ParamSlot
from slimadam.kernels.interface import Entry, Hyperparameters, second_moment_dtype
from slimadam.layers.splits import key_of
from slimadam.optim.step.dispatch import BACKENDS, REFERENCE, Backend, choose_backend, steps_on_device
from slimadam.state import int8, second_moment
from slimadam.state.first_moment import momentum_of, stored_first_moment
from slimadam.state.rule import Rule

WORTH_SLICING = 1 << 14
"""Elements from which on a slice is worth an update of its own."""


class UpdateTask(NamedTuple):
    """Update of a parameter, of one part of it, or of one slice.

    Attributes:
        key: Its name in plans.
        rule: Its rule; of a DTensor that of the local shard.
        backend: The implementation that updates it.
        entry: Its tensors; of a DTensor the local ones.
        shared: Its averages that other ranks take part in.
        slice_index: Index of a slice of the first dimension; None: all of it.
    """

    key: str
    rule: Rule
    backend: Backend
    entry: Entry
    shared: SharedPart | None = None
    slice_index: int | None = None

    def entry_with(self, grad: Tensor, hyper: Hyperparameters) -> Entry:
        """Return its tensors with the gradient and the seed of a step.

        Args:
            grad: The gradient of the full parameter.
            hyper: Hyperparameters of the step.
        """
        param, _, exp_avg, second, largest, step, dims, seed, scale, precomputed = self.entry
        if hyper.stochastic_round:
            seed = self.seed()
        # Neither _replace nor a slice: they are slow, and Dynamo of torch 2.6 does not trace them.
        own = self.gradient_in(grad)
        return Entry(param, own, exp_avg, second, largest, step, dims, seed, scale, precomputed)

    def gradient_in(self, grad: Tensor) -> Tensor:
        """Return its part of the gradient of the full parameter."""
        if self.rule.part is not None:
            grad = self.rule.take(grad)
        return grad if self.slice_index is None else grad[self.slice_index]

    def seed(self) -> int:
        """Return the seed of this step's stochastic rounding."""
        if self.backend.counts_steps:
            return zlib.crc32(self.key.encode())
        return rounding_seed(self.entry.step, self.key)


def tasks_of_step(
    slot: ParamSlot,
    grad: Tensor,
    state: Mapping[str, Any],
    shared: Sequence[SharedPart | None] | None = None,
    counted: bool = False,
) -> list[UpdateTask]:
    """Return the update tasks of a parameter: one, one for each part, or one for each slice.

    Triton counts the step itself: it updates all parts of a parameter that have elements here, or none.

    Args:
        slot: The parameter.
        grad: This rank's gradient.
        state: Its state.
        shared: Averages over several ranks that are known already, for each rule.
        counted: Whether the step has been counted.
    """
    own_state = slot.own_state(state)
    if shared is None:
        shared = slot.shared_parts(own_state)
    found: list[UpdateTask] = []
    for rule, entry, part in zip(slot.own_rules, entries_of(slot, grad, own_state), shared, strict=True):
        found += _tasks_of_part(slot, rule, entry, part, own_state)
    if any(task.backend.counts_steps for task in found) and (counted or not counts_steps(found)):
        return [task._replace(backend=REFERENCE) for task in found]
    return found


def counts_steps(tasks: Sequence[UpdateTask]) -> bool:
    """Return whether a parameter's tasks have elements on this rank, all updated by a backend that counts steps."""
    used = [task.backend.counts_steps for task in tasks if task.entry.param.numel()]
    return bool(used) and all(used)


def _tasks_of_part(
    slot: ParamSlot, rule: Rule, entry: Entry, shared: SharedPart | None, state: Mapping[str, Any]
) -> list[UpdateTask]:
    key = key_of(slot.name, rule.part)
    backend, in_slices = _backend_of(slot, rule)
    if in_slices and shared is None:
        slices = list(slices_of(entry, state))
        if all(map(backend.supports, slices)):
            return [
                UpdateTask(f"{key}[{index}]", rule, backend, one, slice_index=index) for index, one in enumerate(slices)
            ]
    own = entry if shared is None else shared.with_moments(entry)
    return [UpdateTask(key, rule, backend if not in_slices and backend.supports(own) else REFERENCE, own, shared)]


def backend_of(slot: ParamSlot) -> Backend:
    """Return the implementation for a parameter, or for the first of its parts."""
    return _backend_of(slot, slot.own_rules[0])[0]


def _backend_of(slot: ParamSlot, rule: Rule) -> tuple[Backend, bool]:
    """Return the implementation for a part of a parameter, and whether it takes slices of the first dimension alone.

    Slices of stacked experts' gate or up projection lie apart from each other, each in one block of memory.
    """
    part, dtype, group = rule.take(slot.own), momentum_of(slot.param, slot.group).dtype, slot.group
    dims = rule.averaged_dims(part.dim())
    chosen = choose_backend(part, dtype, dims, group)
    apart = chosen in ("reference", "foreach") and part.dim() > 2 and not any(0 in one for one in dims)
    if apart and part.numel() >= WORTH_SLICING * part.shape[0] > 0:
        of_slice = choose_backend(part[0], dtype, [tuple(dim - 1 for dim in one) for one in dims], group)
        if of_slice not in ("reference", "foreach"):
            return BACKENDS[of_slice], True
    return BACKENDS[chosen], False


def planned(slot: ParamSlot) -> Iterator[tuple[Backend, Entry]]:
    """Yield what will update a parameter or its parts, each with tensors of the same layout that have no memory."""
    chosen = [_backend_of(slot, rule) for rule in slot.own_rules]
    step = torch.zeros((), dtype=second_moment.step_dtype())
    if len({backend.counts_steps for backend, _ in chosen}) > 1:
        return
    for rule, (backend, in_slices) in zip(slot.own_rules, chosen, strict=True):
        part = rule.take(slot.own)
        alike = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
        dims = rule.averaged_dims(part.dim())
        whole = Entry(alike, alike, alike, [alike] * len(dims), (), step, dims, precomputed=slot.is_shared)
        for entry in slices_of(whole, {}) if in_slices else [whole]:
            if entry.param.numel():
                codes = entry.param if slot.group["momentum_dtype"] == "int8" else None
                yield backend, entry._replace(exp_avg_scale=codes)


def entries_of(slot: ParamSlot, grad: Tensor, state: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the tensors of a parameter's step, or of each of its parts; none is a copy.

    A part that does not consist of full blocks of codes has no ``exp_avg_scale``: :func:`decoded` first.

    Args:
        slot: The parameter.
        grad: This rank's gradient.
        state: This rank's tensors of the state.
    """
    rules, param = slot.own_rules, slot.own
    exp_avg, scales = stored_first_moment(state), state.get("exp_avg_scale")
    second = second_moment.moments_of(state, rules)
    maxima = second_moment.moments_of(state, rules, "max_exp_avg_sq") if slot.group["amsgrad"] else []
    if rules[0].part is None:
        dims = rules[0].averaged_dims(param.dim())
        yield Entry(param, grad, exp_avg, second, maxima, state["step"], dims, exp_avg_scale=scales)
        return
    by_rule = second_moment.by_rule(rules, second), second_moment.by_rule(rules, maxima)
    for rule, moments, largest in zip(rules, *by_rule, strict=True):
        part, own_exp_avg = rule.take(param), rule.take(exp_avg)
        own_scales = None if scales is None else int8.scales_of(own_exp_avg, exp_avg, scales)
        dims = rule.averaged_dims(part.dim())
        yield Entry(part, rule.take(grad), own_exp_avg, moments, largest, state["step"], dims, exp_avg_scale=own_scales)


def slices_of(entry: Entry, state: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield the tensors of each slice of the first dimension, along which nothing is averaged.

    Args:
        entry: The tensors of a parameter or a part of one; with codes but no scales where they are no whole blocks.
        state: The parameter's state.
    """
    dims = [tuple(dim - 1 for dim in one) for one in entry.averaged_dims]
    scales = state.get("exp_avg_scale")
    for index in range(entry.param.shape[0]):
        exp_avg = entry.exp_avg[index]
        yield Entry(
            entry.param[index],
            entry.grad[index],
            exp_avg,
            [moment[index] for moment in entry.exp_avg_sq],
            [moment[index] for moment in entry.max_exp_avg_sq],
            entry.step,
            dims,
            exp_avg_scale=None if scales is None else int8.scales_of(exp_avg, state["exp_avg_codes"], scales),
        )


def assembled(slot: ParamSlot, parts: Iterator[Tensor]) -> Tensor:
    """Return a tensor of the parameter's shape from one for each of its rules, both of this rank.

    Args:
        slot: The parameter.
        parts: The tensors.
    """
    if slot.own_rules[0].part is None:
        return next(parts)
    full = torch.empty_like(slot.own, dtype=second_moment_dtype(slot.param.dtype))
    for rule, part in zip(slot.own_rules, parts, strict=True):
        rule.take(full).copy_(part)
    return full


def initial_state(slot: ParamSlot, clip_factor: Tensor | None = None) -> dict[str, Any]:
    """Return a parameter's state before its first step.

    Second moments start at zero, or at the first squared gradient (GI-Adam).

    Args:
        slot: The parameter.
        clip_factor: Factor of its gradient.
    """
    param, group = slot.param, slot.group
    from_gradient = group["variance_init"] == "gradient" and param.grad is not None
    moments = slot.moments_from_gradient(clip_factor) if from_gradient else slot.zero_moments()
    device = param.device if steps_on_device(param, group) else torch.device("cpu")
    made = {
        "step": torch.zeros((), dtype=second_moment.step_dtype(), device=device),
        **momentum_of(param, group).init(param),
        **second_moment.by_key(moments, slot.rules),
    }
    if group["amsgrad"]:
        maxima = [torch.zeros_like(moment) for moment in moments]
        made.update(second_moment.by_key(maxima, slot.rules, "max_exp_avg_sq"))
    return made


def rounding_seed(step: Tensor, name: str) -> int:
    """Return a seed that only the step and the parameter's name decide, so that a resumed run repeats it.

    Args:
        step: The step count.
        name: The parameter's name, or a part's.
    """
    mixed = (int(step.item()) * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode()) * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed ^= mixed >> 31
    return mixed * 0x94D049BB133111EB >> 2 & (1 << 62) - 1
