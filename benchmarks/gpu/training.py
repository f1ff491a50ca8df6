"""Trainings of GPT-2 124M's shape on Python's standard library: AdamW and SlimAdam, same seeds and batches."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from benchmarks.harness import stopwatch
from slimadam import AutoPlan, SlimAdam
from slimadam.demo.data import load

_INIT_STD = 0.02
SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class TrainingSettings:
    """Size of a training. The vocabulary is GPT-2's though the text is bytes: the table is part of the shape.

    Attributes:
        labels: Keys of :func:`optimizers`.
        rates: Learning rates, reached linearly within the first tenth of the steps, then kept.
        calibration_steps: Steps that ``plan="auto"`` measures.
        evaluations: How many times the held-out loss is computed, after equally many steps.
    """

    labels: tuple[str, ...]
    rates: tuple[float, ...]
    steps: int
    calibration_steps: int
    width: int = 768
    layers: int = 12
    vocabulary: int = 50257
    context: int = 1024
    batch_size: int = 8
    evaluations: int = 10
    held_out_windows: int = 64
    seed: int = 0

    def quick(self) -> TrainingSettings:
        """Return tiny sizes, to try the program with."""
        model = replace(self, width=32, layers=1, vocabulary=384, context=32)
        return replace(model, steps=12, calibration_steps=4, batch_size=4, evaluations=3, held_out_windows=8)

    @property
    def warmup(self) -> int:
        """Steps of the learning rate's warm-up."""
        return max(1, self.steps // 10)


FUSED, AUTO, RULES, FACTORED, INT8 = (
    "AdamW (fused)", "SlimAdam (auto)", "SlimAdam (rules)", "SlimAdam (factored)", "SlimAdam (rules, int8 momentum)",
)  # fmt: skip
SHORT = TrainingSettings((FUSED, AUTO, RULES), (6e-4,), 300, calibration_steps=60)
LONG = TrainingSettings((FUSED, AUTO, FACTORED, RULES, INT8), (6e-4, 1.8e-3), 1000, calibration_steps=200)


class GPT2(nn.Module):
    """GPT-2 with separate query, key and value layers and the head tied to the token embedding."""

    def __init__(self, settings: TrainingSettings) -> None:
        super().__init__()
        self.wte = nn.Embedding(settings.vocabulary, settings.width)
        self.wpe = nn.Embedding(settings.context, settings.width)
        self.h = nn.ModuleList(_Block(settings.width) for _ in range(settings.layers))
        self.ln_f = nn.LayerNorm(settings.width)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(param, std=_INIT_STD / (2 * settings.layers) ** 0.5 if into_residual else _INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next token in nats.

        Args:
            tokens: Inputs, ``[batch, length]``.
            targets: Next tokens, ``[batch, length]``.
        """
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), _Attention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        updated: Tensor = x + self.mlp(self.ln_2(x))
        return updated


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return result


def optimizers(settings: TrainingSettings, lr: float) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Return the optimizers that can be compared, with the same hyperparameters.

    Args:
        settings: Size of the training.
        lr: Learning rate.
    """
    usual: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    auto = AutoPlan(calibration_steps=settings.calibration_steps)
    return {
        FUSED: lambda model: torch.optim.AdamW(model.parameters(), fused=True, **usual),
        AUTO: lambda model: SlimAdam(model, plan=auto, **usual),
        RULES: lambda model: SlimAdam(model, plan="rules", **usual),
        FACTORED: lambda model: SlimAdam(model, plan="factored", **usual),
        INT8: lambda model: SlimAdam(model, plan="rules", momentum_dtype="int8", **usual),
    }


def train(
    label: str,
    lr: float,
    settings: TrainingSettings,
    device: str,
    folder: Path | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train under bfloat16 autocast, from where an earlier call was ended.

    Args:
        label: A key of :func:`optimizers`.
        lr: Learning rate.
        settings: Model, data and schedule.
        device: Device that trains.
        folder: Folder of what a later call goes on from; None: nothing is kept.
        deadline: ``time.monotonic()`` at which the training is put aside.

    Returns:
        Losses by step, held-out losses in nats per byte, tokens per second after the first tenth, bytes of state, on
        CUDA the peaks of allocated bytes, and under ``"unfinished"`` how far it has come.
    """
    identity = json.loads(json.dumps({"label": label, "lr": lr, "settings": asdict(settings)}))
    if folder is None:
        run = _Training(identity, settings, device)
        run.go_on(deadline)
        return run.figures()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{label}, lr {lr:g}.json"
    if kept.exists() and (found := json.loads(kept.read_text())).items() >= identity.items():
        return dict(found)
    run, checkpoint = _Training(identity, settings, device), kept.with_suffix(".pt")
    if checkpoint.exists():
        run.load(checkpoint)
    run.go_on(deadline, checkpoint)
    if run.is_finished:
        kept.write_text(json.dumps(run.figures()))
        checkpoint.unlink(missing_ok=True)
    return run.figures()


class _Training:
    """A training that can be put aside."""

    def __init__(self, identity: dict[str, Any], settings: TrainingSettings, device: str) -> None:
        gc.collect()  # an earlier training, whose memory would count as this one's
        self._identity, self._settings, self._device = identity, settings, device
        self._data = load(None, settings.context)
        torch.manual_seed(settings.seed)
        self._model = GPT2(settings).to(device)
        self._optimizer = optimizers(settings, identity["lr"])[identity["label"]](self._model)
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, 1 / settings.warmup, total_iters=settings.warmup
        )
        self._batches = self._batches_from(0)
        self._started_at = 0
        self._losses: list[float] = []
        self._held_out: list[tuple[int, float]] = []
        self._peaks: list[int] = []
        self._timed_steps, self._seconds = 0, 0.0

    @property
    def steps_taken(self) -> int:
        return len(self._losses)

    @property
    def is_finished(self) -> bool:
        return self.steps_taken == self._settings.steps

    def go_on(self, deadline: float, checkpoint: Path | None = None) -> None:
        """Train until all steps are taken or the time is over, and save what has been reached from time to time."""
        saved = time.monotonic()
        while not self.is_finished and time.monotonic() < deadline:
            self.advance()
            is_due = not self.is_finished and time.monotonic() > min(saved + SECONDS_BETWEEN_SAVES, deadline)
            if checkpoint is not None and is_due:
                self.save(checkpoint)
                saved = time.monotonic()

    def advance(self) -> None:
        """Train as far as the next held-out loss, or a part of the way; the first part warms up and is not timed."""
        settings, start = self._settings, self.steps_taken
        between = -(-settings.steps // settings.evaluations)
        following = min(settings.steps, (start // between + 1) * between)
        count = min(following - start, max(1, between // 5))
        if stopwatch.is_cuda(self._device):
            torch.cuda.reset_peak_memory_stats(self._device)
        began = self._now()
        losses = [self._step() for _ in range(count)]
        self._losses += [round(value, 5) for value in torch.stack(losses).float().tolist()]
        if start >= self._started_at + settings.warmup:
            self._timed_steps, self._seconds = self._timed_steps + count, self._seconds + self._now() - began
        if stopwatch.is_cuda(self._device):
            self._peaks.append(torch.cuda.max_memory_allocated(self._device))
        if self.steps_taken == following:
            self._held_out.append((following, self._held_out_loss()))

    def _step(self) -> Tensor:
        tokens, targets = (part.to(self._device) for part in next(self._batches))
        with torch.autocast(torch.device(self._device).type, torch.bfloat16):
            loss = self._model.loss(tokens, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        return loss.detach()

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        settings, device = self._settings, self._device
        windows = self._data.held_out_windows(settings.held_out_windows, settings.context)
        chunks = zip(*(torch.split(part, settings.batch_size) for part in windows), strict=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            losses = [self._model.loss(x.to(device), y.to(device)).item() * len(x) for x, y in chunks]
        return sum(losses) / len(windows[0])

    def figures(self) -> dict[str, Any]:
        """Return what is known so far."""
        settings = self._settings
        result = {
            **self._identity,
            "state_bytes": stopwatch.tensor_bytes(self._optimizer.state),
            "held_out": self._held_out,
            "losses": self._losses,
        }
        if self._timed_steps:
            tokens = self._timed_steps * settings.batch_size * settings.context
            result["tokens_per_second"] = tokens / self._seconds
        if self._peaks:
            result |= {"peak_bytes": max(self._peaks), "last_peak_bytes": self._peaks[-1]}
        if isinstance(self._optimizer, SlimAdam):
            result["second_moments_saved"] = self._optimizer.memory().second_moments_saved
        if not self.is_finished:
            result["unfinished"] = f"{self.steps_taken} of {settings.steps} steps"
        return result

    def save(self, path: Path) -> None:
        """Write all that :meth:`load` needs; whoever is killed meanwhile leaves what was there."""
        kept = {name: getattr(self, name) for name in _FIGURES}
        states = {name: part.state_dict() for name, part in self._parts().items()}
        torch.save({"identity": self._identity, **kept, **states}, path.with_suffix(".unfinished"))
        path.with_suffix(".unfinished").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file, unless it is one of another size."""
        found = torch.load(path, map_location=self._device, weights_only=True)
        if found["identity"] != self._identity:
            return
        for name in _FIGURES:
            setattr(self, name, found[name])
        for name, part in self._parts().items():
            part.load_state_dict(found[name])
        self._started_at = self.steps_taken
        self._batches = self._batches_from(self.steps_taken)

    def _parts(self) -> dict[str, Any]:
        return {"model": self._model, "optimizer": self._optimizer, "schedule": self._schedule}

    def _batches_from(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        settings = self._settings
        every = self._data.batches(settings.steps, settings.batch_size, settings.context, settings.seed)
        return islice(every, step, None)

    def _now(self) -> float:
        if stopwatch.is_cuda(self._device):
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


_FIGURES = ("_losses", "_held_out", "_peaks", "_timed_steps", "_seconds")
