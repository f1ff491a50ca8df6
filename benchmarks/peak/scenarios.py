"""Take one optimizer through a training, or through its checkpoints, in this process.

``python -m benchmarks.peak.scenarios training "SlimAdam (rules)"`` prints the peaks of every phase as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.gpu.training import GPT2, TrainingSettings
from benchmarks.peak.meters import Meter, meter_of
from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, convert_state_dict

CALIBRATION_STEPS, STEPS = 2, 3
LENGTH = 64
"""Tokens of a step: few, so that activations take little beside what the optimizer has a part in."""

MODELS = {"gpt2-small": TrainingSettings((), (), STEPS, CALIBRATION_STEPS, batch_size=1)}
MODELS["tiny"] = replace(MODELS["gpt2-small"], width=64, layers=1, vocabulary=700, context=LENGTH)
Make = Callable[[nn.Module], Optimizer]
FUSED, FOREACH = "AdamW (fused)", "AdamW (foreach)"


def _ours(**options: Any) -> Make:
    return lambda model: SlimAdam(model, **options)


def _codes(model: nn.Module) -> Optimizer:
    """Return the optimizer that keeps one byte for each element of a matrix."""
    matrices = (name for name, param in model.named_parameters() if param.dim() == 2)
    return SlimAdam(model, plan=CompressionPlan({name: Rule(form="float8") for name in matrices}))


def contenders() -> dict[str, Make]:
    """Return the optimizers that train."""
    auto = AutoPlan(calibration_steps=CALIBRATION_STEPS)
    found: dict[str, Make] = {
        FUSED: lambda model: AdamW(model.parameters(), fused=True),
        FOREACH: lambda model: AdamW(model.parameters(), foreach=True),
        "SlimAdam (auto)": _ours(plan=auto),
        "SlimAdam (factored)": _ours(plan="factored"),
        "SlimAdam (rules)": _ours(plan="rules"),
        "SlimAdam (auto, int8 momentum)": _ours(plan=auto, momentum_dtype="int8"),
    }
    if any(field.name == "start" for field in fields(AutoPlan)):
        options: dict[str, Any] = {"start": "slim"}
        slim = replace(auto, **options)
        found["SlimAdam (auto, slim start)"] = _ours(plan=slim)
        found["SlimAdam (auto, slim start, int8 momentum)"] = _ours(plan=slim, momentum_dtype="int8")
    return found


def with_checkpoints() -> dict[str, Make]:
    """Return the optimizers whose checkpoints are saved and loaded."""
    ours = {label: make for label, make in contenders().items() if label.startswith("SlimAdam")}
    return {**ours, "SlimAdam (one byte for each element)": _codes}


def train(make: Make, settings: TrainingSettings, meter: Meter, device: str) -> None:
    """Train for a few steps, ``plan="auto"`` past its decision; every pass and every step is a phase.

    Args:
        make: Makes the optimizer.
        settings: Size of the model.
        meter: Measures.
        device: Device that trains.
    """
    with meter.phase("model"):
        model = GPT2(settings).to(device)
        optimizer = make(model)
    for step in range(1, STEPS + 1):
        tokens = _tokens(settings, device)
        with meter.phase(f"forward and backward {step}"):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
        with meter.phase(f"step {step}"):
            optimizer.step()
        optimizer.zero_grad()


def checkpoints(make: Make, settings: TrainingSettings, meter: Meter, device: str) -> None:
    """Save, load, convert and expand; everything is a phase.

    Args:
        make: Makes the optimizer, one of ours.
        settings: Size of the model.
        meter: Measures.
        device: Device that trains.
    """
    model = GPT2(settings).to(device)
    tokens = _tokens(settings, device)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
    of_adamw = _adamw_checkpoint(model)
    optimizer = make(model)
    for step in range(1, STEPS + 1):
        with meter.phase(f"step {step}"):
            optimizer.step()
    with meter.phase("state_dict"):
        own = optimizer.state_dict()
    for name, saved in (("its own", own), ("AdamW's", of_adamw)):
        fresh = make(model)
        with meter.phase(f"load {name}"):
            fresh.load_state_dict(saved)
        fresh.load_state_dict(own)  # of plan="auto" it also has the decision
        with meter.phase(f"load {name} over a state"):
            fresh.load_state_dict(saved)
        del fresh
    assert isinstance(optimizer, SlimAdam)
    with meter.phase("adamw_state_dict"):
        given = optimizer.adamw_state_dict()
    del given
    with meter.phase("convert_state_dict, to full"):
        full = convert_state_dict(own, None)
    with meter.phase("convert_state_dict, from full"):
        converted = convert_state_dict(full, optimizer.plan)
    del own, full, converted
    largest = max(_compressed(optimizer), key=lambda name: model.get_parameter(name).numel())
    with meter.phase("expand"):
        optimizer.expand(largest)


def _tokens(settings: TrainingSettings, device: str) -> Tensor:
    return torch.randint(0, settings.vocabulary, (1, LENGTH + 1)).to(device)


def _adamw_checkpoint(model: nn.Module) -> dict[str, Any]:
    adamw = AdamW(model.parameters(), fused=True)
    adamw.step()
    return adamw.state_dict()


def _compressed(optimizer: SlimAdam) -> Iterator[str]:
    return (name for name, rule in optimizer.plan.items() if not rule.is_full)


SCENARIOS: Mapping[str, tuple[Callable[[], dict[str, Make]], Callable[[Make, TrainingSettings, Meter, str], None]]] = {
    "training": (contenders, train),
    "checkpoints": (with_checkpoints, checkpoints),
}
"""The optimizers of each, and what they are taken through."""


def measure(scenario: str, label: str, model: str, device: str, process: bool = False) -> dict[str, list[int]]:
    """Return the bytes before each phase, at its peak and after it.

    Args:
        scenario: A key of :data:`SCENARIOS`.
        label: A key of its optimizers.
        model: A key of :data:`MODELS`.
        device: ``"cpu"`` or ``"cuda"``.
        process: Whether to count the process's pages, and not tensors.
    """
    torch.manual_seed(0)
    optimizers, run = SCENARIOS[scenario]
    meter = meter_of(device, process)
    with meter.running():
        run(optimizers()[label], MODELS[model], meter, device)
    return {name: list(peak) for name, peak in meter.peaks().items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak.scenarios", description=__doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("label")
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--process", action="store_true", help="count the process's pages, and not tensors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # what other threads allocate, the profiler does not see
    print(json.dumps(measure(**vars(options))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
