"""Is an optimizer's step right? A run of it on any device beside the formula in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness.formula import Followed, Hyperparameters, follow
from slimadam import CompressionPlan, SlimAdam

ROUNDINGS = 32
"""Roundings that the computation of one update may take, in units of the working precision."""

RARE = 0.01
"""Share of elements for which a rounded first moment may fall on the other side of a rounding boundary."""

OFF_BY_ONE_CODE = 0.1
"""How far those few may be off, relative to the longest path of any element."""


class WrongStepError(Exception):
    """An optimizer's parameters are not where the formula says."""


@dataclass
class Report:
    """Result of comparisons.

    Attributes:
        worst: Largest difference to float64 as a share of what rounding explains; at most 1.
        backends: How many parameters each implementation updated.
    """

    worst: float = 0.0
    backends: Counter[str] = field(default_factory=Counter)

    def add(self, other: Report) -> None:
        """Take in another comparison."""
        self.worst = max(self.worst, other.worst)
        self.backends.update(other.backends)


def run(
    model: nn.Module,
    plan: Any,
    hyper: Hyperparameters | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    steps: int = 6,
    step_with: Callable[[SlimAdam, Mapping[str, list[Tensor]]], None] | None = None,
) -> Report:
    """Step a model's parameters and compare each with the formula.

    Args:
        model: Owns the parameters; they are changed.
        plan: Plan of :class:`slimadam.SlimAdam`.
        hyper: Hyperparameters.
        options: Further arguments of the optimizer, such as ``momentum_dtype``.
        steps: Number of steps.
        step_with: Applies the gradients, a list by name, to the optimizer in some special way.

    Raises:
        WrongStepError: Names the parameter and the difference.
    """
    hyper, options = hyper or Hyperparameters(), dict(options or {})
    named = dict(model.named_parameters())
    starts = {name: param.detach().clone() for name, param in named.items()}
    grads = {name: gradients(param, steps) for name, param in named.items()}
    optimizer = SlimAdam(model, plan=plan, **{**vars(hyper), **options})
    (step_with or step_through)(optimizer, grads)
    report = Report(backends=Counter(optimizer.backend(param) for param in named.values()))
    for name, param in named.items():
        momentum = momentum_of(param, options.get("momentum_dtype"))
        rules = _rules_of(optimizer.plan, name)
        expected = follow(starts[name], grads[name], rules, hyper, momentum)
        report.worst = max(report.worst, compare(name, starts[name], param, expected, steps, momentum))
    return report


def step_through(optimizer: SlimAdam, grads: Mapping[str, list[Tensor]]) -> None:
    """Take one step for each gradient.

    Args:
        optimizer: The optimizer.
        grads: Gradients of each parameter, in the order of the groups.
    """
    for values in zip(*grads.values(), strict=True):
        set_gradients(optimizer, values)
        optimizer.step()


def set_gradients(optimizer: Optimizer, values: Sequence[Tensor]) -> None:
    """Give each parameter a copy of its gradient, laid out in memory as the parameter is.

    Args:
        optimizer: Optimizer that holds the parameters.
        values: A gradient for each parameter.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, value in zip(params, values, strict=True):
        param.grad = torch.empty_like(param).copy_(value)


def gradients(param: Tensor, steps: int) -> list[Tensor]:
    """Return gradients whose size differs between rows, columns and steps, as real ones do; the same ones each time.

    Args:
        param: Parameter whose shape, precision and device they have.
        steps: Number of gradients.
    """
    generator = torch.Generator().manual_seed(param.numel())
    scale = torch.ones((), dtype=torch.float64)
    for dim, size in enumerate(param.shape):
        view = [1] * param.dim()
        view[dim] = size
        scale = scale * torch.rand(size, generator=generator, dtype=torch.float64).mul(2).exp().reshape(view)
    made = [torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale for _ in range(steps)]
    return [(0.1 * grad / (1 + step % 3)).to(device=param.device, dtype=param.dtype) for step, grad in enumerate(made)]


def momentum_of(param: Tensor, option: torch.dtype | str | None) -> torch.dtype | str:
    """Return how the first moment is stored: a dtype that rounds noticeably, ``"int8"``, or float64 for exactly.

    Args:
        param: The parameter.
        option: ``momentum_dtype`` of the optimizer.
    """
    stored = param.dtype if option is None else option
    return torch.float64 if stored == torch.float32 and param.dtype != torch.float64 else stored


def compare(
    name: str, start: Tensor, param: Tensor, expected: Followed, steps: int, momentum: torch.dtype | str
) -> float:
    """Return the difference to the formula as a share of what rounding explains.

    A parameter is rounded when it is written, twice in each step at most; an update while it is computed, and with
    its first moment where that was rounded to a dtype before it was used.

    Args:
        name: Name of the parameter, for the error.
        start: The parameter before the first step.
        param: The parameter after the last step.
        expected: Result of the formula.
        steps: Number of steps.
        momentum: How the first moment is stored, see :func:`momentum_of`.

    Raises:
        WrongStepError: The difference is larger.
    """
    if not param.numel():
        return 0.0
    eps = torch.finfo(param.dtype).eps
    size = torch.maximum(start.detach().cpu().double().abs(), expected.param.abs()) + expected.path
    rounded_moment = torch.finfo(momentum).eps / 2 if isinstance(momentum, torch.dtype) else 0.0
    tolerance = eps * steps * size + (ROUNDINGS * eps + rounded_moment) * expected.path
    difference = (param.detach().cpu().double() - expected.param).abs()
    off = ~(difference <= tolerance)
    allowed = 0.0 if momentum == torch.float64 else max(1.0, RARE * param.numel())
    too_far = difference[off] > OFF_BY_ONE_CODE * expected.path.max()
    if off.sum() > allowed or bool(too_far.any()) or not bool(difference.isfinite().all()):
        worst = (difference / tolerance).nan_to_num(torch.inf).max().item()
        raise WrongStepError(
            f"{name} {tuple(param.shape)} {param.dtype}, first moment {momentum}: off by "
            f"{difference.max().item():.2e} from float64, {worst:.1f} times what rounding explains, "
            f"in {off.double().mean().item():.2%} of its elements"
        )
    return (difference / tolerance)[~off].max().item() if not off.all() else 1.0


def _rules_of(plan: CompressionPlan, name: str) -> list[Any]:
    return [plan[key] for key in plan.keys_of(name)]
