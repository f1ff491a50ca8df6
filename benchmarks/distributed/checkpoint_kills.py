"""Kill one of two ranks with SIGKILL at random moments of a save; the previous checkpoint must load bit for bit.

    python -m benchmarks.checkpoint_kills

Each trial trains and saves, each time into a folder of its own, synchronously or in the background, and kills one rank
at a random moment of the last save. A program started anew then follows docs/distributed-checkpoints.md: it takes the
newest folder that has a ``.metadata`` file.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import machine
from slimadam import SlimAdam

SHAPE = (256, 7)
PREVIOUS, KILLED = 2, 3
"""Numbers of the save whose duration is measured and of the one that is killed; the first makes everything warm."""
PRELOADED = ("torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")


def build(mesh: Any) -> tuple[nn.Module, SlimAdam]:
    """Return a tiny model and its optimizer, both the same in every process."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(4)))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, SlimAdam(model, lr=1e-2, plan="factored")


def _train(model: nn.Module, optimizer: SlimAdam, steps: range) -> None:
    """Step with gradients that depend on the step alone."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        for index, param in enumerate(model.parameters()):
            grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * step + index))
            assert isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        optimizer.step()
    optimizer.zero_grad()


def complete(folder: Path) -> list[Path]:
    """Return the folders of finished checkpoints, oldest first: ``.metadata`` is put in place last, by a rename."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def _rank_main(rank: int, folder: Path, in_background: bool, pipe: Connection) -> None:
    """Run one of two ranks: save, train, tell that the next save begins, and save until done or killed."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import async_save, save
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    group = torch.distributed.new_group(backend="gloo")
    model, optimizer = build(init_device_mesh("cpu", (2,)))
    for number in range(1, KILLED + 1):
        _train(model, optimizer, range(3 * number, 3 * number + 3))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        target = folder / f"step-{number}"
        torch.distributed.barrier()
        if number == KILLED:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the survivor complains
        pipe.send(number)
        started = time.perf_counter()
        if in_background:
            async_save(state, checkpoint_id=target, process_group=group).result()  # type: ignore[union-attr]
        else:
            save(state, checkpoint_id=target, process_group=group)
        pipe.send(time.perf_counter() - started)
        if number == PREVIOUS:
            tensors = whole(state)
            if rank == 0:
                torch.save(tensors, folder / "expected.pt")
    os._exit(0)  # without waiting for the other rank, which may be dead


def whole(state: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a nested dict, by its path, gathered."""
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    flat, _ = flatten_state_dict(state)
    return {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for key, value in flat.items()
        if isinstance(value, torch.Tensor)
    }


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint as one process loads it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    model, optimizer = build(None)
    state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))


def _trial(seed: int, in_background: bool) -> dict[str, Any]:
    """Kill one rank in a save; return what the previous checkpoint and the newest complete one hold then."""
    drawn = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipes = [context.Pipe() for _ in range(2)]
        ranks = [
            context.Process(target=_rank_main, args=(rank, folder, in_background, pipe))
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        victim, share = drawn.randrange(2), drawn.random()
        try:
            for pipe, _ in pipes:
                begun = [pipe.recv() for _ in range(2 * KILLED - 1)]
                duration = begun[2 * PREVIOUS - 1]
            time.sleep(share * duration)
            ranks[victim].kill()
            ranks[1 - victim].join(timeout=2 * duration)  # until torchrun would end it
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        expected = torch.load(folder / "expected.pt", weights_only=True)
        kept = loaded(folder / f"step-{PREVIOUS}")
        newest = complete(folder)[-1]
        loaded(newest)
        return {
            "seed": seed,
            "in_background": in_background,
            "killed_rank": victim,
            "killed_at_share_of_save": share,
            "files_written": sorted(path.name for path in (folder / f"step-{KILLED}").glob("*")),
            "newest_complete": newest.name,
            "previous_is_bitwise_the_same": kept.keys() == expected.keys()
            and all(torch.equal(kept[key], value) for key, value in expected.items()),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trials and write the result file."""
    parser = machine.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="trials; every other one saves in the background")
    given = parser.parse_args(arguments)
    trials = [_trial(seed, in_background=bool(seed % 2)) for seed in range(given.kills)]
    lost = [one["seed"] for one in trials if not one["previous_is_bitwise_the_same"]]
    in_time = sum(one["newest_complete"] == f"step-{PREVIOUS}" for one in trials)
    figures = {"kills": len(trials), "before_the_end": in_time, "lost": lost, "trials": trials}
    machine.write("checkpoint_kills", figures, given.out)
    print(f"{len(trials)} kills, {in_time} before the save was complete; previous checkpoint lost in {len(lost)}")


if __name__ == "__main__":
    main()
