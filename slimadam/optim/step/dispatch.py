"""Implementations of the update, and the choice of one for a parameter. A new implementation is a new class here."""

from __future__ import annotations

import importlib.util
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from typing_extensions import override

from slimadam.kernels.cpp import update
from slimadam.kernels.float8 import is_coded
from slimadam.kernels.foreach import foreach_update
from slimadam.kernels.interface import Dims, Entry, Hyperparameters, second_moment_dtype
from slimadam.kernels.layout import has_gaps, is_marked
from slimadam.kernels.reference import reference_update

if TYPE_CHECKING:
    from slimadam.kernels.triton.launch import TritonStep
    from slimadam.optim.step.tasks import UpdateTask

logger = logging.getLogger("slimadam")

BackendName = Literal["reference", "foreach", "compiled", "triton"]
NumberedTask = tuple[int, "UpdateTask"]
"""A task, and the index of its parameter's gradient."""

_FUSED_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class Run:
    """The update of some tasks by one implementation, step after step. Holds no gradient.

    Args:
        backend: The implementation.
        tasks: The tasks.
        may_count: Whether it may advance step counts itself.
    """

    is_lasting = True
    """False if it is valid for one step alone."""

    def __init__(self, backend: Backend, tasks: Sequence[NumberedTask], may_count: bool) -> None:
        self.backend, self._tasks, self._may_count = backend, list(tasks), may_count
        self._waits = any(task.shared is not None for _, task in tasks)

    def holds(self, tasks: Sequence[NumberedTask], may_count: bool) -> bool:
        """Return whether it was made for these tasks.

        Args:
            tasks: The tasks.
            may_count: As in the constructor.
        """
        return (
            may_count == self._may_count
            and len(tasks) == len(self._tasks)
            and all(
                number == own and task is held for (number, task), (own, held) in zip(tasks, self._tasks, strict=True)
            )
        )

    def counted(self) -> Sequence[Tensor]:
        """Return the step counts that it advances itself."""
        return ()

    def start(
        self,
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Take all of the step that waits for no other rank.

        Args:
            grads: The parameters' gradients.
            hyper: Hyperparameters of the step.
            grad_scale: Scale of the gradients; only where the implementation counts steps itself.
            found_inf: Not zero: change nothing; only there.
        """
        self._update([(grads[number], task) for number, task in self._tasks if task.shared is None], hyper)

    def finish(self, grads: Sequence[Tensor], hyper: Hyperparameters) -> None:
        """Take the rest of the step, once averages over several ranks are there.

        Args:
            grads: As in :meth:`start`.
            hyper: As in :meth:`start`.
        """
        if self._waits:
            self._update([(grads[number], task) for number, task in self._tasks if task.shared is not None], hyper)

    def _update(self, tasks: Sequence[tuple[Tensor, UpdateTask]], hyper: Hyperparameters) -> None:
        if tasks:
            self.backend.update([task.entry_with(grad, hyper) for grad, task in tasks], hyper)


class _Gradients:
    """The gradients of tasks among those of the parameters: a part of each, or the whole."""

    def __init__(self, tasks: Sequence[NumberedTask]) -> None:
        self._tasks = tasks
        takes_all = all(task.rule.part is None and task.slice_index is None for _, task in tasks)
        self._numbers = [number for number, _ in tasks] if takes_all else None

    def of(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._numbers is None:
            return [task.gradient_in(grads[number]) for number, task in self._tasks]
        return grads if len(self._numbers) == len(grads) else [grads[number] for number in self._numbers]


class _TableRun(Run):
    """A run of the compiled step, whose table stays valid while nothing moves."""

    def __init__(self, backend: Backend, tasks: Sequence[NumberedTask], may_count: bool) -> None:
        super().__init__(backend, tasks, may_count)
        entries = [task.entry for _, task in tasks]
        self._table = update.Table(entries, may_count)
        self._counted = [entry.step for entry in entries] if may_count else []
        self.is_lasting = self._table.is_lasting
        self._own = _Gradients(tasks)

    @override
    def counted(self) -> Sequence[Tensor]:
        return self._counted

    @override
    def start(
        self,
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        seeds = [task.seed() for _, task in self._tasks] if hyper.stochastic_round else []
        self._table.run(self._own.of(grads), seeds, hyper)


class _TritonRun(Run):
    """A run of Triton's kernels, with tables by device and precision of the step count."""

    def __init__(self, backend: Backend, tasks: Sequence[NumberedTask], may_count: bool) -> None:
        super().__init__(backend, tasks, may_count)
        alike: dict[tuple[torch.device, torch.dtype], list[NumberedTask]] = defaultdict(list)
        for number, task in tasks:
            alike[task.entry.param.device, task.entry.step.dtype].append((number, task))
        self._alike = {key: (some, _Gradients(some)) for key, some in alike.items()}
        self._steps: dict[tuple[torch.device, torch.dtype], TritonStep] = {}
        self._started: list[tuple[TritonStep, Tensor | None]] = []

    @override
    def start(
        self,
        grads: Sequence[Tensor],
        hyper: Hyperparameters,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        divisor = _divisor(grad_scale, hyper.clip_factor)
        self._started = []
        for key, (tasks, own) in self._alike.items():
            known = self._steps.get(key)
            step = None if known is None else known.with_gradients(own.of(grads), hyper)
            if step is None:
                step = _triton().TritonStep([task.entry_with(grads[number], hyper) for number, task in tasks], hyper)
            if not step.is_captured:
                self._steps[key] = step
            scale, found = (None if value is None else value.to(key[0]) for value in (divisor, found_inf))
            step.run(hyper, scale, found)
            self._started.append((step, scale))

    @override
    def finish(self, grads: Sequence[Tensor], hyper: Hyperparameters) -> None:
        for step, scale in self._started:
            step.run_given(hyper, scale)


class Backend:
    """An implementation of the update.

    Attributes:
        name: The name that :meth:`slimadam.SlimAdam.backend` returns.
        reads_codes: True if it reads and writes int8 first moments itself; the others get them decoded.
        counts_steps: True if it counts steps itself, on the device.
        update: Function that updates tensors once.
    """

    name: ClassVar[BackendName]
    reads_codes: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = False
    update: Callable[[Sequence[Entry], Hyperparameters], None]

    def prepare(self, tasks: Sequence[NumberedTask], may_count: bool) -> Run:
        """Return a run of some tasks.

        Args:
            tasks: The tasks.
            may_count: Whether it may advance step counts itself.
        """
        return Run(self, tasks, may_count)

    def workspace(self, entries: Sequence[Entry]) -> int:
        """Return the bytes that it keeps on the device to update these tensors, which need no memory."""
        return 0

    def supports(self, entry: Entry) -> bool:
        """Return whether it supports these tensors; those that read memory as the parameter's do not support all."""
        return True


class _Reference(Backend):
    name = "reference"
    update = staticmethod(reference_update)


class _Foreach(Backend):
    name = "foreach"
    update = staticmethod(foreach_update)


class _Compiled(Backend):
    name = "compiled"
    reads_codes = True
    update = staticmethod(update.compiled_update)

    @override
    def prepare(self, tasks: Sequence[NumberedTask], may_count: bool) -> Run:
        waits = any(task.shared is not None for _, task in tasks)
        return Run(self, tasks, may_count) if waits else _TableRun(self, tasks, may_count)

    @override
    def supports(self, entry: Entry) -> bool:
        if not entry.step.is_cpu or entry.grad.dtype != entry.param.dtype:
            return False
        return _dtypes_fit(entry) and _same_layout(entry, has_gaps(entry.param))


class _Triton(Backend):
    name = "triton"
    reads_codes = True
    counts_steps = True

    @override
    def prepare(self, tasks: Sequence[NumberedTask], may_count: bool) -> Run:
        return _TritonRun(self, tasks, may_count)

    @override
    def workspace(self, entries: Sequence[Entry]) -> int:
        return int(_triton().workspace(entries))

    @override
    def supports(self, entry: Entry) -> bool:
        if entry.grad.dtype not in _FUSED_DTYPES or not _dtypes_fit(entry):
            return False
        return _same_layout(entry, has_gaps=False) and bool(_triton().same_layout(entry))


REFERENCE: Final = _Reference()
BACKENDS: Final[Mapping[BackendName, Backend]] = {
    backend.name: backend for backend in (REFERENCE, _Foreach(), _Compiled(), _Triton())
}


def choose_backend(
    param: Tensor, exp_avg_dtype: torch.dtype, averaged_dims: Sequence[Dims], group: Mapping[str, Any]
) -> BackendName:
    """Return the implementation for one parameter.

    ``foreach=False`` without ``fused=True``, ``fused=False``, ``differentiable``, ``capturable`` on a CPU, tracing and
    complex parameters take the readable reference. ``foreach=True`` takes lists of tensors at once. The default are
    Triton kernels on CUDA and one compiled pass on a CPU. Without Triton or the compiled library, and on CUDA where
    averages are over dimensions that are not adjacent, lists are taken where they can be.

    Args:
        param: The parameter.
        exp_avg_dtype: Precision of its first moment.
        averaged_dims: For each of its second moments, the averaged dimensions.
        group: Its parameter group.
    """
    if torch.compiler.is_compiling() or group["differentiable"] or param.is_complex() or type(param.data) is not Tensor:
        return "reference"
    listable = exp_avg_dtype == param.dtype and not group["bf16_stochastic_round"]
    if group["foreach"]:
        return "foreach" if listable else "reference"
    if (group["foreach"] is False and not group["fused"]) or group["fused"] is False:
        return "reference"
    if runs_triton(param.device) and _triton().supports(param, averaged_dims, group["momentum_dtype"] == "int8"):
        return "triton"
    if param.device.type != "cpu":
        return "foreach" if listable else "reference"
    if group["capturable"] or not update.supports(param, exp_avg_dtype, averaged_dims):
        return "reference"
    if update.library() is not None:
        return "compiled"
    # On a CPU lists take no lr or betas that are tensors.
    has_tensors = any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"]))
    return "foreach" if listable and not has_tensors else "reference"


def runs_triton(device: torch.device) -> bool:
    """Return whether Triton's kernels run on a device, which one small launch finds out before the first step.

    Under a capture or a mode such as ``FakeTensorMode`` nothing can be tried, and it is taken for granted.
    """
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing() or type(torch.empty(0)) is not Tensor:
        return importlib.util.find_spec("triton") is not None
    return _launches_triton(device)


@cache
def _launches_triton(device: torch.device) -> bool:
    """Return whether a kernel can be launched on a device; warn of the reason once where it cannot."""
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed, so steps take lists of tensors at once; pip install triton")
        return False
    try:
        _triton().try_launch(device)
    except Exception as error:  # compilers, drivers and Triton itself have various ways to say no
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Triton cannot run on %s, so steps take lists of tensors at once: %s", device, reason)
        return False
    return True


def steps_on_device(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter's step count lies on its device, as with ``torch.optim.AdamW(fused=True)``.

    Args:
        param: The parameter.
        group: Its group.
    """
    fused = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    default = fused and not group["differentiable"]
    return bool(group["capturable"]) or (default and param.is_floating_point() and runs_triton(param.device))


def _triton() -> ModuleType:
    """Import late: where no kernel runs, nobody waits for Triton."""
    from slimadam.kernels.triton import launch

    return launch


def _divisor(grad_scale: Tensor | None, clip_factor: Tensor | None) -> Tensor | None:
    """Return the number by which Triton's kernels divide gradients to unscale and to clip them."""
    if clip_factor is None:
        return grad_scale
    return clip_factor.reciprocal() if grad_scale is None else grad_scale / clip_factor


def _dtypes_fit(entry: Entry) -> bool:
    """Return whether state and gradient can go with the parameter, whose precision may have changed."""
    dtype = entry.param.dtype
    if any(map(is_marked, (entry.param, entry.grad, entry.exp_avg))) or not _second_moment_fits(entry):
        return False
    if entry.exp_avg_scale is None and entry.exp_avg.dtype not in (dtype, torch.float32, torch.bfloat16):
        return False
    if entry.exp_avg_scale is not None and not _are_codes(entry.exp_avg, entry.exp_avg_scale):
        return False
    return entry.step.numel() == 1 and entry.step.dtype in (torch.float32, torch.float64)


def _second_moment_fits(entry: Entry) -> bool:
    """Return whether the second moment is in the precision of steps, or in codes, one for each element."""
    if is_coded(entry.exp_avg_sq[0]):
        return not (any(entry.averaged_dims) or entry.max_exp_avg_sq or entry.precomputed)
    wanted = second_moment_dtype(entry.param.dtype)
    return all(moment.dtype == wanted for moment in (*entry.exp_avg_sq, *entry.max_exp_avg_sq))


def _are_codes(codes: Tensor, scales: Tensor) -> bool:
    return codes.dtype == torch.int8 and scales.dtype == torch.uint8 and scales.is_contiguous()


def _same_layout(entry: Entry, has_gaps: bool) -> bool:
    """Return whether gradient and moments have the parameter's layout; under gaps, second moments have none."""
    param, second = entry.param, (*entry.exp_avg_sq, *entry.max_exp_avg_sq)
    same_shape = [entry.grad, entry.exp_avg]
    if has_gaps and not all(moment.is_contiguous() for moment in second):
        return False
    if not any(entry.averaged_dims) and not has_gaps:
        same_shape += second
    if any(tensor.shape != param.shape or tensor.device != param.device for tensor in same_shape):
        return False
    if param.is_contiguous():
        return all(tensor.is_contiguous() for tensor in same_shape)
    return all(tensor.stride() == param.stride() for tensor in same_shape)
