"""Several processes on this machine, joined by gloo, that run one function."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.interpreter import mend_interpreter

TIMEOUT = 180
# torch imports the last three, which takes seconds, when FSDP first steps or a checkpoint is saved.
PRELOADED = (
    "torch",
    "torch.distributed.tensor",
    "slimadam",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch._dynamo",
)


def environment_of_ranks() -> dict[str, str]:
    """What ``torchrun`` is started with, so that ranks end in peace."""
    folders = [str(Path(__file__).parent / "leaving"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def clean_processes() -> ForkServerContext:
    """What starts processes that have imported torch and slimadam, and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def on_ranks(ranks: int, tmp_path: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each rank; it must be importable. A rank's exception fails the test."""
    context = clean_processes()
    queue = context.Queue()
    store = str(tmp_path / "store")
    processes = [
        context.Process(target=_rank, args=(rank, ranks, store, queue, function, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=TIMEOUT) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    errors = [value for value in results.values() if isinstance(value, _Failure)]
    assert not errors, "\n".join(error.text for error in errors)
    return [results[rank] for rank in range(ranks)]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(rank: int, ranks: int, store: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    mend_interpreter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        queue.put((rank, function(*args)))
    except BaseException:
        queue.put((rank, _Failure(f"rank {rank}: {traceback.format_exc()}")))
    queue.close()
    queue.join_thread()  # torch 2.6 may end the process while it destroys the group
    torch.distributed.destroy_process_group()
