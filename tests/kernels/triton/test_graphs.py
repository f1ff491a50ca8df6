"""Steps in CUDA graphs and between their replays, on a CPU: what a graph would hold is noted and run at each replay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

pytest.importorskip("triton", reason="Triton is only installed on Linux")

import slimadam.kernels.triton.launch as triton_update
from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.kernels.triton import kernels
from slimadam.optim.step import dispatch
from tests.reference import gradients, slim_adamw_float64

RULES = {"full": Rule(), "rows": Rule((1,), "mean"), "columns": Rule((0,), "mean"), "factored": Rule(form="factored")}
DIMS: dict[str, Any] = {"full": (), "rows": (1,), "columns": (0,), "factored": "factored"}
HYPER: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SHAPE = (6, 5)
STEPS = 8


class Graphs:
    """Captures launches and copies of the host's memory; a graph keeps nothing alive that these read or write.

    Attributes:
        graph: What is being captured, or None.
        copied: How many numbers the captures copy at each replay.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graph: list[Callable[[], Any]] | None = None
        self.copied = 0
        self._on_device = triton_update._on_device
        monkeypatch.setattr(triton_update, "_captures", lambda device: self.graph is not None)
        monkeypatch.setattr(triton_update, "_on_device", self._copy)
        monkeypatch.setattr(kernels, "advance_steps", _Captured(kernels.advance_steps, self))
        for kind, kernel in triton_update._KERNELS.items():
            monkeypatch.setitem(triton_update._KERNELS, kind, _Captured(kernel, self))
        monkeypatch.setattr(dispatch, "runs_triton", lambda device: True)

    @contextmanager
    def capture(self) -> Iterator[list[Callable[[], Any]]]:
        self.graph = nodes = []
        yield nodes
        self.graph = None
        gc.collect()

    def launch(self, function: Callable[..., Any], arguments: Any, options: Any) -> None:
        if self.graph is None:
            function(*arguments, **options)
            return
        held = [weakref.ref(one) if isinstance(one, Tensor) else one for one in arguments]

        def node() -> None:
            found = [one() if isinstance(one, weakref.ref) else one for one in held]
            kept = [one is not None for one, noted in zip(found, held, strict=True) if noted is not None]
            assert all(kept), "the graph reads freed memory"
            function(*found, **options)

        self.graph.append(node)

    def _copy(self, values: Tensor, device: torch.device) -> Tensor:
        if self.graph is None:
            return self._on_device(values, device)
        made = torch.full_like(values, 1 << 20)  # its contents come with the first replay
        self.graph.append(lambda: made.copy_(values))
        self.copied += values.numel()
        return made


class _Captured:
    def __init__(self, kernel: Any, graphs: Graphs) -> None:
        self._kernel, self._graphs, self.arg_names = kernel, graphs, kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self._graphs.launch(self._kernel[grid], arguments, options)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(monkeypatch)


class Training:
    """Four parameters, their gradients of each step, and the steps that each has taken."""

    def __init__(self) -> None:
        self.start = {name: torch.randn(SHAPE) for name in RULES}
        self.params = {name: value.clone().requires_grad_() for name, value in self.start.items()}
        self.optimizer = SlimAdam(self.params.items(), plan=CompressionPlan(RULES), **HYPER)
        self._grads = {name: gradients(SHAPE, STEPS) for name in RULES}
        self._taken: dict[str, list[int]] = {name: [] for name in RULES}
        self._next = 0

    def fill(self, grads: dict[str, Tensor]) -> None:
        """Write the next step's gradients."""
        for name, grad in grads.items():
            grad.copy_(self._grads[name][self._next])
            self._taken[name].append(self._next)
        self._next += 1

    def use(self, grads: dict[str, Tensor]) -> None:
        for name, param in self.params.items():
            param.grad = grads.get(name)

    def eager(self, grads: dict[str, Tensor]) -> None:
        self.fill(grads)
        self.use(grads)
        self.optimizer.step()

    def capture(self, graphs: Graphs, grads: dict[str, Tensor]) -> Callable[[], None]:
        """Return a replay, which takes a step with what is in these gradients."""
        self.use(grads)
        with graphs.capture() as nodes:
            self.optimizer.step()

        def replay() -> None:
            self.fill(grads)
            for node in nodes:
                node()

        return replay

    def check(self) -> None:
        for name, param in self.params.items():
            taken = [self._grads[name][step].float().double().numpy() for step in self._taken[name]]
            expected = slim_adamw_float64(self.start[name].double().numpy(), taken, DIMS[name], **HYPER)
            np.testing.assert_allclose(param.detach().double().numpy(), expected, rtol=1e-5, atol=1e-5, err_msg=name)
            assert self.optimizer.state[param]["step"] == len(taken)


def _buffers() -> dict[str, Tensor]:
    return {name: torch.empty(SHAPE) for name in RULES}


def test_replays_and_eager_steps_keep_to_their_own_gradients(graphs: Graphs) -> None:
    training = Training()
    captured, eager = _buffers(), _buffers()
    training.eager(eager)
    replay = training.capture(graphs, captured)
    replay()
    training.eager(eager)
    replay()
    training.eager(eager)
    replay()
    training.check()


def test_a_capture_does_not_follow_eager_steps_with_other_gradients(graphs: Graphs) -> None:
    """Gradients that stay where they are need no copy; an eager step elsewhere must not lead the graph there."""
    training = Training()
    captured = _buffers()
    training.eager(captured)
    replay = training.capture(graphs, captured)
    training.eager(_buffers())
    gc.collect()
    replay()
    training.check()


def test_two_graphs_keep_to_their_own_gradients(graphs: Graphs) -> None:
    training = Training()
    training.eager(_buffers())
    replays = [training.capture(graphs, _buffers()) for _ in range(2)]
    for replay in (*replays, *replays):
        replay()
    training.check()


def test_tables_of_a_graph_outlive_a_rebuild(graphs: Graphs) -> None:
    """A parameter without gradient builds everything anew, and so does state that is about to be replaced."""
    training = Training()
    captured, eager = _buffers(), _buffers()
    training.eager(eager)
    (run,) = (run for runs in training.optimizer._stepper._runs.values() for run in runs.values())
    (step,) = run._steps.values()
    lasting = [weakref.ref(tensor) for tensor in step._tensors() if tensor is not step._table]
    del run, step
    replay = training.capture(graphs, captured)
    training.eager({name: grad for name, grad in eager.items() if name != "rows"})
    training.optimizer._stepper.forget()
    training.eager(eager)
    gc.collect()
    assert len(lasting) > 8
    assert all(tensor() is not None for tensor in lasting)
    replay()
    training.check()


def test_an_eager_step_before_the_first_replay_trusts_nothing_of_the_capture(graphs: Graphs) -> None:
    training = Training()
    replay = training.capture(graphs, _buffers())
    training.eager(_buffers())
    replay()
    training.eager(_buffers())
    training.check()


def test_a_replay_copies_the_table_alone(graphs: Graphs) -> None:
    """Lists of programs are megabytes for a large model; those of the step before are there already."""
    training = Training()
    training.eager(_buffers())
    replay = training.capture(graphs, _buffers())
    assert graphs.copied == len(RULES) * kernels.FIELDS.value
    replay()
    training.check()


def test_torch_that_cannot_pin_memory_in_a_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device, values = torch.device("cuda"), torch.arange(3)
    captures = True
    monkeypatch.setattr(triton_update, "_captures", lambda device: captures)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(triton_update, "_kept_for_graphs", [])
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    with pytest.raises(RuntimeError, match=r"torch 2\.10\.0 cannot pin memory .*torch 2\.11, or .*foreach=True"):
        triton_update._pinned(values, device)
    captures = False
    triton_update._pinned(values, device)
    assert triton_update._kept_for_graphs == []
    captures = True
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    pinned = triton_update._pinned(values, device)
    assert triton_update._kept_for_graphs[0] is pinned
    assert pinned.tolist() == [0, 1, 2]
