"""Train a GPT on as many GPUs as there are, with FSDP2 and SlimAdam, in plain PyTorch.

    torchrun --nproc-per-node 8 examples/fsdp2_gpt.py --tokens tokens.npy --vocabulary 50304 --checkpoints run
    torchrun --nproc-per-node 2 examples/fsdp2_gpt.py --tiny        # on CPUs, on bytes that every Python has

``--tokens`` is a one-dimensional array of integers saved by ``numpy.save``; it is mapped into memory, not read.
With ``--checkpoints`` the same command started again goes on from the last complete one, on any number of ranks.
Weights and batches depend on the seed and the step alone: but for rounding, training is the same on any number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn import functional as F  # noqa: N812
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.checkpoint import checkpoint

from slimadam import CatapultWarmup, SharpnessLogger, SlimAdam, critical_lr
from slimadam.demo.data import load

Batch = list[tuple[Tensor, Tensor]]
"""The micro-batches of one step on this rank: inputs and targets."""

SETTINGS = ("layers", "width", "heads", "vocabulary", "context", "batch", "steps", "lr", "warmup", "catapult", "plan",
            "momentum", "seed")  # fmt: skip

TINY = {"layers": 2, "width": 64, "heads": 4, "context": 64, "batch": 8, "micro_batch": 2, "steps": 20, "warmup": 5}


class Block(nn.Module):
    """Causal self-attention and an MLP, each on the normalised residual stream.

    With ``recompute`` the backward pass computes the activations inside again instead of keeping them.
    """

    def __init__(self, width: int, heads: int, recompute: bool) -> None:
        super().__init__()
        self.heads, self.recompute = heads, recompute
        self.attention_norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape in and out: ``[batch, length, width]``."""
        return checkpoint(self.compute, x, use_reentrant=False) if self.recompute else self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """What :meth:`forward` returns."""
        normed = self.attention_norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.token_embedding = nn.Embedding(options.vocabulary, width)
        self.position_embedding = nn.Embedding(options.context, width)
        self.blocks = nn.ModuleList(Block(width, options.heads, options.recompute) for _ in range(options.layers))
        self.final_norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, options.vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the next token; both arguments are integers of shape ``[batch, length]``."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model(options: argparse.Namespace, device: torch.device) -> GPT:
    """The model, sharded block by block; no rank ever holds all of it."""
    with torch.device("meta"):
        model = GPT(options)
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, options.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        if options.compile:
            block.compile()
        fully_shard(block, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    model.to_empty(device=device)
    initialise(model, options, device)
    return model


@torch.no_grad()
def initialise(model: GPT, options: argparse.Namespace, device: torch.device) -> None:
    """As GPT-2. Every rank draws whole weights, one at a time, and keeps its shard: the same on any number of ranks."""
    generator = torch.Generator(device).manual_seed(options.seed)
    for name, param in model.named_parameters():
        if param.dim() == 1:
            param.fill_(1)
            continue
        writes_to_residual = name.endswith(("out.weight", "down.weight"))
        std = 0.02 / math.sqrt(2 * options.layers) if writes_to_residual else 0.02
        whole = torch.empty(param.shape, device=device).normal_(std=std, generator=generator)
        param.copy_(distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None))


def build_optimizer(model: GPT, options: argparse.Namespace) -> SlimAdam:
    """SlimAdam, built after sharding; norms do not decay."""
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, param) for name, param in named if param.dim() > 1]},
        {"params": [(name, param) for name, param in named if param.dim() == 1], "weight_decay": 0.0},
    ]
    return SlimAdam(
        groups,
        lr=options.lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        plan=None if options.plan == "none" else options.plan,
        momentum_dtype=getattr(torch, options.momentum),
        model=model,
    )


def build_schedule(optimizer: SlimAdam, options: argparse.Namespace, critical: float | None) -> LRScheduler:
    """Linear warmup, from the critical learning rate where one was measured, then a cosine to a tenth."""
    if critical is None:
        warmup: LRScheduler = LinearLR(optimizer, 1 / options.warmup, total_iters=options.warmup)
        steps = options.warmup
    else:
        warmup = CatapultWarmup(optimizer, options.warmup, critical)
        steps = warmup.steps
    cosine = CosineAnnealingLR(optimizer, options.steps - steps, eta_min=options.lr / 10)
    return SequentialLR(optimizer, [warmup, cosine], [steps])


def read_tokens(options: argparse.Namespace) -> np.ndarray:
    """A mapped file of tokens, or the bytes of Python's standard library."""
    if options.tokens is None:
        return load(None, options.context).train.numpy()
    tokens = np.load(options.tokens, mmap_mode="r")
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise SystemExit(f"--tokens {options.tokens} must be one array of integers with one dimension, by numpy.save")
    if len(tokens) <= options.context:
        raise SystemExit(f"--tokens {options.tokens} has {len(tokens)} tokens, --context {options.context} needs more")
    return tokens


def batches(tokens: np.ndarray, options: argparse.Namespace, first: int, device: torch.device) -> Iterator[Batch]:
    """This rank's share of the batch of each step from ``first`` on: random windows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(first, options.steps):
        drawn = np.random.default_rng((options.seed, step)).integers(len(tokens) - options.context, size=options.batch)
        windows = np.stack([tokens[start : start + options.context + 1] for start in drawn[rank::ranks]])
        if not 0 <= windows.min() <= windows.max() < options.vocabulary:
            found = f"{windows.min()} to {windows.max()}"
            raise SystemExit(f"--vocabulary {options.vocabulary} must be larger than any token; found {found}")
        micro_batches = torch.from_numpy(windows.astype(np.int64)).to(device).split(options.micro_batch)
        yield [(micro[:, :-1], micro[:, 1:]) for micro in micro_batches]


def accumulate(model: GPT, batch: Batch) -> Tensor:
    """Add the gradient of this rank's mean loss, micro-batch by micro-batch; returns the loss."""
    total = torch.zeros((), device=batch[0][0].device)
    for inputs, targets in batch:
        loss = model(inputs, targets) / len(batch)
        loss.backward()
        total += loss.detach()
    return total


def evaluate(model: GPT, batch: Batch) -> Tensor:
    """This rank's mean loss."""
    return torch.stack([model(inputs, targets) for inputs, targets in batch]).mean()


def save(options: argparse.Namespace, step: int, model: GPT, optimizer: SlimAdam, schedule: LRScheduler) -> None:
    """Write a checkpoint into a folder of its own; only when it is complete does ``latest`` name it.

    Whoever is killed on the way leaves the checkpoint that ``latest`` names as it was.
    """
    folder: Path = options.checkpoints
    path = folder / f"step-{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # what a killed run left of it
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "schedule": schedule}, checkpoint_id=path)
    if dist.get_rank() == 0:
        (path / "settings.json").write_text(json.dumps(settings(options)))
        pending = folder / "latest.pending"
        with pending.open("w") as file:
            file.write(path.name)
            file.flush()
            os.fsync(file.fileno())
        pending.replace(folder / "latest")
        newest_first = sorted((one for one in folder.glob("step-*") if one.name <= path.name), reverse=True)
        for old in newest_first[options.keep :]:
            shutil.rmtree(old)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a run that is resumed must have as it was."""
    return {name: str(value) for name, value in vars(options).items() if name in SETTINGS}


def latest_step(options: argparse.Namespace) -> int:
    """The step of the last complete checkpoint, the same on every rank; 0: there is none."""
    found: list[Any] = [0, []]
    if options.checkpoints is not None and dist.get_rank() == 0 and (options.checkpoints / "latest").exists():
        name = (options.checkpoints / "latest").read_text()
        saved = json.loads((options.checkpoints / name / "settings.json").read_text())
        changed = [
            f"--{key} {saved[key]}, not {value}" for key, value in settings(options).items() if saved[key] != value
        ]
        found = [int(name.removeprefix("step-")), changed]
    dist.broadcast_object_list(found)
    step, changed = found
    if changed:
        raise SystemExit(
            f"{options.checkpoints} holds a run with {'; '.join(changed)}: resume it with its own settings"
        )
    return int(step)


def resume(folder: Path, step: int, model: GPT, optimizer: SlimAdam, schedule: LRScheduler) -> None:
    """Load a checkpoint, whatever the number of ranks that wrote it."""
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state, "schedule": schedule}
    dcp.load(loaded, checkpoint_id=folder / f"step-{step:08d}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def measure_critical_lr(model: GPT, optimizer: SlimAdam, batch: Batch, target: float) -> float:
    """The largest rate at which the first step would not raise the loss of its batch, or the target."""
    accumulate(model, batch)
    critical = critical_lr(optimizer, partial(evaluate, model, batch), max_lr=target)
    optimizer.zero_grad()
    return critical


def train(options: argparse.Namespace) -> dict[int, float]:
    """Train in the process group, which must exist.

    Returns:
        The loss of each step that was logged.
    """
    ranks = dist.get_world_size()
    if options.batch % (ranks * options.micro_batch):
        raise SystemExit(f"--batch {options.batch} must be a multiple of --micro-batch times {ranks} ranks")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokens = read_tokens(options)
    model = build_model(options, device)
    optimizer = build_optimizer(model, options)
    first = latest_step(options)
    critical = None
    if options.catapult:  # a schedule that is loaded brings the rate that was measured
        batch = next(batches(tokens, options, 0, device))
        critical = options.lr if first else measure_critical_lr(model, optimizer, batch, options.lr)
    schedule = build_schedule(optimizer, options, critical)
    if first:
        resume(options.checkpoints, first, model, optimizer, schedule)
    probe = None
    if options.probe_every:
        probe = SharpnessLogger(optimizer, every=options.probe_every, log=print_row)
        probe.steps = first
    losses, started, tokens_seen = {}, time.perf_counter(), 0
    for step, batch in enumerate(batches(tokens, options, first, device), start=first + 1):
        optimizer.zero_grad()
        loss = accumulate(model, batch)
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        if probe is not None:
            probe.step(partial(evaluate, model, batch))
        optimizer.step()
        schedule.step()
        tokens_seen += options.batch * options.context
        if step % options.log_every == 0:
            dist.all_reduce(loss)
            losses[step] = loss.item() / ranks
            print_row(
                {
                    "loss": losses[step],
                    "gradient_norm": norm.full_tensor().item(),
                    "lr": optimizer.param_groups[0]["lr"],
                    "tokens_per_second": tokens_seen / (time.perf_counter() - started),
                    "state_megabytes": optimizer.memory().total / 1e6,
                },
                step,
            )
            started, tokens_seen = time.perf_counter(), 0
        if options.checkpoints and (step % options.save_every == 0 or step == options.steps):
            save(options, step, model, optimizer, schedule)
    return losses


def print_row(values: dict[str, float], step: int) -> None:
    """One line of figures, from rank 0."""
    if dist.get_rank() == 0:
        print(f"step {step}", *(f"{name} {value:.5g}" for name, value in values.items()), flush=True)


def at_least(lowest: int, text: str) -> int:
    """A whole number of the command line."""
    if not text.isdecimal() or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    count = partial(at_least, 1)
    add("--tiny", action="store_true", help="sizes that a CPU trains in seconds")
    add("--tokens", type=Path, help="tokens saved by numpy.save; default: Python's standard library as bytes")
    add("--vocabulary", type=count, default=256)
    add("--layers", type=count, default=24)
    add("--width", type=count, default=2048)
    add("--heads", type=count, default=16)
    add("--context", type=count, default=2048, help="tokens in a sequence")
    add("--steps", type=count, default=20_000)
    add("--batch", type=count, default=512, help="sequences in a step, of all ranks together")
    add("--micro-batch", type=count, default=8, help="sequences at a time on a rank; gradients of the rest accumulate")
    add("--lr", type=float, default=3e-4)
    add("--warmup", type=count, default=1000, help="steps of linear warmup from zero")
    add("--catapult", action="store_true", help="start the warmup at the critical learning rate, with the same slope")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--plan", default="factored", help="factored, rules, none, or the path of a plan; auto without --checkpoints")
    add("--momentum", choices=["float32", "bfloat16"], default="float32")
    add("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of forward and backward pass")
    add("--recompute", action=argparse.BooleanOptionalAction, default=True, help="activation checkpointing")
    add("--compile", action="store_true", help="torch.compile each block")
    add("--seed", type=partial(at_least, 0), default=0)
    add("--log-every", type=count, default=10)
    add("--probe-every", type=partial(at_least, 0), default=0, help="steps between sharpness measurements; 0: none")
    add("--checkpoints", type=Path, help="folder to save to and to resume from; default: neither")
    add("--save-every", type=count, default=1000)
    add("--keep", type=count, default=2, help="complete checkpoints to keep")
    if parser.parse_args(arguments).tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if not options.warmup < options.steps:
        parser.error(f"--warmup {options.warmup} must be less than --steps {options.steps}")
    if options.width % options.heads:
        parser.error(f"--width {options.width} must be a multiple of --heads {options.heads}")
    if options.plan == "auto" and options.checkpoints:
        parser.error("--plan auto is not saved while it measures; make a plan by slimadam calibrate and give its path")
    return options


def main() -> None:
    """What ``torchrun`` starts on each rank."""
    options = parse()
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device else "gloo", device_id=device)
    train(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
