"""The pictures of the calibration studies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.calibration.gap import PICTURED, SETS
from benchmarks.calibration.predictors import Point
from benchmarks.harness.picture import picture
from slimadam.utils.plot_style import COLOURS

_MARKERS = ("o", "s", "^", "D")


def _draw_gap(result: dict[str, Any], folder: Path) -> None:
    """Draw the gap of each plan, and the gap over the two predictors that matter."""
    points = [point for point in result["points"] if point["predictors"]]
    workloads = sorted({point["workload"] for point in points})
    plans = list(dict.fromkeys(point["plan"] for point in points))
    with picture(folder / "calibration-gap.png", len(workloads), 3.6, sharey=True) as axes:
        for panel, workload in zip(axes[0], workloads, strict=True):
            _draw_gaps(panel, [point for point in points if point["workload"] == workload], plans)
            panel.set_title(workload)
        axes[0, 0].set_yticks(range(len(plans)), plans)
        axes[0, 0].invert_yaxis()
        axes[0, 0].figure.supxlabel("held-out loss above AdamW's (dots: seeds, bars: their means)", fontsize=9)
    panels = [(title, predictor) for title, predictor in PICTURED if title in result["fits"]]
    with picture(folder / "calibration-predictor.png", len(PICTURED), 3.8, sharey=True) as axes:
        for panel, (title, predictor) in zip(axes[0], panels, strict=False):
            chosen = [point for point in points if SETS[title](Point(**point))]
            line = next(fit for fit in result["fits"][title]["predictors"] if fit["predictor"] == predictor)
            _draw_scatter(panel, chosen, line, workloads)
            panel.set_title(f"{title}\nrank correlation {line['spearman']:+.2f}, residual {line['residual']:.1%}")
            panel.set_xlabel(predictor.replace(", mean over elements", ""))
        axes[0, 0].set_ylabel("held-out loss above AdamW's")
        axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes[0, 1].legend(loc="best", fontsize=7)


def _draw_gaps(axes: Axes, points: list[dict[str, Any]], plans: list[str]) -> None:
    rates = sorted({point["lr"] for point in points})
    for place, lr in enumerate(rates):
        offset = 0.2 * (place - (len(rates) - 1) / 2)
        for index, plan in enumerate(plans):
            gaps = [point["gap"] for point in points if (point["lr"], point["plan"]) == (lr, plan)]
            row = index + offset
            label = f"lr {lr:g}" if index == 0 else None
            axes.plot(gaps, [row] * len(gaps), "o", color=COLOURS[place], markersize=3, alpha=0.6, label=label)
            axes.plot([np.mean(gaps)] * 2, [row - 0.1, row + 0.1], color=COLOURS[place], linewidth=2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="best", handletextpad=0.1)


def _draw_scatter(axes: Axes, points: list[dict[str, Any]], line: dict[str, Any], workloads: list[str]) -> None:
    for key, some in _grouped(points, "workload", "lr").items():
        rates = sorted({point["lr"] for point in points})
        axes.plot([point["predictors"][line["predictor"]] for point in some], [point["gap"] for point in some],
                  _MARKERS[rates.index(key[1])], color=COLOURS[workloads.index(key[0])], markersize=4, alpha=0.6,
                  label=f"{key[0]}, lr {key[1]:g}")  # fmt: skip
    x = np.linspace(*axes.get_xlim(), 2)
    y = line["intercept"] + line["slope"] * x
    axes.plot(x, y, color="black", linewidth=1)
    axes.fill_between(x, y - line["residual"], y + line["residual"], color="black", alpha=0.08)
    axes.axhline(0, color="black", linewidth=0.6)


def _draw_steps(result: dict[str, Any], folder: Path) -> None:
    """Draw how soon AutoPlan's choice is that of the whole run, and what deciding early costs."""
    workloads = sorted({row["workload"] for row in result["agreement"]})
    rates = sorted({row["lr"] for row in result["agreement"]})
    best = [row for row in result["agreement"] if row["forms"] == "best"]
    with picture(folder / "calibration-steps.png", 3, 3.4) as axes:
        agreement, noise, gap = axes[0]
        for key, rows in _grouped(best, "workload", "lr").items():
            steps = [row["calibration_steps"] for row in rows]
            style = f"{_MARKERS[rates.index(key[1])]}-"
            colour = COLOURS[workloads.index(key[0])]
            agreement.plot(steps, [row["agreement"] for row in rows], style, color=colour, markersize=4, linewidth=1,
                           label=f"{key[0]}, lr {key[1]:g}")  # fmt: skip
            noise.plot(steps, [row["noise"] for row in rows], style, color=colour, markersize=4, linewidth=1)
        agreement.set_title("Elements for which the choice\nis that of the whole run")
        agreement.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        agreement.set_ylim(0, 1.03)
        agreement.legend(loc="lower right", fontsize=7)
        noise.set_title("1/SNR of the choice, measured\nover the whole run")
        noise.set_ylim(0, None)
        _draw_automatic(gap, result["runs"])
        for panel in axes[0]:
            panel.set_xlim(0, None)
            panel.set_xlabel("steps before plan='auto' decides")


def _draw_automatic(axes: Axes, runs: list[dict[str, Any]]) -> None:
    for place, (key, rows) in enumerate(_grouped(runs, "lr").items()):
        steps = sorted({row["calibration_steps"] for row in rows})
        means = [np.mean([row["gap"] for row in rows if row["calibration_steps"] == n]) for n in steps]
        axes.plot([row["calibration_steps"] for row in rows], [row["gap"] for row in rows], _MARKERS[place],
                  color=COLOURS[place], markersize=4, alpha=0.5)  # fmt: skip
        axes.plot(steps, means, color=COLOURS[place], label=f"lr {key[0]:g}, mean")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(f"Held-out loss above AdamW's\n({runs[0]['workload']}; dots: seeds)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.legend(loc="best")


def _grouped(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return rows by the values of the named columns, in order."""
    keys = sorted({tuple(row[name] for name in names) for row in rows})
    return {key: [row for row in rows if tuple(row[name] for name in names) == key] for key in keys}


def _draw_findings(result: dict[str, Any], folder: Path) -> None:
    """Draw the SNR of each role over training, and one panel for each other finding."""
    if "roles" in result:
        by_role = result["roles"]["by_role"]
        with picture(folder / "calibration-roles.png", 3, 4.6, rows=2, sharex=True, sharey=True) as axes:
            for panel, (role, row) in zip(axes.flat, by_role.items(), strict=False):
                _draw_role(panel, role, row)
            for panel in axes[1]:
                panel.set_xlabel(f"optimizer step at lr {result['learning_rate_of_roles']:g}")
            for panel in axes[:, 0]:
                panel.set_ylabel("SNR (median)")
            axes[0, 2].legend(loc="lower right")
    with picture(folder / "calibration-findings.png", 2, 6.4, rows=2) as axes:
        panels = {
            "learning_rate": _draw_learning_rate,
            "vocabulary": _draw_vocabulary,
            "savings": _draw_savings,
            "transfer": _draw_transfer,
        }
        for panel, (name, draw) in zip(axes.flat, panels.items(), strict=True):
            if name in result:
                draw(panel, result[name])


def _draw_role(axes: Axes, role: str, row: dict[str, Any]) -> None:
    for (label, series), colour in zip(row["over_training"].items(), COLOURS, strict=False):
        recommended = label == f"dimension {row['paper_dims'][0]}"
        axes.plot(*zip(*series, strict=True), color=colour, linewidth=2 if recommended else 1, label=label)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_title(f"{role.replace('_', ' ')}: paper says dimension {row['paper_dims'][0]}", fontsize=9)


def _draw_learning_rate(axes: Axes, found: dict[str, Any]) -> None:
    kinds = {"snr_of_best_average": "best plain average", "snr_of_row_and_column_averages": "row and column averages"}
    for (beta2, row), style in zip(found["by_beta2"].items(), ("o-", "s--"), strict=True):
        for (key, label), colour in zip(kinds.items(), COLOURS, strict=False):
            rates = [float(lr) for lr in row[key]]
            axes.plot(rates, list(row[key].values()), style, color=colour, label=f"{label}, {beta2}")
    axes.set_xscale("log")
    axes.set_ylim(0, None)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("SNR, geometric mean of matrices")
    axes.set_title("SNR against the learning rate")
    _legend_below(axes, fontsize=7)


def _draw_vocabulary(axes: Axes, found: dict[str, Any]) -> None:
    for (role, lines), colour in zip(found["snr"].items(), COLOURS, strict=False):
        for (candidate, values), marker in zip(lines.items(), _MARKERS, strict=False):
            label = f"{role.replace('_', ' ')}, {candidate.replace('dimension 0', 'along words')}"
            axes.plot([int(size) for size in values], list(values.values()), f"{marker}-", color=colour, linewidth=1,
                      markersize=4, label=label)  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("words in the vocabulary")
    axes.set_ylabel("SNR")
    axes.set_title("SNR by size of a word vocabulary")
    _legend_below(axes, fontsize=7)


def _draw_savings(axes: Axes, rows: dict[str, Any]) -> None:
    places = np.arange(len(rows))
    for offset, cutoff, colour in ((-0.2, 1, COLOURS[0]), (0.2, 2, COLOURS[1])):
        saved = [row[f"saved_at_cutoff_{cutoff}"] for row in rows.values()]
        axes.barh(places + offset, saved, height=0.36, color=colour, label=f"cutoff {cutoff}")
    axes.set_yticks(places, [name.replace(", ", ",\n") for name in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Second moments that averages save")
    _legend_below(axes)


def _draw_transfer(axes: Axes, found: dict[str, Any]) -> None:
    rows = found["same_choice"]
    places = np.arange(len(rows))
    for offset, forms, colour in ((-0.2, "averages", COLOURS[0]), (0.2, "best form", COLOURS[1])):
        axes.barh(places + offset, [row[forms] for row in rows.values()], height=0.36, color=colour, label=forms)
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Matrices: same choice at 0.1 lr and lr")
    _legend_below(axes)


def _legend_below(axes: Axes, **options: Any) -> None:
    lowest = -0.16 if axes.get_xlabel() else -0.08
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, lowest), ncols=2, **options)


DRAWN: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "gap": _draw_gap,
    "steps": _draw_steps,
    "findings": _draw_findings,
}
