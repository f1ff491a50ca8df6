"""Eager operations of independent parameters on several cores at once.

An operation on a block that fits one core's cache is too short to be worth splitting over threads. So each worker, a
thread of Python, runs whole operations on one core; they release the interpreter's lock while they compute.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import torch

from slimadam.torch_private import intercepts_operations

MOST_WORKERS = 16
"""Into so many pieces PyTorch itself would split an operation on a block at most."""

Task = Callable[[], None]

_lock = threading.RLock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _after_fork() -> None:
    _pools.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):  # a child must not begin with a lock or a number of threads that is half changed
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)


def count() -> int:
    """How many workers may run: PyTorch's number of threads up to a limit, or 1 where work must stay in this thread.

    Modes that intercept operations (dispatch and function modes, ``torch.set_default_device`` among them) hold for
    the thread that entered them alone.
    """
    return 1 if intercepts_operations() else min(torch.get_num_threads(), MOST_WORKERS)


def run(tasks: Iterable[Task]) -> None:
    """Run all tasks, which must not touch the same tensors, and return when no worker is at work on them any more.

    Args:
        tasks: Taken in this order by whichever worker is free.

    Raises:
        BaseException: The first that a task raised. Tasks that had not begun then are left out, as they are when this
            thread is interrupted.
    """
    waiting, workers, inference = deque(tasks), count(), torch.is_inference_mode_enabled()
    at_work: list[Future[None]] = []
    try:
        if workers > 1:
            with suppress(RuntimeError):  # no thread can be started: the interpreter is ending
                pool = _pool(workers)
                for _ in range(min(workers, len(waiting))):
                    at_work.append(pool.submit(_work_without_gradients, waiting, inference))
        if not at_work:
            _work(waiting)
        for future in at_work:
            future.result()
    finally:
        _end(waiting, at_work)


def _end(waiting: deque[Task], at_work: Collection[Future[None]]) -> None:
    """Let nothing more begin, and wait for what has, however often this thread is interrupted meanwhile."""
    interrupted: BaseException | None = None
    while waiting or not all(future.done() for future in at_work):
        try:
            waiting.clear()
            wait(at_work)
        except BaseException as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _work_without_gradients(waiting: deque[Task], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        _work(waiting)


def _work(waiting: deque[Task]) -> None:
    try:
        while True:
            try:
                task = waiting.popleft()
            except IndexError:
                return
            task()
    except BaseException:
        waiting.clear()
        raise


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            _pools[workers] = _started(workers)
        return _pools[workers]


def _started(workers: int) -> ThreadPoolExecutor:
    """A pool all of whose threads run, each with its own operations limited to one thread."""
    pool, together = ThreadPoolExecutor(workers, "slimadam"), threading.Barrier(workers)

    def begin() -> None:
        together.wait()
        torch.get_num_threads()  # a thread's first use of it takes over the process's number
        torch.set_num_threads(1)

    beginnings: list[Future[None]] = []
    with ThreadPoolExecutor(1, "slimadam") as other:
        before = other.submit(torch.get_num_threads).result()
        try:
            for _ in range(workers):
                beginnings.append(pool.submit(begin))
            for beginning in beginnings:
                beginning.result()
        except BaseException:
            together.abort()
            pool.shutdown(wait=False)
            raise
        finally:
            wait(beginnings)
            other.submit(torch.set_num_threads, before).result()  # what threads yet to come start with
    return pool
