"""The optimizers that are compared, ours and others', each built for the parameters of one module."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam import SlimAdam

DEFAULT = "AdamW (default)"
FUSED = "AdamW (fused)"


def missing(package: str) -> str | None:
    """Return that a distribution is not installed and how to get it, or None.

    Args:
        package: Its name.
    """
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package} is not installed; pip install {package}"
    return None


@dataclass(frozen=True)
class Contender:
    """An optimizer in the comparison.

    Attributes:
        label: Its name in tables.
        make: Builds it for a module's parameters.
        package: The distribution that it comes from.
        compiled: Its step is run through ``torch.compile``.
        settings: SlimAdam's plan and options; None for others' optimizers.
    """

    label: str
    make: Callable[[nn.Module], Optimizer]
    package: str = "torch"
    compiled: bool = False
    settings: Mapping[str, Any] | None = None

    def missing(self) -> str | None:
        """Return why it cannot be built here, or None; ours is in the repository, installed or not."""
        return None if self.settings is not None else missing(self.package)

    def step_of(self, optimizer: Optimizer) -> Callable[[], Any]:
        """Return the call that is timed."""
        return torch.compile(optimizer.step) if self.compiled else optimizer.step


def slimadam(label: str, settings: Mapping[str, Any]) -> Contender:
    """Return SlimAdam with a plan and options.

    Args:
        label: Description for tables.
        settings: Arguments of :class:`slimadam.SlimAdam`, the plan included.
    """
    return Contender(f"SlimAdam ({label})", lambda model: SlimAdam(model, **settings), "slimadam", settings=settings)


def ours() -> list[Contender]:
    """Return SlimAdam's plans, and the paper's rules with smaller first moments."""
    plans: dict[str, dict[str, Any]] = {
        "plan=None": {"plan": None},
        "rules": {"plan": "rules"},
        "factored": {"plan": "factored"},
        "rules, bfloat16 momentum": {"plan": "rules", "momentum_dtype": torch.bfloat16},
        "rules, int8 momentum": {"plan": "rules", "momentum_dtype": "int8"},
    }
    return [slimadam(label, settings) for label, settings in plans.items()]


def without_library() -> Contender:
    """Return what runs on a CPU where the compiled step cannot be had."""
    return slimadam("rules, foreach=True", {"plan": "rules", "foreach": True})


def torch_own() -> list[Contender]:
    """Return PyTorch's optimizers, compiled AdamW last because compiling takes longest."""
    return [
        Contender(DEFAULT, lambda model: torch.optim.AdamW(model.parameters())),
        Contender("AdamW (foreach)", lambda model: torch.optim.AdamW(model.parameters(), foreach=True)),
        Contender(FUSED, lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
        Contender("Adafactor (torch)", lambda model: torch.optim.Adafactor(model.parameters())),
        Contender("AdamW (compiled)", lambda model: torch.optim.AdamW(model.parameters()), compiled=True),
    ]


PEERS: dict[str, Contender] = {
    "torchao-8bit": Contender(
        "torchao AdamW8bit", lambda model: _class("torchao.optim", "AdamW8bit")(_params(model)), "torchao"
    ),
    "torchao-4bit": Contender(
        "torchao AdamW4bit", lambda model: _class("torchao.optim", "AdamW4bit")(_params(model)), "torchao"
    ),
    "bitsandbytes": Contender(
        "bitsandbytes AdamW8bit",
        lambda model: _class("bitsandbytes.optim", "AdamW8bit")(_params(model)),
        "bitsandbytes",
    ),
    "adam-mini": Contender("Adam-mini", lambda model: _adam_mini(model), "adam-mini"),
    "flashoptim": Contender("FlashOptim FlashAdamW", lambda model: _flash_adamw(model), "flashoptim"),
    "optimi": Contender(
        "optimi AdamW", lambda model: _class("optimi", "AdamW")(_params(model), lr=1e-3), "torch-optimi"
    ),
    # Last, because on CUDA they begin by compiling; both are imported as gefen, so that only one can be installed.
    "gefen": Contender("Gefen", lambda model: _gefen(model), "gefen"),
    "gefen-x": Contender("Gefen-X", lambda model: _gefen(model), "gefen-x"),
}


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _params(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def _gefen(model: nn.Module) -> Optimizer:
    made: Optimizer = _class("gefen", "Gefen")(list(model.named_parameters()))
    return made


def _adam_mini(model: nn.Module) -> Optimizer:
    """Return Adam-mini, which needs the width and the number of heads; all models here have heads of 64."""
    width = next(param.shape[-1] for param in model.parameters() if param.dim() == 2)
    made: Optimizer = _class("adam_mini", "Adam_mini")(
        list(model.named_parameters()), dim=width, n_heads=max(1, width // 64), weight_decay=0.01, verbose=False
    )
    return made


def _flash_adamw(model: nn.Module) -> Optimizer:
    """Return FlashAdamW; its default, 24-bit weights, applies to 16-bit parameters only."""
    bits = None if next(model.parameters()).dtype == torch.float32 else 24
    made: Optimizer = _class("flashoptim", "FlashAdamW")(_params(model), master_weight_bits=bits)
    return made
