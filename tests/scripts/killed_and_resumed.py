"""Train in child processes that are killed 20 times, anywhere in a step, and compare with an undisturbed run.

The first process imports torch and forks; each child resumes from the last checkpoint and kills itself, without
any chance to clean up, at a random place: before the step, after it, or halfway through writing a checkpoint.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # what torch imports in the first step; here once for all children
from torch import nn

from slimadam import SlimAdam

STEPS, KILLS = 60, 20
PLACES = ("before the step", "after the step", "while saving")


def build() -> tuple[nn.Module, SlimAdam]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 11)).bfloat16()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "momentum_dtype": torch.float32, "bf16_stochastic_round": True}
    return model, SlimAdam(model, plan="factored", **options)


def train(checkpoint: Path, kill_at: tuple[int, str] | None) -> None:
    model, optimizer = build()
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, STEPS):
        tokens = torch.randint(11, (8, 4), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens[:, 0]).backward()
        die(kill_at, step, PLACES[0])
        optimizer.step()
        die(kill_at, step, PLACES[1])
        part = checkpoint.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, part)
        die(kill_at, step, PLACES[2])
        part.replace(checkpoint)


def die(kill_at: tuple[int, str] | None, step: int, place: str) -> None:
    if kill_at == (step, place):
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(checkpoint: Path, kill_at: tuple[int, str] | None) -> int:
    child = os.fork()
    if child == 0:
        train(checkpoint, kill_at)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    kills = sorted((step, random.choice(PLACES)) for step in random.sample(range(STEPS), KILLS))
    with tempfile.TemporaryDirectory() as folder:
        disturbed, undisturbed = Path(folder, "disturbed.pt"), Path(folder, "undisturbed.pt")
        for kill in kills:
            assert in_child(disturbed, kill) == -signal.SIGKILL, kill
        assert in_child(disturbed, None) == 0
        assert in_child(undisturbed, None) == 0
        ours, theirs = torch.load(disturbed, weights_only=True), torch.load(undisturbed, weights_only=True)
    equal = all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    print(f"{len(kills)} kills, {'bitwise equal' if equal else 'different'}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
