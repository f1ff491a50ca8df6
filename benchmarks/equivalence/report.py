"""The table and the picture of the runs in a record: only of what is complete enough to judge."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.equivalence.contenders import CONTENDERS, REFERENCE
from benchmarks.equivalence.runs import SELECTION_SEEDS, Losses, Run, of_task
from benchmarks.equivalence.statistics import LEVEL, MARGIN, EdgeError, best_rate, compare
from benchmarks.equivalence.workloads import LENGTHS, SIZES, Task
from benchmarks.harness.picture import picture

DEFAULT = "auto"
"""The contender that the bars are for."""
EQUIVALENT_ON, LARGEST_STATE = 6, 4.4
"""Bars: workloads on which it is the same within the margin, and bytes of state per parameter."""
_COLUMNS = 3


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """Return rates, comparisons and curves of every task in a record.

    Args:
        runs: Runs of a record.
    """
    tasks = dict.fromkeys(Task(run.workload, run.size, run.length) for run in runs)
    found = [_of_task(task, of_task(runs, task)) for task in tasks]
    return {"margin": MARGIN, "level": LEVEL, "bars": bars(found), "tasks": found}


def bars(tasks: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return whether each bar of the default is met on the small workloads, in their short runs.

    Args:
        tasks: Figures of each task.
    """
    small = [task for task in tasks if (task["size"], task["length"]) == (SIZES[0], next(iter(LENGTHS)))]
    rows = {task["workload"]: task["contenders"].get(DEFAULT, {}) for task in small}
    same = sum(row.get("at_own_best", {}).get("equivalent", False) for row in rows.values())
    found = {
        f"{DEFAULT}: the same within {MARGIN:.1%} on {same} of {len(rows)} workloads (bar: {EQUIVALENT_ON})": same
        >= EQUIVALENT_ON
    }
    for workload, row in rows.items():
        if "at_reference_best" in row:
            mean = row["at_reference_best"]["mean"]
            found[f"{DEFAULT} on {workload}, at {REFERENCE}'s best rate: {mean:+.2%} (bar: {MARGIN:+.1%})"] = (
                mean <= MARGIN
            )
            size = row["bytes_per_parameter"]
            found[f"{DEFAULT} on {workload}: {size:.2f} bytes of state per parameter (bar: {LARGEST_STATE})"] = (
                size <= LARGEST_STATE
            )
    return found


def _of_task(task: Task, runs: Sequence[Run]) -> dict[str, Any]:
    losses = Losses(runs)
    selection = sorted({run.seed for run in runs if run.seed >= SELECTION_SEEDS})
    reference = _chosen(losses, REFERENCE, selection)
    rows = {
        name: _row(losses, name, selection, reference)
        for name in CONTENDERS
        if any(run.contender == name for run in runs)
    }
    first = runs[0]
    return {
        "workload": task.name, "size": task.size, "length": task.length, "steps": first.steps, "data": first.data,
        "parameters": first.parameters, "start_loss": statistics.fmean(run.start for run in runs),
        "selection_seeds": selection, "contenders": rows,
    }  # fmt: skip


def _chosen(losses: Losses, name: str, selection: Sequence[int]) -> float | str:
    """Return the best rate, or why it is not known."""
    name = REFERENCE if CONTENDERS[name].is_control else name
    found = losses.by_rate(name, selection)
    if not found:
        return "no learning rate was run with all selection seeds"
    try:
        return best_rate(found)
    except EdgeError as edge:
        return str(edge)


def _row(losses: Losses, name: str, selection: Sequence[int], reference: float | str) -> dict[str, Any]:
    runs = [run for run in losses.runs.values() if run.contender == name]
    row: dict[str, Any] = {
        "code": runs[0].code,
        "bytes_per_parameter": max(run.bytes_per_parameter for run in runs),
        "seconds": statistics.median(run.seconds for run in runs),
        "curve": {f"{lr:g}": found for lr, found in losses.by_rate(name, selection).items()},
    }
    own = _chosen(losses, name, selection)
    if isinstance(own, str) or isinstance(reference, str):
        return row | {"refused": own if isinstance(own, str) else f"{REFERENCE}: {reference}"}
    row["best_rate"] = own
    pairs = _pairs(losses, name, own, reference)
    row["losses"] = [loss for loss, _ in pairs]
    if len(pairs) >= 2 and name != REFERENCE:
        row["at_own_best"] = _comparison(pairs)
    at_reference = _pairs(losses, name, reference, reference)
    if len(at_reference) >= 2 and name != REFERENCE:
        row["at_reference_best"] = _comparison(at_reference)
    return row


def _pairs(losses: Losses, name: str, lr: float, reference: float) -> list[tuple[float, float]]:
    seeds = sorted(seed for contender, rate, seed in losses.runs if (contender, rate) == (name, lr))
    found = [(losses.get(name, lr, seed), losses.get(REFERENCE, reference, seed)) for seed in seeds]
    return [(ours.loss, theirs.loss) for ours, theirs in found if ours and theirs and ours.seed < SELECTION_SEEDS]


def _comparison(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    found = compare([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    return asdict(found) | {"equivalent": found.equivalent, "no_worse": found.no_worse}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables as Markdown: mean differences of all tasks, then one table for each task.

    Args:
        result: Figures of :func:`figures`.
    """
    tasks = [line for task in result["tasks"] for line in _table(task, result["margin"])]
    return "\n".join([*_summary(result["tasks"], result["margin"]), *tasks])


def _summary(tasks: Sequence[dict[str, Any]], margin: float) -> Iterable[str]:
    names = [name for name in CONTENDERS if any(name in task["contenders"] for task in tasks) and name != REFERENCE]
    yield f"Held-out loss against {REFERENCE}'s, each at its own best rate; in bold: the same within {margin:.1%}:"
    yield ""
    yield "| workload | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for task in tasks:
        rows = [task["contenders"].get(name, {}).get("at_own_best") for name in names]
        label = f"{task['workload']}, {task['size']}, {task['length']}"
        yield f"| {label} | " + " | ".join(_difference(row) if row else "" for row in rows) + " |"
    yield ""


def _difference(found: dict[str, Any]) -> str:
    text = f"{found['mean']:+.2%}"
    return f"**{text}**" if found["equivalent"] else text


def _table(task: dict[str, Any], margin: float) -> Iterable[str]:
    yield f"{task['workload']}, {task['size']}, {task['parameters']:,} parameters, {task['steps']} steps"
    yield f"(held-out loss before training {task['start_loss']:.3f}):"
    yield ""
    header = f"| optimizer | best rate | loss | difference, 95% interval | same within {margin:.1%} "
    yield header + "| at AdamW's rate | bytes |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in task["contenders"].items():
        yield "| " + " | ".join([name, *_cells(row)]) + " |"
    yield ""


def _cells(row: dict[str, Any]) -> list[str]:
    size = f"{row['bytes_per_parameter']:.2f}"
    if "refused" in row:
        return ["", "", row["refused"], "", "", size]
    loss = f"{statistics.fmean(row['losses']):.4f}" if row["losses"] else ""
    own, other = row.get("at_own_best"), row.get("at_reference_best")
    return [
        f"{row['best_rate']:g}",
        loss,
        f"{own['mean']:+.2%} ({own['low']:+.2%} to {own['high']:+.2%}, {own['pairs']} pairs)" if own else "",
        _verdict(own) if own else "",
        f"{other['mean']:+.2%}" if other else "",
        size,
    ]


def _verdict(found: dict[str, Any]) -> str:
    verdict = "yes" if found["equivalent"] else "no worse" if found["no_worse"] else "not shown"
    return f"{verdict} (p = {found['p_equivalent']:.2g})"


def draw(result: dict[str, Any], path: Path) -> Path:
    """Draw the loss over the rate for each task, a band of one standard deviation over the selection seeds.

    Args:
        result: Figures of :func:`figures`.
        path: File of the picture, which is also returned.
    """
    tasks = result["tasks"]
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    with picture(path, columns, 3.4 * rows, rows, width=4.0 * columns) as axes:
        for panel in axes.flat[len(tasks) :]:
            panel.set_visible(False)
        for panel, task in zip(axes.flat, tasks, strict=False):
            _draw_task(panel, task)
        axes.flat[0].legend(fontsize=7)
    return path


def _draw_task(panel: Axes, task: dict[str, Any]) -> None:
    for number, (name, row) in enumerate(task["contenders"].items()):
        if not row["curve"]:
            continue
        grid = np.array([float(lr) for lr in row["curve"]])
        losses = np.array(list(row["curve"].values()))
        mean, spread = losses.mean(1), losses.std(1, ddof=min(1, losses.shape[1] - 1))
        panel.plot(grid, mean, marker="o", markersize=3, color=f"C{number % 10}", label=name)
        panel.fill_between(grid, mean - spread, mean + spread, color=f"C{number % 10}", alpha=0.15, linewidth=0)
    rates = sorted({float(lr) for row in task["contenders"].values() for lr in row["curve"]})
    shown = rates[:: max(1, len(rates) // 4)]
    panel.set_xscale("log")
    panel.set_xticks(shown, [f"{rate:.2g}" for rate in shown])
    panel.minorticks_off()
    panel.set_xlabel("peak learning rate")
    panel.set_title(f"{task['workload']}, {task['size']}, {task['steps']} steps: held-out loss")
