"""The demo's result as plain numbers: for ``result.json``, the report's facts and the table of layers."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimadam.demo.data import ByteData
from slimadam.demo.training import DemoResult, OptimizerResult
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import Candidate


@dataclass(frozen=True)
class LayerRow:
    """What the plan does with the tensors of one role.

    Attributes:
        role: The role.
        tensors: How many parameters have it.
        chosen: For each choice of dimensions (``()``: full), how many parameters it was made for; the most
            frequent first.
        snr: The averaged SNR of each candidate, averaged over the parameters.
    """

    role: str
    tensors: int
    chosen: dict[tuple[int, ...], int]
    snr: dict[Candidate, float]


def layer_rows(plan: CompressionPlan) -> list[LayerRow]:
    """One row for each role, in the order in which the roles appear in the model."""
    rows = []
    for role in dict.fromkeys(rule.role for rule in plan.values()):
        rules = [rule for rule in plan.values() if rule.role == role]
        chosen = Counter(rule.dims for rule in rules)
        snr = {candidate: sum(rule.snr[candidate] for rule in rules) / len(rules) for candidate in rules[0].snr}
        rows.append(LayerRow(role, len(rules), dict(chosen.most_common()), snr))
    return rows


def to_dict(result: DemoResult, data: ByteData) -> dict[str, Any]:
    """Everything the demo found, JSON-compatible, with the machine, the versions and the date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": dataclasses.asdict(result.settings),
        "data": {"source": data.source, "train_bytes": len(data.train), "held_out_bytes": len(data.held_out)},
        "parameters": result.parameters,
        "loss_gap": result.loss_gap,
        "second_moments_saved": result.second_moments_saved,
        "state_saved": result.state_saved,
        "adamw": _run_to_dict(result.adamw),
        "slimadam": _run_to_dict(result.slimadam),
        "best": {**_run_to_dict(result.best), "loss_gap": result.gap_of(result.best)},
        "layers": [_row_to_dict(row) for row in layer_rows(result.plan)],
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


def _row_to_dict(row: LayerRow) -> dict[str, Any]:
    return {
        "role": row.role,
        "tensors": row.tensors,
        "chosen": [{"dims": list(dims), "tensors": count} for dims, count in row.chosen.items()],
        "snr": [
            {"dims": candidate if isinstance(candidate, str) else list(candidate), "value": value}
            for candidate, value in row.snr.items()
        ],
    }


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """Rows for the report's list of facts, from what :func:`to_dict` returned."""
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


def cpu_model() -> str:
    """The processor's name where the system tells, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
