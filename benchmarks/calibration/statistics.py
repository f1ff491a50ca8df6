"""Measure, while AdamW trains with the full second moment, what a compressed one would change."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.layers.roles import roles_of
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import Schedule
from slimadam.measurement.snr import measure
from slimadam.state.rule import FACTORED, Candidate


@dataclass(frozen=True)
class Change:
    """Difference that one candidate would make to a parameter's second moment ``v`` and Adam update ``u`` at one step.

    Attributes:
        log_mean: Mean of ``log(v / compressed)`` over the elements where ``v`` is positive.
        log_square: Mean of its square.
        update_square: Sum of ``u ** 2``.
        compressed_square: Sum of the squares of the update with the compressed second moment.
        product: Sum of the products of both updates.
    """

    log_mean: float
    log_square: float
    update_square: float
    compressed_square: float
    product: float


Changes = dict[tuple[int, str, Candidate], Change]
"""Changes by step, parameter and candidate."""


@dataclass
class Measurements:
    """Measurements of one AdamW run.

    Attributes:
        history: SNR of each parameter and candidate.
        changes: Changes that each candidate would have made, at fewer steps.
    """

    history: SNRHistory
    changes: Changes

    def save(self, path: Path) -> None:
        """Write both as JSON."""
        parameters = [
            {"name": name, "shape": parameter.shape, "role": parameter.role,
             "snr": [[step, list(values.items())] for step, values in parameter.values.items()]}
            for name, parameter in self.history.items()
        ]  # fmt: skip
        changes = [[*key, *asdict(change).values()] for key, change in self.changes.items()]
        path.write_text(json.dumps({"parameters": parameters, "changes": changes}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Measurements:
        """Read what :meth:`save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        history = SNRHistory()
        for parameter in data["parameters"]:
            history.record(0, parameter["name"], parameter["shape"], {}, parameter["role"])
            for step, values in parameter["snr"]:
                found = {_candidate(candidate): value for candidate, value in values}
                history.record(step, parameter["name"], parameter["shape"], found)
        changes = {
            (step, name, _candidate(candidate)): Change(*values) for step, name, candidate, *values in data["changes"]
        }
        return cls(history, changes)


def _candidate(stored: Any) -> Candidate:
    return FACTORED if stored == FACTORED else tuple(stored)


class Recorder:
    """Measures an AdamW optimizer after its steps.

    Args:
        optimizer: A ``torch.optim.AdamW`` with one parameter group.
        model: The module that owns the parameters.
        snr_schedule: When to measure the SNR.
        change_schedule: When to measure the changes as well; among the steps of ``snr_schedule``.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, snr_schedule: Schedule, change_schedule: Schedule
    ) -> None:
        self.measurements = Measurements(SNRHistory(), {})
        self._optimizer = optimizer
        self._roles = roles_of(model)
        self._parameters = dict(model.named_parameters())
        self._schedules = snr_schedule, change_schedule
        self._steps = 0
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    @torch.no_grad()
    def _after_step(self) -> None:
        self._steps += 1
        wants_snr, wants_changes = (schedule(self._steps) for schedule in self._schedules)
        if not wants_snr:
            return
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            values = measure(state["exp_avg_sq"]) if parameter.dim() > 1 else {}
            role = self._roles[name].role
            self.measurements.history.record(self._steps, name, parameter.shape, values, role)
            if wants_changes:
                found = changes_of(state["exp_avg"], state["exp_avg_sq"], values, self._steps, self._optimizer)
                self.measurements.changes |= {(self._steps, name, candidate): found[candidate] for candidate in found}


def changes_of(
    exp_avg: Tensor, exp_avg_sq: Tensor, candidates: Iterable[Candidate], step: int, optimizer: Optimizer
) -> dict[Candidate, Change]:
    """Return the change that each candidate would make.

    Args:
        exp_avg: First moment.
        exp_avg_sq: Second moment, of the same shape.
        candidates: Ways of compressing it.
        step: Steps that both have seen, for the bias corrections.
        optimizer: The betas and eps of its first group are used.
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    m = exp_avg.double() / (1 - beta1**step)
    v = exp_avg_sq.double() / (1 - beta2**step)
    update = m / (v.sqrt() + group["eps"])
    positive = v > 0
    found = {}
    for candidate in candidates:
        compressed = _compress(v, candidate)
        log = (v[positive] / compressed[positive]).log()
        new = m / (compressed.sqrt() + group["eps"])
        sums = (update.square().sum(), new.square().sum(), (update * new).sum())
        found[candidate] = Change(log.mean().item(), log.square().mean().item(), *(x.item() for x in sums))
    return found


def _compress(v: Tensor, candidate: Candidate) -> Tensor:
    """Return the second moment that a candidate would use in place of ``v``, in full shape."""
    if candidate != FACTORED:
        return v.mean(candidate, keepdim=True).expand_as(v)
    matrix = v.reshape(v.shape[0], -1)
    rows, columns = matrix.mean(1, keepdim=True), matrix.mean(0, keepdim=True)
    return (rows * columns / max(rows.mean().item(), math.ulp(0.0))).reshape(v.shape)
