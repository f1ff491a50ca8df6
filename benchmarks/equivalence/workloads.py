"""Data and models that are trained, in three sizes and two lengths each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from benchmarks.harness.contenders import missing
from benchmarks.mix.domains import prose
from benchmarks.workloads.language import Bytes, LlamaBytes, byte_gpt, byte_llama, byte_lstm
from benchmarks.workloads.tasks.congruential import Congruential
from benchmarks.workloads.tasks.fine_tuning import FineTuning
from benchmarks.workloads.tasks.flights import PACKAGE as FLIGHTS_PACKAGE
from benchmarks.workloads.tasks.flights import Flights
from benchmarks.workloads.training import Workload, held_out_loss, training_rate
from benchmarks.workloads.vocabulary import Words
from slimadam.demo.training import DemoSettings

SIZES = ("small", "medium", "large")
LENGTHS = {"short": 1, "long": 3}
"""Factor of the steps."""
_PRETRAINING_LR, _PRETRAINING_STEPS = 3e-3, 2000
_VISION = ("scikit-learn", "transformers")
_LAYERS_OF_SIZE = (2, 4, 6)
_WIDTH_OF_SIZE = (96, 128, 192)


@dataclass(frozen=True)
class Kind:
    """A workload in all its sizes.

    Attributes:
        build: Makes it in the size of that number, 0 for small.
        steps: Optimizer steps of a short run.
        start: Grid step (see :mod:`benchmarks.equivalence.runs`) where the search of the small one's rate begins.
        weight_decay: Weight decay of all contenders.
        max_norm: Norm to which gradients are clipped; None: they are not.
        heads: Attention heads, 0 without attention.
        seeds: Number of seeds on which optimizers are judged: more where the losses of one seed's runs scatter.
        packages: Distributions that it needs besides the package's own.
    """

    build: Callable[[int], Workload]
    steps: int
    start: int
    weight_decay: float = 0.01
    max_norm: float | None = None
    heads: int = 0
    seeds: int = 10
    packages: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return next(filter(None, map(missing, self.packages)), None)


@dataclass(frozen=True)
class Task:
    """A workload in one size and length.

    Attributes:
        name: Key of :data:`WORKLOADS`.
        size: One of :data:`SIZES`.
        length: Key of :data:`LENGTHS`.
    """

    name: str
    size: str = "small"
    length: str = "short"

    @property
    def kind(self) -> Kind:
        """Return the workload in all its sizes."""
        return WORKLOADS[self.name]

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps of a run."""
        return self.kind.steps * LENGTHS[self.length]

    @property
    def weight_decay(self) -> float:
        """Return the weight decay of all contenders."""
        return self.kind.weight_decay

    @property
    def heads(self) -> int:
        """Return the number of attention heads."""
        return self.kind.heads

    @cached_property
    def workload(self) -> Workload:
        """Return data and model, the data read once."""
        return self.kind.build(SIZES.index(self.size))

    @cached_property
    def version(self) -> str:
        """Return a hash of what a run depends on besides the optimizer, such as data, model and schedule."""
        model = self.workload.new_model(0)
        inputs, targets = next(iter(self.workload.batches(1, 0)))
        schedule = training_rate(1.0, self.steps)
        facts = (
            torch.__version__,
            [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()],
            f"{held_out_loss(self.workload, model):.3f}",
            self.workload.betas,
            self.weight_decay,
            self.kind.max_norm,
            [f"{schedule(step):.6f}" for step in (1, self.steps // 2, self.steps)],
        )
        content = repr(facts).encode() + inputs.numpy().tobytes() + targets.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:12]


def _settings(size: int, **changes: Any) -> DemoSettings:
    return replace(DemoSettings(layers=_LAYERS_OF_SIZE[size], width=_WIDTH_OF_SIZE[size]), **changes)


def _byte_gpt(size: int) -> Workload:
    return Bytes(byte_gpt, settings=_settings(size))


def _word_gpt(size: int) -> Workload:
    return Words(4096, _settings(size, width=(64, 96, 128)[size]))


def _llama(size: int) -> Workload:
    return LlamaBytes(byte_llama, settings=_settings(size), text=prose)


def _fine_tuning(size: int) -> Workload:
    continued = Bytes(byte_gpt, settings=_settings(size), text=prose)
    return FineTuning(_byte_gpt(size), continued, _PRETRAINING_LR, _PRETRAINING_STEPS)


def _lstm(size: int) -> Workload:
    return Bytes(byte_lstm, settings=_settings(size, context=32, batch_size=16))


def _vit(size: int) -> Workload:
    from benchmarks.workloads.vision import NoisyDigits, vit

    return NoisyDigits(partial(vit, (64, 96, 128)[size], _LAYERS_OF_SIZE[size]), pixels=8, noise=0.5)


def _convnet(size: int) -> Workload:
    from benchmarks.workloads.vision import NoisyDigits, resnet

    return NoisyDigits(partial(resnet, (16, 32, 48)[size]), pixels=8, noise=0.8)


def _congruential(size: int) -> Workload:
    return Congruential(32, _settings(size, layers=1, width=(64, 96, 128)[size], context=32, batch_size=32))


def _flights(size: int) -> Workload:
    return Flights((16, 32, 64)[size], (128, 256, 512)[size])


WORKLOADS: dict[str, Kind] = {
    "byte GPT": Kind(_byte_gpt, 600, 4, heads=4),
    "word GPT": Kind(_word_gpt, 600, 4, heads=4),
    "Llama": Kind(_llama, 600, 4, max_norm=1.0, heads=4, packages=("transformers",)),
    "LSTM": Kind(_lstm, 2000, 8),
    "ViT": Kind(_vit, 800, 3, heads=4, seeds=20, packages=_VISION),
    "convnet": Kind(_convnet, 1000, 8, seeds=40, packages=_VISION),
    "congruential": Kind(_congruential, 1600, 7, seeds=20, weight_decay=0.1, heads=4),
    "fine-tuning": Kind(_fine_tuning, 600, 4, heads=4),
    "flights": Kind(_flights, 3000, 4, packages=(FLIGHTS_PACKAGE,)),
}


def present(names: list[str]) -> list[str]:
    """Return the names of workloads whose data are here, and say in a line each why others are left out.

    Args:
        names: Keys of :data:`WORKLOADS`.
    """
    reasons = {name: WORKLOADS[name].missing() for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"left out: {name}: {reason}", flush=True)
    return [name for name in names if reasons[name] is None]
