"""First moments in 16 and 8 bits: ``python -m benchmarks.momentum``.

Which code? While the demo's model trains with first moments in float32, the same moments are also kept in each of
several 8-bit codes, decoded, moved by the gradient and encoded again at every step. What differs is the update
direction, ``m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)``.

Does it hold? The demo's model is calibrated once for each seed and trained on the same batches with ``momentum_dtype``
None, bfloat16 and int8. Bars, for figures that are not rounded: below 4.1, below 2.1 and at most 1.06 bytes of state
per parameter, embeddings and vectors included, and a mean held-out loss of the smaller ones within 1% of None's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import machine
from slimadam import CompressionPlan, SlimAdam
from slimadam.demo.data import ByteData, load
from slimadam.demo.training import DemoSettings, Trainee, calibrate, learning_rate, train
from slimadam.kernels.reference import reconstruct
from slimadam.state import int8
from slimadam.state.second_moment import moments_of

DTYPES: dict[str, torch.dtype | str | None] = {"None": None, "bfloat16": torch.bfloat16, "int8": "int8"}
BYTES_BELOW = {"None": 4.1, "bfloat16": 2.1}
"""Bars in bytes per parameter that must not be reached."""
MOST_BYTES = {"int8": 1.06}
"""Bars in bytes per parameter that may be reached."""
LARGEST_GAP = 0.01
Requantise = Callable[[Tensor, Tensor], Tensor]
"""Encodes and decodes a first moment, given the gradient just added to it."""


def stored(value: Tensor, grad: Tensor) -> Tensor:
    """Return a first moment that SlimAdam's code stored and read again.

    Args:
        value: First moment.
        grad: Gradient of the step.
    """
    codes = int8.new_codes(value)
    scales = int8.new_scales(codes)
    int8.encode(value, grad, codes, scales)
    return int8.decode(codes, scales)


class Levels(NamedTuple):
    """An 8-bit code: magnitudes, as shares of a block's scale, that an element can have.

    Attributes:
        values: 128 of them, increasing from 0 to 1.
        bounds: 127: where rounding goes from one to the next.
    """

    values: Tensor
    bounds: Tensor

    def requantise(self, value: Tensor, grad: Tensor) -> Tensor:
        """Return a first moment that was stored and read again, see :data:`Requantise`.

        Args:
            value: First moment.
            grad: Gradient of the step, unused.
        """
        padded = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % int8.BLOCK))
        blocks = padded.view(-1, int8.BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        share = (blocks.abs() / scale).nan_to_num(nan=0.0)
        code = torch.bucketize(share, self.bounds)
        truncated = torch.nn.functional.pad(grad.flatten() == 0, (0, padded.numel() - grad.numel())).view_as(code)
        code = torch.where(truncated & (self.values[code] > share), code - 1, code)
        decoded = (self.values[code] * scale).copysign(blocks)
        return decoded.flatten()[: value.numel()].view_as(value)


def power(exponent: int) -> Levels:
    """Return levels ``(q / 127)**exponent``, rounded to nearest before the power is taken."""
    steps = torch.arange(128) / 127
    return Levels(steps**exponent, (steps[:-1] + 0.5 / 127) ** exponent)


def dynamic() -> Levels:
    """Return levels over seven decades, the higher the more levels: tree-like, as in arXiv 2110.02861."""
    decades = [torch.linspace(0.1, 1, 2**bits + 1)[:-1] * 10.0 ** (bits - 6) for bits in range(7)]
    middles = [decade + 0.45 * 10.0 ** (bits - 6) / 2**bits for bits, decade in enumerate(decades)]
    values = torch.cat([torch.zeros(1), *middles])
    values[-1] = 1
    return Levels(values, (values[1:] + values[:-1]) / 2)


CODES: dict[str, Requantise] = {
    "linear": power(1).requantise,
    "square": power(2).requantise,
    "square, as stored": stored,
    "cube": power(3).requantise,
    "dynamic": dynamic().requantise,
}


def _compare_codes(settings: DemoSettings, data: ByteData, plan: CompressionPlan) -> dict[str, float]:
    """Return the root-mean-square error of the update direction over a training, relative to the direction's, by code.

    The mean over ten steps at equal distances.
    """
    model = settings.new_model()
    optimizer = SlimAdam(model, lr=settings.lr, betas=settings.betas, plan=plan)
    trainee = Trainee("SlimAdam, best form", model, optimizer, lambda phase, step, loss: None)
    named = dict(model.named_parameters())
    kept = {code: {name: torch.zeros_like(param) for name, param in named.items()} for code in CODES}
    errors: dict[str, list[float]] = {code: [] for code in CODES}
    every = max(1, settings.steps // 10)
    for step, batch in enumerate(data.batches(settings.steps, settings.batch_size, settings.context, settings.seed), 1):
        trainee.step(batch, learning_rate(settings, step))
        for code, requantise in CODES.items():
            squared = total = 0.0
            for name, param in named.items():
                assert param.grad is not None
                moved = torch.lerp(kept[code][name], param.grad, 1 - settings.betas[0])
                kept[code][name] = requantise(moved, param.grad)
                if step % every == 0:
                    inverse = _inverse_denominator(optimizer, plan, name, param, step)
                    exact = optimizer.state[param]["exp_avg"]
                    squared += ((kept[code][name] - exact) * inverse).square().sum().item()
                    total += (exact * inverse).square().sum().item()
            if step % every == 0:
                errors[code].append(math.sqrt(squared / total))
    return {code: statistics.mean(found) for code, found in errors.items()}


def _inverse_denominator(optimizer: SlimAdam, plan: CompressionPlan, name: str, param: Tensor, step: int) -> Tensor:
    group = optimizer.param_groups[0]
    stored = moments_of(optimizer.state[param], [plan[name]])
    second = reconstruct(stored, plan[name].averaged_dims(param.dim()))
    denominator: Tensor = (second / (1 - group["betas"][1] ** step)).sqrt() + group["eps"]
    return 1 / denominator


def _train_each(settings: DemoSettings, data: ByteData, plan: CompressionPlan) -> dict[str, dict[str, float]]:
    """Return the held-out loss (nats per byte) and the bytes of state per parameter of each run."""
    trainees = {}
    for label, dtype in DTYPES.items():
        model = settings.new_model()
        optimizer = SlimAdam(model, lr=settings.lr, betas=settings.betas, plan=plan, momentum_dtype=dtype)
        trainees[label] = Trainee("SlimAdam, best form", model, optimizer, lambda phase, step, loss: None)
    train(settings, data, tuple(trainees.values()))
    return {
        label: {
            "held_out_loss": trainee.held_out_loss,
            "bytes_per_parameter": trainee.state_bytes / sum(param.numel() for param in trainee.model.parameters()),
        }
        for label, trainee in trainees.items()
    }


def main() -> int:
    """Compare, train, print, write ``results/momentum.json``; the exit code is 1 if a bar is missed."""
    parser = machine.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=DemoSettings.steps)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codes: dict[str, float] = {}
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        settings = DemoSettings(seed=seed, steps=arguments.steps)
        data = load(None, settings.context)
        plan = CompressionPlan.from_snr(calibrate(settings, data, lambda phase, step, loss: None), forms="best")
        if not codes:
            codes = _compare_codes(settings, data, plan)
            for code, error in codes.items():
                print(f"{code:20s} error of the update direction {error:.2%}", flush=True)
        runs.append({"seed": seed, "second_moments_saved": plan.second_moments_saved}
                    | {"runs": _train_each(settings, data, plan)})  # fmt: skip
        for label, found in runs[-1]["runs"].items():
            print(
                f"seed {seed}  {label:10s} {found['held_out_loss']:.4f}  {found['bytes_per_parameter']:.4f} B",
                flush=True,
            )
    gaps = {label: _mean_gap(runs, label) for label in DTYPES}
    held = _bars(runs, gaps)
    met = machine.print_bars(held)
    figures: dict[str, Any] = {"steps": arguments.steps, "codes": codes, "runs": runs, "gaps": gaps, "bars": held}
    print("written:", machine.write("momentum", figures, arguments.out))
    return 0 if met else 1


def _mean_gap(runs: list[dict[str, Any]], label: str) -> float:
    """Return by which share the mean held-out loss is higher than None's."""
    mean, native = (statistics.fmean(run["runs"][one]["held_out_loss"] for run in runs) for one in (label, "None"))
    return mean / native - 1


def _bars(runs: list[dict[str, Any]], gaps: dict[str, float]) -> dict[str, bool]:
    """Return which promises were kept."""
    held = {}
    size = {label: max(run["runs"][label]["bytes_per_parameter"] for run in runs) for label in DTYPES}
    for label, below in BYTES_BELOW.items():
        held[f"{label}: {size[label]:.6f} bytes per parameter, below {below}"] = size[label] < below
    for label, most in MOST_BYTES.items():
        held[f"{label}: {size[label]:.6f} bytes per parameter, at most {most}"] = size[label] <= most
    for label in ("bfloat16", "int8"):
        within = abs(gaps[label]) <= LARGEST_GAP
        held[f"{label}: mean held-out loss {gaps[label]:+.2%}, within {LARGEST_GAP:.0%}"] = within
    return held


if __name__ == "__main__":
    raise SystemExit(main())
