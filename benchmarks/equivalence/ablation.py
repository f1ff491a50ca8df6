"""Cost of each form by itself, at AdamW's best rate: ``python -m benchmarks.ablation``.

Every run is AdamW for 200 steps, after which some second moments change their form. Held-out losses are compared with
AdamW's runs of the same seeds in ``equivalence.jsonl``.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.equivalence.contenders import REFERENCE
from benchmarks.equivalence.report import figures
from benchmarks.equivalence.runs import Losses, Record, of_task
from benchmarks.equivalence.workloads import WORKLOADS, Task
from benchmarks.harness import machine
from benchmarks.harness.stopwatch import tensor_bytes
from benchmarks.readme.markdown import table
from benchmarks.workloads.training import held_out_loss, train, training_rate
from slimadam import AutoPlan, SlimAdam

_AVERAGED, _CODED = 0.0, 1e9  # cutoffs that every SNR is above, or below
_HEAD, _EMBEDDINGS = ("lm_head",), ("*embed*",)
VARIANTS: Mapping[str, AutoPlan] = {
    "row and column averages": AutoPlan(cutoff=_AVERAGED),
    "these, head in full": AutoPlan(cutoff=_AVERAGED, keep=_HEAD),
    "these, embeddings in full": AutoPlan(cutoff=_AVERAGED, keep=_EMBEDDINGS),
    "one byte for each element": AutoPlan(cutoff=_CODED),
    "averages of the paper": AutoPlan(forms="mean"),
    "as measured": AutoPlan(),
}
_DEFAULT_WORKLOADS = ("byte GPT", "word GPT", "LSTM", "flights")


def differences(task: Task, lr: float, settings: AutoPlan, reference: Mapping[int, float]) -> dict[str, Any]:
    """Return differences to the reference's held-out losses, bytes of state, and the share of mean square lost.

    Args:
        task: Workload, size and length.
        lr: Peak learning rate.
        settings: What changes its form after the first steps.
        reference: The reference's losses by seed.
    """
    workload = task.workload
    found: list[float] = []
    shares: list[float] = []
    size = 0.0

    def make(model: nn.Module) -> SlimAdam:
        return SlimAdam(model, betas=workload.betas, weight_decay=task.weight_decay, plan=settings)

    for seed, loss in reference.items():
        rate = training_rate(lr, task.steps)
        model, optimizer = train(workload, make, rate, task.steps, seed, max_norm=task.kind.max_norm)
        assert isinstance(optimizer, SlimAdam)
        found.append(held_out_loss(workload, model) / loss - 1)
        expected = optimizer.plan.expectation
        shares.append(0.0 if expected is None else expected.averaged_away)
        size = tensor_bytes(optimizer.state) / sum(parameter.numel() for parameter in model.parameters())
    return {
        "differences": found,
        "mean": statistics.fmean(found),
        "share": statistics.fmean(shares),
        "bytes_per_parameter": size,
    }


def _of_workload(name: str, out: Path, seeds: int) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    task = Task(name)
    runs = of_task(Record(out / "equivalence.jsonl").runs, task, task.version)
    rows = figures(runs)["tasks"]
    lr = rows[0]["contenders"][REFERENCE].get("best_rate") if rows else None
    done = [] if lr is None else [Losses(runs).get(REFERENCE, lr, seed) for seed in range(seeds)]
    reference = {run.seed: run.loss for run in done if run is not None}
    if lr is None or len(reference) < seeds:
        print(f"left out: {name}: run python -m benchmarks.equivalence --workloads '{name}' first")
        return None
    found = {}
    for label, settings in VARIANTS.items():
        found[label] = row = differences(task, lr, settings, reference)
        print(f"{name}: {label}: {row['mean']:+.2%}, {row['bytes_per_parameter']:.2f} bytes", flush=True)
    return {"workload": name, "lr": lr, "steps": task.steps, "variants": found}


def markdown(result: dict[str, Any]) -> str:
    """Return a table of mean differences and bytes of state, a row for each workload.

    Args:
        result: What ``ablation.json`` holds.
    """
    rows = [
        [
            row["workload"],
            *(f"{one['mean']:+.2%} ({one['bytes_per_parameter']:.2f})" for one in row["variants"].values()),
        ]
        for row in result["workloads"]
    ]
    return table(["workload", *VARIANTS], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and write ``ablation.json``; 1 where no workload has AdamW's runs."""
    parser = machine.parser(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=_DEFAULT_WORKLOADS, metavar="NAME",
                        help=f"of {', '.join(WORKLOADS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="workloads at a time (default: 1)")
    options = parser.parse_args(arguments)
    names = [name for name in options.workloads if not _is_missing(name)]
    train_on = partial(_of_workload, out=options.out, seeds=options.seeds)
    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = [row for row in pool.map(train_on, names) if row is not None]
    else:
        rows = [row for row in map(train_on, names) if row is not None]
    if rows:
        print("written:", machine.write("ablation", {"seeds": options.seeds, "workloads": rows}, options.out))
    return 0 if rows else 1


def _is_missing(name: str) -> bool:
    reason = WORKLOADS[name].missing()
    if reason is not None:
        print(f"left out: {name}: {reason}")
    return reason is not None


if __name__ == "__main__":
    raise SystemExit(main())
