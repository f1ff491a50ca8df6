"""The demo's result as plain numbers: for ``result.json``, the report's facts and the table of layers."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from slimadam.demo.data import ByteData
from slimadam.demo.training import DemoResult, Trainee
from slimadam.measurement.snr import average_snr
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import Rule


def layer_rows(plan: CompressionPlan) -> list[dict[str, Any]]:
    """Return for each role how many of its parameters got which dimensions (none: full), and their average SNRs."""
    roles: dict[str, list[Rule]] = {}
    for rule in plan.values():
        roles.setdefault(rule.role, []).append(rule)
    rows = []
    for role, rules in roles.items():
        counts = Counter(rule.dims for rule in rules).most_common()
        chosen = [{"dims": list(dims), "tensors": count} for dims, count in counts]
        snr = [{"dims": candidate, "value": value} for candidate, value in average_snr(r.snr for r in rules).items()]
        rows.append({"role": role, "tensors": len(rules), "chosen": chosen, "snr": snr})
    return rows


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
        "parameters": sum(parameter.numel() for parameter in result.adamw.model.parameters()),
        "loss_gap": result.gap_of(result.slimadam),
        "second_moments_saved": result.second_moments_saved,
        "state_saved": 1 - result.slimadam.state_bytes / result.adamw.state_bytes,
        "adamw": _run_to_dict(result.adamw),
        "slimadam": _run_to_dict(result.slimadam),
        "best": {**_run_to_dict(result.best), "loss_gap": result.gap_of(result.best)},
        "layers": layer_rows(result.plan),
    }


def _run_to_dict(run: Trainee) -> dict[str, Any]:
    return {
        "held_out_loss": run.held_out_loss,
        "second_moment_bytes": run.second_moment_bytes,
        "state_bytes": run.state_bytes,
        "median_optimizer_ms": statistics.median(run.optimizer_ms),
        "median_step_ms": statistics.median(run.step_ms),
        "train_losses": run.train_losses,
        "held_out_losses": {str(step): loss for step, loss in run.held_out_losses.items()},
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
