"""Replay of a script's loss at other values of its parameters, without running the script again.

While the script computes the loss, every tensor operation that depends on a parameter is noted below autograd, with the
memory that it read, made or wrote. Run again in the same order, on the parameters as they are then and on the same data
and random numbers, the operations give the loss of the same batch there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from slimadam.curvature.probe.snapshot import NARROW, rough_share
from slimadam.utils.torch_private import TorchDispatchMode, neg_view, tree_leaves, tree_map, version

_LARGEST_ERROR = 1e-2
_ROUNDINGS = 1000


class ReplayError(Exception):
    """The loss cannot be computed again; the message says why."""


@dataclass(frozen=True)
class _Alias:
    """A tensor as a view of memory that the recorded operations make or write."""

    memory: StorageWeakRef
    dtype: torch.dtype
    device: torch.device
    layout: tuple[int, torch.Size, tuple[int, ...]]
    is_conj: bool
    is_neg: bool

    @classmethod
    def of(cls, tensor: Tensor, memory: StorageWeakRef) -> _Alias:
        layout = (int(tensor.storage_offset()), tensor.size(), tensor.stride())
        return cls(memory, tensor.dtype, tensor.device, layout, tensor.is_conj(), tensor.is_neg())

    def within(self, made: dict[StorageWeakRef, torch.UntypedStorage]) -> Tensor:
        view = torch.empty(0, dtype=self.dtype, device=self.device).set_(made[self.memory], *self.layout)
        view = neg_view(view) if self.is_neg else view
        return view.conj() if self.is_conj else view


class _Call(NamedTuple):
    """One operation on ``inputs``, args and kwargs; ``makes`` lists the outputs that are new memory."""

    function: Callable[..., Any]
    inputs: tuple[Any, Any]
    makes: list[tuple[int, StorageWeakRef, torch.Size]]
    writes: list[StorageWeakRef]
    seeds: list[tuple[Callable[[Tensor], Any], Tensor]]

    def aliases(self) -> list[_Alias]:
        """Return the inputs that other operations make."""
        return [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, _Alias)]

    def run(self, made: dict[StorageWeakRef, torch.UntypedStorage]) -> None:
        for set_state, state in self.seeds:
            set_state(state)
        args, kwargs = tree_map(lambda leaf: leaf.within(made) if isinstance(leaf, _Alias) else leaf, self.inputs)
        outputs = tree_leaves(self.function(*args, **kwargs))
        for position, memory, shape in self.makes:
            output = outputs[position]
            if not isinstance(output, Tensor):  # needed by a backward pass only
                continue
            if output.shape != shape:
                raise ReplayError("the shapes of tensors in it depend on the parameters' values, as in boolean masks")
            made[memory] = output.untyped_storage()


class _Loss(NamedTuple):
    """A call of ``backward()``: its loss, the parameters whose gradients it changed, and whether they had none."""

    value: float | None  # where it was one number
    alias: _Alias | None
    owners: set[int]
    is_first: bool


class LossRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes within its block how losses are computed from parameters (leaves that require gradients).

    Attributes:
        recording: Whether operations are noted; they run in any case.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = True
        self._calls: list[_Call] = []
        self._losses: list[_Loss] = []
        self._parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._of_parameters: set[StorageWeakRef] = set()
        self._depends: set[StorageWeakRef] = set()
        self._before_writing: dict[StorageWeakRef, torch.UntypedStorage] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note ``backward()`` and all operations within the block."""
        original = torch.autograd.backward

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if not self.recording:
                original(tensors, *args, **kwargs)
                return
            self.recording = False
            try:
                before = self._gradients()
                original(tensors, *args, **kwargs)
                self._note_loss(tensors, before, [*args[:1], *kwargs.values()])
            finally:
                self.recording = True

        torch.autograd.backward = backward
        try:
            with self:
                yield
        finally:
            torch.autograd.backward = original

    def replay(self, params: Sequence[Tensor]) -> Replay:
        """Return the sum of the losses whose gradients some parameters hold.

        Raises:
            ReplayError: There is none, or it was not computed by operations on tensors that could be noted.
        """
        wanted = {id(param) for param in params}
        losses: list[_Loss] = []
        for loss in self._losses:
            if loss.owners & wanted:
                losses = [old for old in losses if not (loss.is_first and old.owners & loss.owners)]
                losses.append(loss)
        if not losses:
            raise ReplayError("no backward() of a loss has given these parameters gradients since the step before")
        values = [loss.value for loss in losses if loss.value is not None]
        aliases = [loss.alias for loss in losses if loss.alias is not None]
        if len(values) < len(losses):
            raise ReplayError("backward() was called on more than one number, so that there is no loss to compare")
        if len(aliases) < len(losses):
            raise ReplayError(
                "the loss was not computed by operations of torch in this process's main thread that can be repeated"
            )
        needed = {alias.memory for alias in aliases}
        calls: list[_Call] = []
        for call in reversed(self._calls):
            if not needed.isdisjoint([*call.writes, *(memory for _, memory, _ in call.makes)]):
                calls.append(call)
                needed.update(alias.memory for alias in call.aliases())
        # Read as they are, made by no operation.
        live = {memory for memory, _ in _by_memory([call.inputs for call in calls])}
        if any(param.grad is not None and _memory(param) not in live for param in params):
            raise ReplayError(
                "a parameter that has a gradient was made from other tensors, and what the loss does with it cannot be "
                "told from those; make it an nn.Parameter"
            )
        return Replay(calls[::-1], aliases, self._before_writing, sum(values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.recording:
            return func(*args, **kwargs)
        read = set()
        for memory, tensor in _by_memory((args, kwargs)):
            read.add(memory)
            if tensor.requires_grad and tensor.is_leaf:
                self._parameters[tensor] = None
                self._of_parameters.add(memory)
                if isinstance(tensor, nn.Parameter):  # made from others (a copy, another precision), now its own
                    self._depends.discard(memory)
        if read.isdisjoint(self._of_parameters) and read.isdisjoint(self._depends):
            return func(*args, **kwargs)
        written = dict(_by_memory(_written(func, args, kwargs)))
        if not self._of_parameters.isdisjoint(written):  # initialisation, or a step of an optimizer
            return func(*args, **kwargs)
        for memory, tensor in written.items():
            if memory not in self._depends:
                self._before_writing[memory] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
                self._depends.add(memory)
        inputs = tree_map(self._noted, (args, kwargs))
        seeds = _seeds(func, tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        makes = [
            (position, memory, output.shape)
            for position, leaf in enumerate(tree_leaves(result))
            for memory, output in _by_memory(leaf)
            if memory not in read
        ]
        self._depends.update(memory for _, memory, _ in makes)
        if makes or written:
            self._calls.append(_Call(func, inputs, makes, list(written), seeds))
        return result

    def _noted(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and (memory := _memory(leaf)) in self._depends:
            return _Alias.of(leaf, memory)
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    def _gradients(self) -> dict[Tensor, tuple[int, int, bool]]:
        """Return for each parameter the identity and version of its gradient, and whether it is none or zero."""
        found = {}
        for param in list(self._parameters):
            grad = param.grad
            found[param] = (id(grad), 0, True) if grad is None else (id(grad), version(grad), not bool(grad.any()))
        return found

    def _note_loss(self, tensors: Any, before: dict[Tensor, tuple[int, int, bool]], gradients: Sequence[Any]) -> None:
        after = self._gradients()
        changed = [param for param, state in before.items() if state[:2] != after[param][:2]]
        is_first = all(before[param][2] for param in changed)
        leaves = tree_leaves(tensors)
        weighted = any(isinstance(leaf, Tensor) for leaf in tree_leaves(gradients))
        value = leaves[0].item() if len(leaves) == 1 and leaves[0].numel() == 1 and not weighted else None
        noted = self._noted(leaves[0])
        alias = noted if isinstance(noted, _Alias) else None
        self._losses.append(_Loss(value, alias, set(map(id, changed)), is_first))


@dataclass(frozen=True, eq=False)
class Replay:
    """Computes a recorded loss again.

    Attributes:
        recorded: The loss that the script computed.
    """

    _calls: Sequence[_Call]
    _losses: Sequence[_Alias]
    _before_writing: dict[StorageWeakRef, torch.UntypedStorage]
    recorded: float

    @property
    def micro_batches(self) -> int:
        """The number of calls of ``backward()`` that the loss is the sum of."""
        return len(self._losses)

    @property
    def rounding(self) -> float | None:
        """The share of the loss that is rounding; None where nothing that depends on the parameters has 16 bits."""
        losses = {loss.dtype for loss in self._losses}
        made = {alias.dtype for call in self._calls for alias in call.aliases()}
        return rough_share(losses) if (made | losses).intersection(NARROW) else None

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the loss at the parameters as they are now."""
        made = {memory: kept.clone() for memory, kept in self._before_writing.items()}  # type: ignore[no-untyped-call]
        for call in self._calls:
            call.run(made)
        return sum(loss.within(made).item() for loss in self._losses)

    def check(self, computed: float) -> None:
        """Raise ReplayError where the loss computed at the script's own parameters is not the recorded one."""
        if not math.isfinite(self.recorded) and not math.isfinite(computed):
            return
        eps = max(torch.finfo(loss.dtype).eps for loss in self._losses)
        allowed = min(_LARGEST_ERROR, _ROUNDINGS * eps) * abs(self.recorded)
        if not abs(computed - self.recorded) <= allowed:
            raise ReplayError(
                f"computed again on the same batch the loss is {computed:.6g}, not {self.recorded:.6g} as in the "
                "script: it depends on something beside parameters and batch that has changed meanwhile"
            )


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """Return a key of a tensor's memory for as long as it is referred to; None for sparse tensors, without any."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def _by_memory(tree: Any) -> Iterator[tuple[StorageWeakRef, Tensor]]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and (memory := _memory(leaf)) is not None:
            yield memory, leaf


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _seeds(func: Any, leaves: Sequence[Any]) -> list[tuple[Callable[[Tensor], Any], Tensor]]:
    """Return setters of the random-number generators that an operation uses, with their present states."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return []
    seeds: list[tuple[Callable[[Tensor], Any], Tensor]] = [(torch.set_rng_state, torch.get_rng_state())]
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
        seeds.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
    return seeds + [(leaf.set_state, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]
