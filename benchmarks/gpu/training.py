"""A short training of GPT-2 124M's shape on Python's standard library: AdamW and SlimAdam, same seeds and batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Optimizer

from benchmarks.harness import stopwatch
from slimadam import AutoPlan, SlimAdam
from slimadam.demo.data import ByteData, load

_INIT_STD = 0.02


@dataclass(frozen=True)
class TrainingSettings:
    """A run's size. The vocabulary is GPT-2's though the text is bytes: the table is part of the shape.

    Attributes:
        lr: Reached linearly within the first tenth of the steps, then kept.
        calibration_steps: Steps that ``plan="auto"`` measures.
    """

    width: int = 768
    layers: int = 12
    vocabulary: int = 50257
    context: int = 1024
    batch_size: int = 8
    steps: int = 300
    lr: float = 6e-4
    calibration_steps: int = 60
    held_out_windows: int = 64
    seed: int = 0


QUICK = TrainingSettings(32, 1, 384, 32, 4, 12, calibration_steps=4, held_out_windows=8)


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


def optimizers(settings: TrainingSettings) -> dict[str, Callable[[nn.Module], Optimizer]]:
    """Return the optimizers that are compared, with the same hyperparameters."""
    usual: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    auto = AutoPlan(calibration_steps=settings.calibration_steps)
    return {
        "AdamW (fused)": lambda model: torch.optim.AdamW(model.parameters(), fused=True, **usual),
        "SlimAdam (auto)": lambda model: SlimAdam(model, plan=auto, **usual),
        "SlimAdam (rules)": lambda model: SlimAdam(model, plan="rules", **usual),
    }


def train(label: str, settings: TrainingSettings, device: str) -> dict[str, Any]:
    """Train under bfloat16 autocast.

    Args:
        label: A key of :func:`optimizers`.
        settings: Model, data and schedule.
        device: Device that trains.

    Returns:
        Losses by step, the held-out loss in nats per byte, tokens per second after the first tenth, bytes of state,
        and on CUDA the peak of allocated bytes.
    """
    data = load(None, settings.context)
    torch.manual_seed(settings.seed)
    model = GPT2(settings).to(device)
    optimizer = optimizers(settings)[label](model)
    warmup = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    losses, started = [], 0.0
    kind = torch.device(device).type
    if stopwatch.is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    batches = data.batches(settings.steps, settings.batch_size, settings.context, settings.seed)
    for step, (tokens, targets) in enumerate(batches):
        if step == warmup:
            started = _now(device)
        with torch.autocast(kind, torch.bfloat16):
            loss = model.loss(tokens.to(device), targets.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    seconds = _now(device) - started
    tokens_timed = (settings.steps - warmup) * settings.batch_size * settings.context
    result: dict[str, Any] = {
        "tokens_per_second": tokens_timed / seconds,
        "state_bytes": stopwatch.tensor_bytes(optimizer.state),
        "held_out_loss": _held_out(model, data, settings, device),
        "losses": [round(value, 5) for value in torch.stack(losses).float().tolist()],
    }
    if stopwatch.is_cuda(device):
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if isinstance(optimizer, SlimAdam):
        result["second_moments_saved"] = optimizer.memory().second_moments_saved
    return result


@torch.no_grad()
def _held_out(model: GPT2, data: ByteData, settings: TrainingSettings, device: str) -> float:
    tokens, targets = data.held_out_windows(settings.held_out_windows, settings.context)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        chunks = zip(*(torch.split(one, settings.batch_size) for one in (tokens, targets)), strict=True)
        losses = [model.loss(x.to(device), y.to(device)).item() * len(x) for x, y in chunks]
    return sum(losses) / len(tokens)


def _now(device: str) -> float:
    if stopwatch.is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()
