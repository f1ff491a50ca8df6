"""The evidence for how slimadam chooses: ``python -m benchmarks.calibration [gap|steps|findings|all]``.

``gap``: how far held-out losses are from AdamW's, and which statistic predicts it. ``steps``: how long
``plan="auto"`` has to measure. ``findings``: which findings of arXiv 2503.01843 small models reproduce.

Finished runs stay in ``build/calibration``: an interrupted study goes on where it was, and studies share runs. All of
them take about two hours on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration import findings, gap, plots, printing, steps
from benchmarks.calibration.grid import FULL, QUICK, Grid
from benchmarks.calibration.runs import Runs
from benchmarks.harness import machine

Study = Callable[[Runs, Grid], dict[str, Any]]
STUDIES: dict[str, Study] = {
    "gap": gap.study,
    "steps": steps.study,
    "findings": findings.study,
}
RUNS = Path("build/calibration")
PICTURES = Path(__file__).resolve().parents[2] / "docs"


def main() -> None:
    """Run the studies asked for, print their figures, write results and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--finished", action="store_true", help="train nothing: report the runs that are finished")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, written to a temporary folder")
    arguments = parser.parse_args()
    grid = QUICK if arguments.quick else FULL
    grid = replace(grid, seeds=tuple(arguments.seeds)) if arguments.seeds else grid
    chosen = list(STUDIES) if arguments.study == "all" else [arguments.study]
    torch.set_num_threads(1)
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            run(chosen, grid, Runs(Path(folder, "runs"), held_out_batches=1), Path(folder), Path(folder))
    else:
        run(chosen, grid, Runs(RUNS, may_train=not arguments.finished), machine.RESULTS, PICTURES)


def run(studies: list[str], grid: Grid, runs: Runs, results: Path, pictures: Path) -> None:
    """Run the named studies.

    Args:
        studies: Keys of :data:`STUDIES`.
        grid: What they cover.
        runs: The runs that are finished, and the means to do the others.
        results: Where ``calibration_<study>.json`` go.
        pictures: Where ``calibration-*.png`` go.
    """
    for name in studies:
        result = STUDIES[name](runs, grid)
        printing.PRINTED[name](result)
        plots.DRAWN[name](result, pictures)
        print("written:", machine.write(f"calibration_{name}", result, results))


if __name__ == "__main__":
    main()
