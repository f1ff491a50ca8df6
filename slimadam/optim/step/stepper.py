"""Taking a step: from a group's parameters to the implementations that update them.

The tasks of a parameter are put together once, and kept as long as their inputs stay the same. So are the runs of a
group, which are then repeated without looking at its parameters one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from slimadam.distributed.all_reduce import BucketedAllReduce
from slimadam.distributed.sharded_moments import SharedPart
from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.kernels.interface import Hyperparameters, Scalar
from slimadam.layers.splits import key_of
from slimadam.optim.step.cache import StepInputs, options_of
from slimadam.optim.step.dispatch import BACKENDS, BackendName, NumberedTask, Run
from slimadam.optim.step.param_groups import check_state
from slimadam.optim.step.tasks import UpdateTask, counts_steps, tasks_of_step
from slimadam.state import second_moment
from slimadam.state.first_moment import decoded, momentum_in
from slimadam.state.rule import Rule
from slimadam.utils.dtensor import is_dtensor, local
from slimadam.utils.torch_private import disable_dynamo, intercepts_operations

_States = Mapping[Tensor, MutableMapping[str, Any]]
_Groups = Sequence[tuple[Sequence[str], dict[str, Any]]]


class _Prepared(NamedTuple):
    """The update tasks of a parameter, and what they were built from. Holds no gradient.

    Attributes:
        inputs: The inputs; None while ``torch.compile`` traces.
        tasks: The tasks.
        decodes: True if its codes have to be decoded first.
    """

    inputs: StepInputs | None
    tasks: list[UpdateTask]
    decodes: bool


class _Moving(NamedTuple):
    """A parameter with a gradient, about to be updated."""

    slot: ParamSlot
    grad: Tensor
    state: MutableMapping[str, Any]
    prepared: _Prepared


class _CachedGroup(NamedTuple):
    """The last step of a group, to be repeated while its inputs stay the same.

    Attributes:
        inputs: The inputs.
        runs: The runs.
        steps: Step counts that no run advances itself.
        written: Tensors that the step changes.
    """

    inputs: StepInputs
    runs: Sequence[Run]
    steps: list[Tensor]
    written: Sequence[Tensor]


class _GroupStep(NamedTuple):
    """A step of one parameter group.

    Attributes:
        hyper: Its hyperparameters.
        grads: This rank's gradients.
        runs: The runs.
        written: Tensors that it changes.
        shared: Averages over several ranks with their gradients and decays.
        to_decode: Parameters whose codes are decoded first.
    """

    hyper: Hyperparameters
    grads: Sequence[Tensor]
    runs: Sequence[Run]
    written: Sequence[Tensor]
    shared: Sequence[tuple[SharedPart, Tensor, Scalar]] = ()
    to_decode: Sequence[_Moving] = ()

    def start(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take all of it that waits for no other rank."""
        for moving in self.to_decode:
            if not _waits(moving.prepared.tasks):
                _update_decoded(moving, self.hyper)
        for run in self.runs:
            run.start(self.grads, self.hyper, grad_scale, found_inf)

    def finish(self) -> None:
        """Take the rest, once averages over several ranks are there."""
        for moving in self.to_decode:
            if _waits(moving.prepared.tasks):
                _update_decoded(moving, self.hyper)
        for run in self.runs:
            run.finish(self.grads, self.hyper)


class Stepper:
    """The step of every parameter group of an optimizer."""

    def __init__(self) -> None:
        self._starting: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Let go of the state's tensors, which are about to be replaced."""
        self._prepared: dict[int, _Prepared] = {}
        self._runs: dict[int, dict[BackendName, Run]] = {}
        self._caches: dict[int, _CachedGroup] = {}
        self._known: tuple[list[Tensor], list[Mapping[str, Any]]] | None = None
        self._exchange: BucketedAllReduce | None = None

    def start_from_gradient(self, params: Iterable[Tensor]) -> None:
        """Let averages of these over several ranks be those of the next squared gradient alone."""
        self._starting.update(map(id, params))

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Let go of parameters that no group holds any more."""
        known = set(map(id, params))
        if len(self._prepared) > len(known):
            self._prepared = {key: prepared for key, prepared in self._prepared.items() if key in known}
            self._caches.clear()
            self._runs.clear()

    def counts_steps(self, slots: Iterable[ParamSlot], states: _States) -> bool:
        """Return whether every parameter that has a gradient is updated by a backend that counts steps itself.

        Args:
            slots: The parameters of a group.
            states: By parameter.
        """
        moving = [slot for slot in slots if slot.param.grad is not None]
        return not any(is_dtensor(slot.param) for slot in moving) and all(
            counts_steps(self._prepare(slot, slot.gradient, states[slot.param], options_of(slot.group)).tasks)
            for slot in moving
        )

    def counts_recalled_steps(self, groups: Iterable[Mapping[str, Any]]) -> bool:
        """Return what :meth:`counts_steps` does, for groups that :meth:`recall` has just found unchanged."""
        cached = [self._caches[id(group)] for group in groups]
        return all(not one.steps and all(run.backend.counts_steps for run in one.runs) for one in cached)

    def recall(
        self, groups: _Groups, all_rules: Mapping[str, list[Rule]], states: _States
    ) -> list[list[Tensor] | None]:
        """Return the gradients of each group that can repeat its last step, else None for it.

        Nothing of such a group has to be checked or built again.

        Args:
            groups: The parameter groups, each with its parameters' names.
            all_rules: By name.
            states: By parameter.
        """
        if torch.compiler.is_compiling():
            return [None] * len(groups)
        if not self._knows(states):
            self._known = None
            self._caches.clear()
        found: list[list[Tensor] | None] = []
        for names, group in groups:
            cached = self._caches.get(id(group))
            rules = map(all_rules.get, names)
            found.append(None if cached is None else cached.inputs.gradients(group["params"], rules, options_of(group)))
        return found

    def _knows(self, states: _States) -> bool:
        """Return whether the same parameters have the same states as in the last step, whatever is in them."""
        if self._known is None or len(states) != len(self._known[0]):
            return False
        params, values = self._known
        return all(map(is_, states, params)) and all(map(is_, states.values(), values))

    def update(
        self,
        groups: _Groups,
        all_rules: Mapping[str, list[Rule]],
        states: _States,
        recalled: Sequence[list[Tensor] | None] | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip_factor: Tensor | None = None,
    ) -> None:
        """Count a step of every parameter that has a gradient, and update it.

        Args:
            groups: The parameter groups, each with its parameters' names.
            all_rules: By name.
            states: By parameter.
            recalled: What :meth:`recall` returns.
            grad_scale: What gradients are still scaled by; only where :meth:`counts_steps`.
            found_inf: Not zero: leave everything as it is; only there.
            clip_factor: What gradients, no longer scaled, are multiplied by.
        """
        if torch.compiler.is_compiling() and any(is_dtensor(param) for _, group in groups for param in group["params"]):
            self._update_untraced(groups, all_rules, states, None, None, None, clip_factor)
            return
        if recalled is None:
            recalled = self.recall(groups, all_rules, states)
        # By numbers, because Dynamo of torch 2.6 does not go on after a graph break within a zip.
        moving = [
            self._moving(*groups[at], all_rules, states) if recalled[at] is None else [] for at in range(len(groups))
        ]
        steps = [self._begin(groups[at][1], moving[at], recalled[at], clip_factor) for at in range(len(groups))]
        if not torch.compiler.is_compiling():
            if any(grads is None for grads in recalled):
                self._known = list(states), list(states.values())
            # Before the step: an interrupted one has changed them, too.
            _tell_autograd(list(chain.from_iterable([step.written for step in steps])))
        exchange = self._exchange_of([part for step in steps for part, _, _ in step.shared])
        if exchange is not None:
            beta2s = [beta2 for step in steps for _, _, beta2 in step.shared]
            exchange.start([grad for step in steps for _, grad, _ in step.shared], beta2s, clip_factor)
        for step in steps:
            step.start(grad_scale, found_inf)
        if exchange is not None:
            exchange.finish(beta2s)
            for step in steps:
                step.finish()
        self._starting.clear()
        if max(len(self._caches), len(self._runs)) > len(groups):
            present = {id(group) for _, group in groups}
            self._caches = {key: cached for key, cached in self._caches.items() if key in present}
            self._runs = {key: runs for key, runs in self._runs.items() if key in present}

    @disable_dynamo
    def _update_untraced(self, *arguments: Any) -> None:
        """:meth:`update` of DTensors under ``torch.compile``: collectives are waited for between its parts."""
        self.update(*arguments)

    def _moving(
        self, names: Sequence[str], group: dict[str, Any], all_rules: Mapping[str, list[Rule]], states: _States
    ) -> list[_Moving]:
        """Check every parameter of a group that has a gradient, and prepare its tasks."""
        options, found = options_of(group), []
        for name, param in zip(names, group["params"], strict=True):
            if param.grad is not None:
                slot = slot_of(name, param, group, all_rules[name])
                grad, state = slot.gradient, states[param]
                found.append(_Moving(slot, grad, state, self._prepare(slot, grad, state, options)))
        return found

    def _begin(
        self,
        group: Mapping[str, Any],
        moving: Sequence[_Moving],
        recalled: list[Tensor] | None,
        clip_factor: Tensor | None,
    ) -> _GroupStep:
        """Count a step of a group, and return it."""
        hyper = hyperparameters(group, clip_factor)
        if recalled is not None:
            cached = self._caches[id(group)]
            _advance(cached.steps)
            return _GroupStep(hyper, recalled, cached.runs, cached.written)
        traced = torch.compiler.is_compiling()
        by_backend: dict[BackendName, list[NumberedTask]] = defaultdict(list)
        shared = []
        for number, one in enumerate(moving):
            for task in one.prepared.tasks:
                if task.shared is not None:
                    beta2 = 0.0 if id(one.slot.param) in self._starting else hyper.beta2
                    shared.append((task.shared, task.gradient_in(one.grad), beta2))
                if task.entry.param.numel() and not one.prepared.decodes:
                    by_backend[task.backend.name].append((number, task))
        grads = [one.grad for one in moving]
        steps = [one.state["step"] for one in moving if not counts_steps(one.prepared.tasks)]
        to_decode = [one for one in moving if one.prepared.decodes]
        if traced:
            _advance(steps)
            runs = [BACKENDS[name].prepare(tasks, False) for name, tasks in by_backend.items()]
            return _GroupStep(hyper, grads, runs, [], shared, to_decode)
        # The seeds of stochastic rounding come from the counts of the step to take; shared ones are not counted once.
        may_count = len(by_backend) == 1 and len(set(map(id, steps))) == len(steps) and not hyper.stochastic_round
        runs = self._runs_of(group, by_backend, may_count)
        counted = {id(step) for run in runs for step in run.counted()}
        steps = [step for step in steps if id(step) not in counted]
        written = _written(moving, group["amsgrad"])
        self._caches.pop(id(group), None)
        if not (shared or to_decode):
            self._keep(group, moving, runs, steps, written)
        _advance(steps)
        return _GroupStep(hyper, grads, runs, written, shared, to_decode)

    def _runs_of(
        self, group: Mapping[str, Any], by_backend: Mapping[BackendName, Sequence[NumberedTask]], may_count: bool
    ) -> list[Run]:
        """Return the runs of a group's tasks, each kept for as long as its tasks stay the same."""
        kept, used = self._runs.get(id(group), {}), {}
        for name, tasks in by_backend.items():
            run = kept.get(name)
            same = run is not None and run.is_lasting and run.holds(tasks, may_count)
            used[name] = run if run is not None and same else BACKENDS[name].prepare(tasks, may_count)
        self._runs[id(group)] = used
        return list(used.values())

    def _keep(
        self,
        group: Mapping[str, Any],
        moving: Sequence[_Moving],
        runs: Sequence[Run],
        steps: list[Tensor],
        written: Sequence[Tensor],
    ) -> None:
        """Remember how a group takes its step, if nothing but plain tensors take part."""
        grads = [param.grad for param in group["params"]]
        rules, states = [one.slot.rules for one in moving], [one.state for one in moving]
        inputs = StepInputs(group["params"], grads, rules, options_of(group), states)
        if inputs.are_plain and all(run.is_lasting for run in runs):
            self._caches[id(group)] = _CachedGroup(inputs, runs, steps, written)

    def _exchange_of(self, parts: list[SharedPart]) -> BucketedAllReduce | None:
        """Return the all-reduce of these parts, built once for as long as they stay the same."""
        if not parts:
            return None
        if self._exchange is None or not self._exchange.holds(parts):
            self._exchange = BucketedAllReduce(parts)
        return self._exchange

    def _prepare(self, slot: ParamSlot, grad: Tensor, state: Mapping[str, Any], options: tuple[Any, ...]) -> _Prepared:
        """Return a parameter's tasks: those of the last step if their inputs are the same, else new ones, checked."""
        traced = torch.compiler.is_compiling()
        found = None if traced else self._prepared.get(id(slot.param))
        inputs = None if found is None else found.inputs
        if inputs is not None and inputs.gradients([slot.param], [slot.rules], options, [grad], [state]) is not None:
            assert found is not None
            return found
        check_state(slot, grad, state)
        tasks = tasks_of_step(slot, grad, state)
        if not traced:  # no gradient is kept alive
            tasks = [task._replace(entry=task.entry._replace(grad=task.entry.param)) for task in tasks]
        reads_codes = all(task.backend.reads_codes and task.entry.exp_avg_scale is not None for task in tasks)
        decodes = "exp_avg" not in state and not reads_codes
        inputs = None if traced else StepInputs([slot.param], [grad], [slot.rules], options, [state])
        made = _Prepared(inputs, tasks, decodes)
        if not traced:
            self._prepared[id(slot.param)] = made
        return made


def hyperparameters(group: Mapping[str, Any], clip_factor: Tensor | None = None) -> Hyperparameters:
    """Return the options of a parameter group as an update takes them.

    Args:
        group: The group.
        clip_factor: Factor of its gradients.
    """
    beta1, beta2 = group["betas"]
    return Hyperparameters(
        lr=_scalar(group["lr"]),
        beta1=_scalar(beta1),
        beta2=_scalar(beta2),
        eps=0.0 + group["eps"],  # refuses text, which may have been assigned since the group was made
        weight_decay=_scalar(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),  # kernels take no 1, which may have been assigned since the group was made
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        stochastic_round=bool(group["bf16_stochastic_round"]),
        clip_factor=clip_factor,
    )


def _scalar(value: Scalar) -> Scalar:
    return value.squeeze() if isinstance(value, Tensor) and value.dim() else value


def _tell_autograd(written: Sequence[Tensor]) -> None:
    """Raise the version of everything that a step is about to write, as torch's own operations do."""
    if not intercepts_operations():
        increment_version(written)
        return
    # A mode such as allow_mutation_on_saved_tensors keeps what it sees overwritten; kernels it does not see.
    with torch.no_grad():
        for tensor in written:
            tensor.copy_(tensor)


def _written(moving: Iterable[_Moving], amsgrad: bool) -> list[Tensor]:
    """Return the tensors that a step changes; of DTensors also their local shards."""
    found = [tensor for one in moving for tensor in second_moment.written(one.slot.param, one.state, amsgrad)]
    return found + [local(tensor) for tensor in found if is_dtensor(tensor)]


def _advance(steps: list[Tensor]) -> None:
    """Count a step; one by one, as they are on a CPU, a number would become a tensor anew for each."""
    if steps and not torch.compiler.is_compiling() and all(step.is_cpu for step in steps):
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    elif steps:
        torch._foreach_add_(steps, 1)


def _waits(tasks: Iterable[UpdateTask]) -> bool:
    return any(task.shared is not None for task in tasks)


def _update_decoded(moving: _Moving, hyper: Hyperparameters) -> None:
    """Update a parameter whose codes its implementation does not read, one at a time so that little is decoded."""
    slot, grad, state, prepared = moving
    own = decoded(slot.param, state)
    by_key = {task.key: task.shared for task in prepared.tasks}
    shared = [by_key.get(key_of(slot.name, rule.part)) for rule in slot.own_rules]
    for task in tasks_of_step(slot, grad, own, shared, counted=True):
        if task.entry.param.numel():
            task.backend.update([task.entry_with(grad, hyper)], hyper)
    momentum_in(state).write(slot.param, own["exp_avg"], grad, state)
