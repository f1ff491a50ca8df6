"""Blocks of several parameters on several cores at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from slimadam.kernels import blocked, workers
from torch.utils.flop_counter import FlopCounterMode

from slimadam import CompressionPlan, Rule, SlimAdam

RULES = {
    "rows": Rule((1,), "mean"),
    "columns": Rule((0,), "mean"),
    "all": Rule((0, 1), "mean"),
    "factored": Rule(form="factored"),
    "experts": Rule((2,), "mean"),
    "expert_columns": Rule((1,), "mean"),
    "full": Rule(),
}
SHAPES = {"experts": (5, 6, 7), "expert_columns": (4, 9, 5)}


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small parameters are worth several cores, of which PyTorch uses three."""
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 32)
    monkeypatch.setattr(blocked, "SHARE_ELEMENTS", 64)
    monkeypatch.setattr(blocked, "WORTH_WAKING", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _train(dtype: torch.dtype, steps: int, seen: set[str], **options: Any) -> list[torch.Tensor]:
    """Parameters and state after some steps; ``seen`` gets the names of the threads that updated them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: SHAPES.get(name, (23, 11)) for name in RULES}
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    params = {name: torch.nn.Parameter(start) for name, start in drawn.items()}
    optimizer = SlimAdam(list(params.items()), plan=CompressionPlan(RULES), monitor=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("update_share", "update_batch"):
            patch.setattr(blocked, name, partial(_seeing, seen, getattr(blocked, name)))
        for _ in range(steps):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
    state = [value for kept in optimizer.state_dict()["state"].values() for value in _tensors(kept)]
    return [*(param.detach() for param in params.values()), *state]


def _seeing(seen: set[str], update: Callable[..., None], *arguments: Any) -> None:
    seen.add(threading.current_thread().name)
    update(*arguments)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for held in value.values():
            yield from _tensors(held)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
        (torch.float64, {"maximize": True}),
        (torch.bfloat16, {"bf16_stochastic_round": True}),
        (torch.bfloat16, {"momentum_dtype": torch.float32}),
        (torch.float32, {"momentum_dtype": torch.bfloat16, "variance_init": "gradient"}),
    ],
    ids=str,
)
def test_several_cores_give_what_one_gives(dtype: torch.dtype, options: dict[str, Any]) -> None:
    on_three: set[str] = set()
    several = _train(dtype, 4, on_three, **options)
    torch.set_num_threads(1)
    on_one: set[str] = set()
    one = _train(dtype, 4, on_one, **options)
    for ours, expected in zip(several, one, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert on_one == {threading.current_thread().name}
    assert len(on_three) > 1
    assert on_one.isdisjoint(on_three)


def test_one_large_parameter_is_left_to_all_cores() -> None:
    param = torch.nn.Parameter(torch.ones(40, 40))
    param.grad = torch.ones(40, 40)
    optimizer = SlimAdam([("w", param)], plan=CompressionPlan({"w": Rule((0,), "mean")}), lr=0.5, weight_decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "run", lambda _: pytest.fail("a column average cannot be shared"))
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((40, 40), 0.5))


def test_each_worker_uses_one_core_and_every_other_thread_as_many_as_before() -> None:
    found: list[int] = []
    workers.run([lambda: found.append(torch.get_num_threads())] * 6)
    assert found == [1] * 6
    assert torch.get_num_threads() == 3
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found[-1] == 3


def test_a_mode_that_sees_operations_goes_on_seeing_them() -> None:
    names: list[str] = []
    tasks = [lambda: names.append(threading.current_thread().name)] * 4
    with FlopCounterMode(display=False):
        workers.run(tasks)
    with torch.device("cpu"):
        workers.run(tasks)
    assert set(names) == {threading.current_thread().name}


@pytest.mark.parametrize("inference", [False, True])
def test_workers_record_no_gradients_and_share_inference_mode(inference: bool) -> None:
    with torch.inference_mode(inference):
        param = torch.ones(3)
        modes: list[tuple[bool, bool]] = []

        def task() -> None:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            param.clone().add_(1)

        workers.run([task] * 4)
    assert modes == [(False, inference)] * 4


def test_an_error_reaches_the_caller_and_nothing_begins_after_it() -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 0:
            raise MemoryError("no room")
        time.sleep(0.05)
        done.append(number)

    with pytest.raises(MemoryError, match="no room"):
        workers.run(partial(task, number) for number in range(50))
    at_return = list(done)
    time.sleep(0.2)
    assert done == at_return
    assert len(done) < 10


@pytest.mark.parametrize("moments", [(0.1,), (0.1, 0.2)], ids=["once", "again while it waits"])
def test_an_interrupted_caller_waits_for_what_is_at_work(moments: tuple[float, ...]) -> None:
    at_work, ended = [], []

    def task() -> None:
        at_work.append(1)
        time.sleep(0.4)
        ended.append(1)

    workers.run([lambda: None] * 3)  # starting the pool may take longer than the first interrupt
    timers = [
        threading.Timer(moment, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))  # type: ignore[arg-type]
        for moment in moments
    ]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        workers.run([task] * 30)
    assert len(at_work) == len(ended) == 3


@pytest.mark.parametrize(("fused", "side"), [(None, 30), (True, 300)])  # what is small the compiled step does alone
def test_parameters_that_share_memory_are_updated_one_after_the_other(
    fused: bool | None, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "run", lambda _: pytest.fail("several would write to the same memory"))

    def train(threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        memory = torch.randn(side, side, generator=generator)
        params = {"whole": memory, "again": memory, "part": memory[side // 3 :]}
        named = [(name, torch.nn.Parameter(param)) for name, param in params.items()]
        plan = CompressionPlan({name: Rule((1,), "mean") for name in params})
        optimizer = SlimAdam(named, plan=plan, lr=0.1, fused=fused, monitor=False)
        for _ in range(20):
            for _, param in named:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        return memory

    torch.testing.assert_close(train(4), train(1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "mode", [lambda: torch.inference_mode(), lambda: torch.device("meta")], ids=["inference", "meta"]
)
def test_memory_used_again_is_of_no_passing_mode(mode: Callable[[], Any]) -> None:
    found: list[torch.Tensor] = []

    def step() -> None:  # in a thread, which has no such memory yet
        param = torch.nn.Parameter(torch.ones(4, 6))
        param.grad = torch.ones(4, 6)
        optimizer = SlimAdam([("w", param)], plan=CompressionPlan({"w": Rule((0,), "mean")}), lr=0.5, weight_decay=0.0)
        with mode():
            optimizer.step()
        other = torch.nn.Parameter(torch.ones(4, 6))
        other.grad = torch.ones(4, 6)
        SlimAdam([("w", other)], plan=CompressionPlan({"w": Rule((0,), "mean")}), lr=0.5, weight_decay=0.0).step()
        found.extend([param.detach(), other.detach()])

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    for param in found:
        torch.testing.assert_close(param, torch.full((4, 6), 0.5))
    assert len(found) == 2


def test_threads_to_come_start_with_the_number_of_the_process() -> None:
    found: list[int] = []
    torch.get_num_threads()
    for call in (lambda: torch.set_num_threads(2), lambda: found.append(torch.get_num_threads())):
        workers._pools.clear()
        workers.run([lambda: None] * 3)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert torch.get_num_threads() == 3
    assert found == [2]


def test_threads_of_the_user_take_steps_at_once() -> None:
    torch.set_num_threads(1)
    (*expected,) = _train(torch.float32, 3, set())
    torch.set_num_threads(3)
    results: list[list[torch.Tensor]] = []

    def train() -> None:
        torch.set_num_threads(3)
        results.append(_train(torch.float32, 3, set()))

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        for ours, wanted in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


PROGRAM = """
import os, threading, torch
from slimadam.kernels import workers
torch.set_num_threads(2)
done = []
tasks = [lambda: done.append(os.getpid())] * 4
"""


@pytest.mark.parametrize(
    "ending",
    [
        "workers.run(tasks)\nif os.fork() == 0:\n    workers.run(tasks)\n    os._exit(len(done) - 8)\n"
        "assert os.wait()[1] == 0\nprint(len(done))",
        "import atexit\natexit.register(lambda: (workers.run(tasks), print(len(done))))",
        "workers.run(tasks)\ndone.clear()\n"
        "def late():\n    threading.main_thread().join()\n    workers.run(tasks)\n    print(len(done))\n"
        "threading.Thread(target=late).start()",
        "workers._lock.acquire()\nasked = threading.Event()\n"
        "def fork():\n    asked.set()\n"
        "    if os.fork() == 0:\n        workers.run(tasks)\n        os._exit(len(done) - 4)\n"
        "    print(4 + os.wait()[1])\n"
        "thread = threading.Thread(target=fork)\nthread.start()\nasked.wait()\nthread.join(0.3)\n"
        "workers._lock.release()\nthread.join()",
    ],
    ids=["in a forked child", "at exit", "after the main thread has ended", "in a child forked while a pool starts"],
)
def test_it_works_where_threads_are_hard_to_have(ending: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert (ran.returncode, ran.stdout) == (0, "4\n"), ran.stderr
