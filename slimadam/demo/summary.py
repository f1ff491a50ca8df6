"""The demo's result as plain numbers: for ``result.json``, the report's facts and the table of layers."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slimadam.demo.data import ByteData
from slimadam.demo.training import DemoResult, OptimizerResult
from slimadam.measurement.snr import average_snr
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import Candidate, Rule


class LayerRow(NamedTuple):
    """The choices of a plan for the tensors of one role.

    Attributes:
        role: The role.
        tensors: Number of parameters that have it.
        chosen: Number of parameters of each choice of dimensions (``()``: full), the most frequent first.
        snr: The averaged SNR of each candidate, averaged over the parameters.
    """

    role: str
    tensors: int
    chosen: dict[tuple[int, ...], int]
    snr: dict[Candidate, float]


def layer_rows(plan: CompressionPlan) -> list[LayerRow]:
    """Return one row for each role, in the order in which the roles appear in the model."""
    roles: dict[str, list[Rule]] = {}
    for rule in plan.values():
        roles.setdefault(rule.role, []).append(rule)
    return [
        LayerRow(role, len(rules), dict(Counter(rule.dims for rule in rules).most_common()),
                 average_snr(rule.snr for rule in rules))
        for role, rules in roles.items()
    ]  # fmt: skip


def to_dict(result: DemoResult, data: ByteData) -> dict[str, Any]:
    """Return everything the demo found, JSON-compatible, with the machine, the versions and the date.

    Args:
        result: A finished demo.
        data: The text it trained on.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": dataclasses.asdict(result.settings),
        "data": {"source": data.source, "train_bytes": len(data.train), "held_out_bytes": len(data.held_out)},
        "parameters": result.parameters,
        "loss_gap": result.gap_of(result.slimadam),
        "second_moments_saved": result.second_moments_saved,
        "state_saved": 1 - result.slimadam.state.total / result.adamw.state.total,
        "adamw": _run_to_dict(result.adamw),
        "slimadam": _run_to_dict(result.slimadam),
        "best": {**_run_to_dict(result.best), "loss_gap": result.gap_of(result.best)},
        "layers": [
            {
                "role": row.role,
                "tensors": row.tensors,
                "chosen": [{"dims": list(dims), "tensors": count} for dims, count in row.chosen.items()],
                "snr": [{"dims": candidate, "value": value} for candidate, value in row.snr.items()],
            }
            for row in layer_rows(result.plan)
        ],
    }


def _run_to_dict(run: OptimizerResult) -> dict[str, Any]:
    curve = run.curve
    return {
        "held_out_loss": curve.held_out_loss,
        "second_moment_bytes": run.state.second_moments,
        "state_bytes": run.state.total,
        "median_optimizer_ms": curve.median_optimizer_ms,
        "median_step_ms": curve.median_step_ms,
        "train_losses": curve.train_losses,
        "held_out_losses": {str(step): loss for step, loss in curve.held_out_losses.items()},
    }


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """Return rows for the report's list of facts, from the dict of :func:`to_dict`."""
    settings, adamw, slim = summary["settings"], summary["adamw"], summary["slimadam"]
    return {
        "Model": f"byte-level GPT, {settings['layers']} layers, width {settings['width']}",
        "Text": summary["data"]["source"],
        "Training": f"{settings['steps']} steps at learning rate {settings['lr']:g}, seed {settings['seed']}",
        "Held-out loss": f"{adamw['held_out_loss']:.4f} AdamW, {slim['held_out_loss']:.4f} SlimAdam "
        f"({summary['loss_gap']:+.2%}), with row and column averages {summary['best']['loss_gap']:+.2%}",
        "Optimizer state": f"{adamw['state_bytes']:,} bytes AdamW, {slim['state_bytes']:,} bytes SlimAdam",
        "Machine": f"{summary['machine']['cpu']}, {summary['machine']['cores']} cores; "
        f"Python {summary['versions']['python']}, torch {summary['versions']['torch']}",
    }


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
