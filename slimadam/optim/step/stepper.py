"""Taking a step: from a group's parameters to the implementations that update them.

What does not change from step to step is put together once for each parameter and kept as long as it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from slimadam.distributed.all_reduce import BucketedAllReduce
from slimadam.distributed.sharded_moments import SharedPiece
from slimadam.kernels.cpp.update import Table
from slimadam.kernels.interface import Entry, Hyperparameters, Scalar
from slimadam.kernels.layout import is_marked
from slimadam.optim.step.cache import (
    GroupCache,
    Prepared,
    StateIdentities,
    options_of,
    state_layouts,
)
from slimadam.optim.step.dispatch import TAKES_CODES, UPDATES, Backend, triton_step
from slimadam.optim.step.param_groups import check_has_first_moment, check_memory, check_shapes
from slimadam.optim.step.tasks import UpdateTask, own_gradient, seed_of, tasks_of_step, with_gradient
from slimadam.state import second_moment
from slimadam.state.first_moment import decoded, momentum_in
from slimadam.state.rule import Rule
from slimadam.utils.dtensor import is_dtensor, local, local_gradient
from slimadam.utils.torch_private import disable_dynamo, intercepts_operations

if TYPE_CHECKING:
    from slimadam.kernels.triton.launch import TritonStep


# A parameter with a gradient: its name, itself, the gradient and the state that this rank holds, and how it is updated.
_OfStep = tuple[str, Tensor, Tensor, MutableMapping[str, Any], Prepared]

_Coded = tuple[str, Tensor, Mapping[str, Any], list[Rule], Mapping[str, Any], list[SharedPiece | None]]


# A step of Triton's kernels, and what their gradients are divided by.
_OnTriton = tuple["TritonStep", Hyperparameters, Tensor | None]


class _Work(NamedTuple):
    """Work of a step for one parameter group.

    Attributes:
        group: The group itself.
        hyper: Its hyperparameters.
        entries: By implementation, tensors that can be updated at once.
        given: By implementation, tensors that wait for averages over several ranks.
        shared: Pieces, gradients and decays of those averages.
        to_decode: Parameters whose codes are decoded first: name, parameter, group, rules, state and averages.
        to_decode_given: Those of them that wait for averages over several ranks.
        tabled: The table of earlier steps that the compiled step takes.
        written: Every tensor that the step changes.
    """

    group: Mapping[str, Any]
    hyper: Hyperparameters
    entries: dict[Backend, list[Entry]]
    given: dict[Backend, list[Entry]]
    shared: list[tuple[SharedPiece, Tensor, Scalar]]
    to_decode: list[_Coded]
    to_decode_given: list[_Coded]
    tabled: _Tabled | None = None
    written: Sequence[Tensor] = ()


class _Tabled(NamedTuple):
    """A table of the compiled step, and the gradients and seeds of the step to take."""

    table: Table
    grads: list[Tensor]
    seeds: list[int]

    def run(self, hyper: Hyperparameters) -> None:
        self.table.run(self.grads, self.seeds, hyper)


class _CachedGroup(NamedTuple):
    """How a group has taken its last step, to be repeated while that stands.

    Attributes:
        rests_on: What it rests on.
        pieces: Everything with elements, each with the number of its parameter.
        are_whole: Whether these are all parameters, none of them cut.
        steps: Counts of steps that no implementation advances itself.
        table: Of the compiled step, where that takes all pieces.
        written: What the step changes.
    """

    rests_on: GroupCache
    pieces: list[tuple[int, UpdateTask]]
    are_whole: bool
    steps: list[Tensor]
    table: Table | None
    written: list[Tensor]

    def work(self, group: Mapping[str, Any], hyper: Hyperparameters, grads: Sequence[Tensor]) -> _Work:
        """Count a step, and what is done for it."""
        _advance(self.steps)
        entries: dict[Backend, list[Entry]] = defaultdict(list)
        tabled = None
        if self.table is not None:
            own = (
                list(grads) if self.are_whole else [own_gradient(piece, grads[number]) for number, piece in self.pieces]
            )
            seeds = [seed_of(piece) for _, piece in self.pieces] if hyper.stochastic_round else []
            tabled = _Tabled(self.table, own, seeds)
        else:
            for number, piece in self.pieces:
                entries[piece.backend].append(with_gradient(piece, grads[number], hyper))
        return _Work(group, hyper, entries, defaultdict(list), [], [], [], tabled, self.written)


class Stepper:
    """The step of every parameter group of an optimizer."""

    def __init__(self) -> None:
        self._prepared: dict[int, Prepared] = {}
        self._triton: dict[tuple[int, torch.device, torch.dtype], TritonStep] = {}
        self._caches: dict[int, _CachedGroup] = {}
        self._known: StateIdentities | None = None
        self._exchange: BucketedAllReduce | None = None
        self._starting: set[int] = set()

    def start_from_gradient(self, params: Iterable[Tensor]) -> None:
        """Let averages of these over several ranks be those of the next squared gradient alone."""
        self._starting.update(map(id, params))

    def forget(self) -> None:
        """Let go of the state's tensors, which are about to be replaced."""
        self._prepared.clear()
        self._caches.clear()
        self._known = None
        self._exchange = None
        self._triton.clear()

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Let go of parameters that no group holds any more."""
        params = list(params)
        if len(self._prepared) > len(params):
            known = set(map(id, params))
            self._prepared = {key: prepared for key, prepared in self._prepared.items() if key in known}
            self._caches.clear()
            self._triton.clear()

    def is_on_triton(
        self,
        names: Sequence[str],
        group: Mapping[str, Any],
        all_rules: Mapping[str, list[Rule]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
    ) -> bool:
        """Return whether Triton updates every parameter of a group that has a gradient.

        Args:
            names: The names of the group's parameters.
            group: The group.
            all_rules: By name.
            states: By parameter.
        """
        options = options_of(group)
        return all(
            not is_dtensor(param)
            and self._prepare(name, param, param.grad, group, options, all_rules[name], states[param]).counts_itself
            for name, param in zip(names, group["params"], strict=True)
            if param.grad is not None
        )

    def recall(
        self,
        groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
        all_rules: Mapping[str, list[Rule]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
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
        if self._known is None or not self._known.are(states):
            self._known = None
            self._caches.clear()
        found = []
        for names, group in groups:
            standing = self._caches.get(id(group))
            rules = map(all_rules.get, names)
            same = None if standing is None else standing.rests_on.gradients(group["params"], rules, options_of(group))
            found.append(same)
        return found

    def update(
        self,
        groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
        all_rules: Mapping[str, list[Rule]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
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
            grad_scale: What gradients are still scaled by; only where :meth:`is_on_triton`.
            found_inf: Not zero: leave everything as it is; only there.
            clip_factor: What gradients, no longer scaled, are multiplied by.
        """
        if torch.compiler.is_compiling() and any(is_dtensor(param) for _, group in groups for param in group["params"]):
            self._update_untraced(groups, all_rules, states, None, None, None, clip_factor)
            return
        if recalled is None:
            recalled = self.recall(groups, all_rules, states)
        # By numbers, because Dynamo of torch 2.6 does not go on after a graph break within a zip.
        held = [self._held(*groups[at], all_rules, states) if recalled[at] is None else [] for at in range(len(groups))]
        works = [
            self._begin(groups[at][1], all_rules, held[at], recalled[at], clip_factor) for at in range(len(groups))
        ]
        if not torch.compiler.is_compiling():
            if any(grads is None for grads in recalled):
                self._known = StateIdentities(states)
            # Before the step: an interrupted one has changed them, too.
            _tell_autograd([tensor for work in works for tensor in work.written])
        exchange = self._exchange_of([piece for work in works for piece, _, _ in work.shared])
        if exchange is not None:
            beta2s = [beta2 for work in works for _, _, beta2 in work.shared]
            exchange.start([grad for work in works for _, grad, _ in work.shared], beta2s, clip_factor)
        on_triton: list[_OnTriton] = []
        for work in works:
            for parameter in work.to_decode:
                _update_decoded(*parameter, work.hyper)
            on_triton.extend(self._run_triton(work, grad_scale, found_inf))
            if work.tabled is not None:
                work.tabled.run(work.hyper)
            for backend, entries in work.entries.items():
                UPDATES[backend](entries, work.hyper)
        if exchange is not None:
            exchange.finish(beta2s)
            for step, hyper, scale in on_triton:
                step.run_given(hyper, scale)
            for work in works:
                for parameter in work.to_decode_given:
                    _update_decoded(*parameter, work.hyper)
                for backend, entries in work.given.items():
                    UPDATES[backend](entries, work.hyper)
        self._starting.clear()
        if len(self._caches) > len(groups):
            present = {id(group) for _, group in groups}
            self._caches = {key: standing for key, standing in self._caches.items() if key in present}

    @disable_dynamo
    def _update_untraced(self, *arguments: Any) -> None:
        """:meth:`update` of DTensors under ``torch.compile``: collectives are waited for between its parts."""
        self.update(*arguments)

    def _held(
        self,
        names: Sequence[str],
        group: Mapping[str, Any],
        all_rules: Mapping[str, list[Rule]],
        states: Mapping[Tensor, MutableMapping[str, Any]],
    ) -> list[_OfStep]:
        """Check every parameter of a group that has a gradient, and prepare its step."""
        options, held = options_of(group), []
        for name, param in zip(names, group["params"], strict=True):
            if param.grad is not None:
                rules, state, grad = all_rules[name], states[param], local_gradient(name, param)
                prepared = self._prepare(name, param, grad, group, options, rules, state)
                held.append((name, param, grad, state, prepared))
        return held

    def _begin(
        self,
        group: Mapping[str, Any],
        all_rules: Mapping[str, list[Rule]],
        held: Sequence[_OfStep],
        recalled: list[Tensor] | None,
        clip_factor: Tensor | None,
    ) -> _Work:
        """Count a step of what a group holds, and find what it takes."""
        hyper = hyperparameters(group, clip_factor)
        traced = torch.compiler.is_compiling()
        if recalled is not None:
            return self._caches[id(group)].work(group, hyper, recalled)
        if not traced:
            self._caches.pop(id(group), None)
        written = [] if traced else _written(((param, state) for _, param, _, state, _ in held), group["amsgrad"])
        work = _Work(group, hyper, defaultdict(list), defaultdict(list), [], [], [], written=written)
        steps = [state["step"] for _, _, _, state, prepared in held if not prepared.counts_itself]
        _advance(steps)
        for name, param, grad, state, prepared in held:
            decodes = not prepared.supports_codes and "exp_avg" not in state
            if decodes:
                averages = [piece.shared for piece in prepared.pieces]
                coded = work.to_decode_given if any(averages) else work.to_decode
                coded.append((name, param, group, all_rules[name], state, averages))
            for piece in prepared.pieces:
                entry = with_gradient(piece, grad, hyper)
                if piece.shared is not None:
                    beta2 = 0.0 if id(param) in self._starting else hyper.beta2
                    work.shared.append((piece.shared, entry.grad, beta2))
                if entry.param.numel() and not decodes:
                    together = work.entries if piece.shared is None else work.given
                    together[piece.backend].append(entry)
        if not (work.shared or work.to_decode or traced):
            self._keep(group, [(param, all_rules[name], state, prepared) for name, param, _, state, prepared in held])
        return work

    def _keep(
        self,
        group: Mapping[str, Any],
        held: Sequence[tuple[Tensor, list[Rule], Mapping[str, Any], Prepared]],
    ) -> None:
        """Remember how a group takes its step, if nothing but plain tensors take part."""
        params, rules, states, prepared = (list(kind) for kind in zip(*held, strict=True)) if held else ([], [], [], [])
        rests_on = GroupCache(group["params"], params, rules, options_of(group), states)
        if not rests_on.holds_nothing_else:
            return
        pieces = [(number, piece) for number, one in enumerate(prepared) for piece in one.pieces]
        pieces = [(number, piece) for number, piece in pieces if piece.entry.param.numel()]
        steps = [state["step"] for state, one in zip(states, prepared, strict=True) if not one.counts_itself]
        # The seeds of stochastic rounding come from the counts of the step to take; shared ones are not counted once.
        counts = not group["bf16_stochastic_round"] and len(set(map(id, steps))) == len(steps)
        table = Table([piece.entry for _, piece in pieces], counts) if _all_compiled(pieces) else None
        if table is not None and counts:
            counted = {id(piece.entry.step) for _, piece in pieces}
            steps = [step for step in steps if id(step) not in counted]
        if table is None or table.is_lasting:
            written = _written(zip(params, states, strict=True), group["amsgrad"])
            whole = all(piece.rule.part is None and piece.slice_index is None for _, piece in pieces)
            are_whole = whole and [number for number, _ in pieces] == list(range(len(params)))
            self._caches[id(group)] = _CachedGroup(rests_on, pieces, are_whole, steps, table, written)

    def _exchange_of(self, pieces: list[SharedPiece]) -> BucketedAllReduce | None:
        """Return the all-reduce of these pieces, built once for as long as they stay the same."""
        if not pieces:
            return None
        if self._exchange is None or not self._exchange.fits(pieces):
            self._exchange = BucketedAllReduce(pieces)
        return self._exchange

    def _prepare(
        self,
        name: str,
        param: Tensor,
        grad: Tensor,
        group: Mapping[str, Any],
        options: tuple[Any, ...],
        rules: list[Rule],
        state: Mapping[str, Any],
    ) -> Prepared:
        own = local(param)
        traced = torch.compiler.is_compiling()
        found = None if traced else self._prepared.get(id(param))
        if found is not None and found.holds(param, own, grad, rules, options, state):
            return found
        if not traced:
            check_memory(name, own, grad, state)
        check_shapes(name, rules, param, second_moment.moments_of(state, rules))
        check_has_first_moment(name, state)
        momentum_in(state).check(name, param, state)
        if group["amsgrad"] and not second_moment.moments_of(state, rules, "max_exp_avg_sq"):
            raise RuntimeError(
                f"{name!r}: amsgrad=True was set after steps without it, which kept no maxima; set it back, or begin "
                "the parameter's state anew by optimizer.state.pop(param)"
            )
        pieces = list(tasks_of_step(name, param, grad, group, rules, state))
        if not traced:
            pieces = [piece._replace(entry=piece.entry._replace(grad=piece.entry.param)) for piece in pieces]
        made = Prepared(
            param=param,
            rules=rules,
            options=options,
            address=own.data_ptr(),
            shape=param.shape,
            dtype=param.dtype,
            grad_dtype=grad.dtype,
            grad_is_marked=not traced and is_marked(grad),
            grad_has_memory=not traced and bool(grad.data_ptr()),
            stride=own.stride(),
            grad_stride=grad.stride(),
            state_layouts=([],) if traced else state_layouts(state),
            state=tuple(state.values()),
            pieces=pieces,
            supports_codes=all(
                piece.backend in TAKES_CODES and piece.entry.exp_avg_scale is not None for piece in pieces
            ),
            counts_itself={piece.backend for piece in pieces if piece.entry.param.numel()} == {"triton"},
        )
        if not traced:
            self._prepared[id(param)] = made
            self._triton.clear()  # tables tell tensors by address alone
        return made

    def _run_triton(self, work: _Work, grad_scale: Tensor | None, found_inf: Tensor | None) -> Iterator[_OnTriton]:
        """Take from a group what Triton updates, and all of its step that waits for no other rank."""
        entries = [*work.entries.pop("triton", ()), *work.given.pop("triton", ())]
        alike: dict[tuple[torch.device, torch.dtype], list[Entry]] = defaultdict(list)
        for entry in entries:
            alike[entry.param.device, entry.step.dtype].append(entry)
        for (device, step_dtype), there in alike.items():
            prepared = self._triton.get((id(work.group), device, step_dtype))
            if prepared is None or not prepared.fits(there, work.hyper):
                prepared = self._triton[id(work.group), device, step_dtype] = triton_step(there, work.hyper)
            divisor = _divisor(grad_scale, work.hyper.clip_factor)
            scale, found = (None if value is None else value.to(device) for value in (divisor, found_inf))
            prepared.run(work.hyper, scale, found)
            yield prepared, work.hyper, scale


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
        eps=group["eps"],
        weight_decay=_scalar(group["weight_decay"]),
        amsgrad=bool(group["amsgrad"]),
        maximize=bool(group["maximize"]),  # kernels take no 1, which may have been assigned since the group was made
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        stochastic_round=group["bf16_stochastic_round"],
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


def _written(held: Iterable[tuple[Tensor, Mapping[str, Any]]], amsgrad: bool) -> list[Tensor]:
    """Return the tensors that a step changes; of DTensors also their local shards."""
    found = [tensor for param, state in held for tensor in second_moment.written(param, state, amsgrad)]
    return found + [local(tensor) for tensor in found if is_dtensor(tensor)]


def _divisor(grad_scale: Tensor | None, clip_factor: Tensor | None) -> Tensor | None:
    """Return the number by which Triton's kernels divide gradients to unscale and to clip them."""
    if clip_factor is None:
        return grad_scale
    return clip_factor.reciprocal() if grad_scale is None else grad_scale / clip_factor


def _advance(steps: list[Tensor]) -> None:
    """Count a step; one by one, as they are on a CPU, a number would become a tensor anew for each."""
    if steps and not torch.compiler.is_compiling() and all(step.is_cpu for step in steps):
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    elif steps:
        torch._foreach_add_(steps, 1)


def _all_compiled(pieces: Sequence[tuple[int, UpdateTask]]) -> bool:
    return bool(pieces) and all(piece.backend == "compiled" for _, piece in pieces)


def _update_decoded(
    name: str,
    param: Tensor,
    group: Mapping[str, Any],
    rules: Sequence[Rule],
    state: Mapping[str, Any],
    averages: list[SharedPiece | None],
    hyper: Hyperparameters,
) -> None:
    """Update a parameter whose codes its implementation does not read, one at a time so that little is decoded."""
    own, grad = decoded(param, state), local_gradient(name, param)
    for piece in tasks_of_step(name, param, grad, group, rules, own, averages, counted=True):
        if piece.entry.param.numel():
            UPDATES[piece.backend]([with_gradient(piece, grad, hyper)], hyper)
    momentum_in(state).write(param, own["exp_avg"], grad, state)
