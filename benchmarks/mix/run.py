"""Check by fine-tuning that the advised mix is right: ``python -m benchmarks.mix``.

A small byte-level GPT learns prose; at that checkpoint :func:`slimadam.advise_mix` says how much prose to keep in the
mix when it turns to code; then it is fine-tuned at every share, from the same checkpoint, over several seeds (each
with its own initialisation, pre-training and batches). What counts is the task that fares worse: the larger change of
the two held-out losses. The advice is confirmed if in every seed, at the advised share,

1. neither held-out loss rises, and
2. the task that fares worse fares better than at either end (code alone, prose alone).

Reported beside it, and no part of the criterion: where fine-tuning itself was best, and whether the interval of the
advice holds that share.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.mix.domains import batch, code, prose
from benchmarks.mix.plot import draw
from slimadam import MixAdvice, SlimAdam, advise_mix
from slimadam.demo.data import ByteData
from slimadam.demo.model import ByteGPT

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "data-mixing.png"
TASKS = ("prose", "code")


@dataclass(frozen=True)
class Settings:
    """Data, model and schedule of the training runs.

    Attributes:
        shares: Shares of prose in the mix, to advise among and to fine-tune at.
        pretraining_steps: Steps on prose alone: a linear warmup to ``pretraining_lr`` over a tenth, then a cosine
            to ``finetuning_lr``.
        finetuning_steps: Steps at each share, from the optimizer's state, at the rate where pre-training ended: nothing
            changes but the data.
        batch_size: Windows in a batch of training.
        advice_batches: ``batches`` of :func:`slimadam.advise_mix`.
        advice_batch_size: Windows in each of those.
        held_out_windows: Windows of each domain that held-out losses are computed on.
    """

    shares: tuple[float, ...] = tuple(step / 10 for step in range(11))
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64
    batch_size: int = 16
    pretraining_steps: int = 1500
    pretraining_lr: float = 2e-3
    finetuning_steps: int = 100
    finetuning_lr: float = 4e-4
    advice_batches: int = 6
    advice_batch_size: int = 64
    held_out_windows: int = 256


QUICK = Settings(
    shares=(0.0, 0.5, 1.0), seeds=(0, 1), layers=1, width=16, heads=2, context=16, batch_size=4, pretraining_steps=20,
    finetuning_steps=4, advice_batches=2, advice_batch_size=4, held_out_windows=8,
)  # fmt: skip

Texts = dict[str, ByteData]
Losses = dict[str, float]
Checkpoint = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write ``results/mix.json`` and the picture; the exit code is 1 if the advice is not confirmed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps of each, written to a temporary folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = study(QUICK if options.quick else Settings())
    result["seconds"] = time.perf_counter() - start
    show(result)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            _write(result, Path(folder), Path(folder, PICTURE.name))
    else:
        _write(result, options.out, PICTURE)
    return 0 if options.quick or result["confirmed"] else 1


def study(settings: Settings) -> dict[str, Any]:
    """Advise and fine-tune at every seed."""
    texts = {"prose": prose(), "code": code()}
    runs = [_run(settings, texts, seed) for seed in settings.seeds]
    return {
        "settings": asdict(settings),
        "texts": {name: {"source": text.source, "bytes": len(text.train)} for name, text in texts.items()},
        "runs": runs,
        "confirmed": all(all(one["criterion"].values()) for one in runs),
        "best_in_interval": sum(one["best_in_interval"] for one in runs),
    }


def _run(settings: Settings, texts: Texts, seed: int) -> dict[str, Any]:
    """Pre-train one checkpoint; return its advice, and the changes of held-out losses by fine-tuning at each share."""
    checkpoint = pretrained(settings, texts["prose"], seed)
    model, _ = _restored(settings, checkpoint)
    before = _held_out(settings, texts, model)
    start = time.perf_counter()
    advice = _advised(settings, texts, checkpoint, seed)
    seconds = time.perf_counter() - start
    changes = []
    for share in settings.shares:
        after = _held_out(settings, texts, finetuned(settings, texts, checkpoint, share, seed))
        changes.append({task: after[task] - before[task] for task in TASKS})
    return {
        "seed": seed,
        "held_out_loss": before,
        "advice": advice.to_dict(),
        "advice_seconds": seconds,
        "changes": changes,
        **verdict(settings.shares, changes, advice),
    }


def verdict(shares: Sequence[float], changes: Sequence[Losses], advice: MixAdvice) -> dict[str, Any]:
    """Return whether one seed meets the criterion, and the share at which fine-tuning was best.

    Args:
        shares: Shares of prose.
        changes: Changes of the held-out losses at each share.
        advice: Advice at the checkpoint.
    """
    worse = [max(change.values()) for change in changes]
    best = shares[worse.index(min(worse))]
    at_advised = worse[shares.index(advice.ratio)] if advice.ratio in shares else None
    return {
        "criterion": {
            "no held-out loss rises at the advised share": at_advised is not None and at_advised <= 0,
            "better there than with code alone": at_advised is not None and at_advised < worse[0],
            "better there than with prose alone": at_advised is not None and at_advised < worse[-1],
        },
        "worse_change": worse,
        "worse_change_at_advised": at_advised,
        "best_share": best,
        "best_in_interval": advice.interval[0] <= best <= advice.interval[1],
    }


def pretrained(settings: Settings, text: ByteData, seed: int) -> Checkpoint:
    """Return the state of model and optimizer after training on one text.

    Args:
        settings: Model and schedule.
        text: The text.
        seed: Seed of initialisation and batches.
    """
    torch.manual_seed(seed)
    model, optimizer = _new(settings)
    batches = text.batches(settings.pretraining_steps, settings.batch_size, settings.context, seed)
    for step, (inputs, targets) in enumerate(batches, start=1):
        _step(model, optimizer, inputs, targets, pretraining_lr(settings, step))
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def pretraining_lr(settings: Settings, step: int) -> float:
    """Return the learning rate of a step of pre-training.

    Args:
        settings: Rates and number of steps.
        step: Number of the step, from 1.
    """
    warmup = settings.pretraining_steps / 10
    if step <= warmup:
        return settings.pretraining_lr * step / warmup
    left = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (settings.pretraining_steps - warmup)))
    return settings.finetuning_lr + (settings.pretraining_lr - settings.finetuning_lr) * left


def _restored(settings: Settings, checkpoint: Checkpoint) -> tuple[ByteGPT, SlimAdam]:
    """Return a model and an optimizer of their own, in the checkpoint's state."""
    model, optimizer = _new(settings)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = settings.finetuning_lr
    return model, optimizer


def _advised(settings: Settings, texts: Texts, checkpoint: Checkpoint, seed: int) -> MixAdvice:
    """Return the advice at a checkpoint."""
    model, optimizer = _restored(settings, checkpoint)

    def loss(text: ByteData, number: int) -> Tensor:
        return model.loss(*batch(text.train, _seed(seed, 1, number), settings.advice_batch_size, settings.context))

    losses = {task: partial(loss, texts[task]) for task in TASKS}
    return advise_mix(optimizer, losses, ratios=settings.shares, batches=settings.advice_batches, seed=seed)


def finetuned(settings: Settings, texts: Texts, checkpoint: Checkpoint, share: float, seed: int) -> ByteGPT:
    """Return the model after further training, each window prose with probability ``share``.

    Args:
        settings: Model and schedule.
        texts: Text of each domain.
        checkpoint: State to start from.
        share: Probability that a window is prose.
        seed: Seed of the windows.
    """
    model, optimizer = _restored(settings, checkpoint)
    generator = torch.Generator().manual_seed(_seed(seed, 2, 0))
    for step in range(settings.finetuning_steps):
        of_prose = int((torch.rand(settings.batch_size, generator=generator) < share).sum())
        counts = {"prose": of_prose, "code": settings.batch_size - of_prose}
        drawn = [
            batch(texts[task].train, _seed(seed, 3 + index, step), counts[task], settings.context)
            for index, task in enumerate(TASKS)
        ]
        inputs, targets = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        _step(model, optimizer, inputs, targets, settings.finetuning_lr)
    return model


@torch.no_grad()
def _held_out(settings: Settings, texts: Texts, model: ByteGPT) -> Losses:
    """Return the held-out loss of each task in nats per byte."""
    windows = {task: texts[task].held_out_windows(settings.held_out_windows, settings.context) for task in TASKS}
    return {task: float(model.loss(*windows[task])) for task in TASKS}


def show(result: dict[str, Any]) -> None:
    """Print the curves, the changes and the verdict."""
    shares = result["settings"]["shares"]
    for one in result["runs"]:
        advice, (low, high) = one["advice"], one["advice"]["intervals"]["prose"]
        before = ", ".join(f"{task} {loss:.3f}" for task, loss in one["held_out_loss"].items())
        print(
            f"seed {one['seed']}: held-out {before}; advised {advice['weights']['prose']} prose ({low} to {high}) in "
            f"{one['advice_seconds']:.0f} s; fine-tuning was best at {one['best_share']}"
        )
        print(f"  {'prose':>5s} {'sharpness: prose':>17s} {'code':>9s} {'held-out: prose':>16s} {'code':>8s}")
        for index, share in enumerate(shares):
            sharpness = (curve["sharpness"][index] for curve in advice["curves"])
            prose_sharpness, code_sharpness = (
                f"{value:.0f}" if value is not None else "no step" for value in sharpness
            )
            change = one["changes"][index]
            print(
                f"  {share:5.1f} {prose_sharpness:>17s} {code_sharpness:>9s} {change['prose']:>+16.3f} "
                f"{change['code']:>+8.3f}"
            )
        for condition, held in one["criterion"].items():
            print(f"  {'yes' if held else 'NO ':3s} {condition}")
    means = [fmean(one["worse_change"][index] for one in result["runs"]) for index in range(len(shares))]
    print("change of the task that fares worse, mean over seeds:", "  ".join(f"{mean:+.3f}" for mean in means))
    print(f"best share inside the interval: {result['best_in_interval']} of {len(result['runs'])}")
    print(f"confirmed: {'yes' if result['confirmed'] else 'no'} ({result['seconds']:.0f} s)")


def _write(result: dict[str, Any], folder: Path, picture: Path) -> None:
    print("written:", machine.write("mix", result, folder), draw(result, picture))


def _new(settings: Settings) -> tuple[ByteGPT, SlimAdam]:
    model = ByteGPT(settings.layers, settings.width, settings.heads, settings.context)
    return model, SlimAdam(model, betas=(0.9, 0.95), weight_decay=0.1, plan="rules")


def _step(model: ByteGPT, optimizer: SlimAdam, inputs: Tensor, targets: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    torch.autograd.backward(model.loss(inputs, targets))
    optimizer.step()


def _seed(run_seed: int, purpose: int, number: int) -> int:
    """Return a seed that differs for each purpose, so that no batch is drawn for two."""
    return (run_seed * 10 + purpose) * 1_000_000 + number


if __name__ == "__main__":
    raise SystemExit(main())
