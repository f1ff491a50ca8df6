"""Training runs, each done once: their figures stay in a file, one JSON line a run.

Learning rates lie on a grid in steps of the square root of 2, the same one for all: step 0 is 0.001.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.equivalence.contenders import CONTENDERS, OTHER_ORDER, REFERENCE, ROUNDS, UnsuitableError
from benchmarks.equivalence.statistics import EdgeError, best_rate
from benchmarks.equivalence.workloads import Task
from benchmarks.harness.stopwatch import tensor_bytes
from benchmarks.workloads.training import held_out_loss, train, training_rate

FARTHEST = 12
"""Grid steps from the start of a search at which it gives up."""
SELECTION_SEEDS = 1000
"""The first of the seeds on which rates are chosen; those on which they are judged begin at 0."""


def grid_rate(step: int) -> float:
    """Return the learning rate of a grid step."""
    return float(f"{1e-3 * math.sqrt(2) ** step:.4g}")


@dataclass(frozen=True)
class Run:
    """One training run and its figures.

    Attributes:
        workload: Name of the workload.
        size: Its size.
        length: Its length.
        data: Version of data, model and schedule.
        contender: Name of the optimizer.
        code: Version of its code.
        lr: Peak learning rate.
        seed: Seed of initialisation and batches.
        loss: Held-out loss after the last step; infinite where the run diverged.
        start: Held-out loss before the first step.
        parameters: Number of parameters.
        bytes_per_parameter: Bytes of optimizer state at the end.
        seconds: Duration of the training.
        steps: Optimizer steps.
        threads: Threads that torch used.
    """

    workload: str
    size: str
    length: str
    data: str
    contender: str
    code: str
    lr: float
    seed: int
    loss: float
    start: float
    parameters: int
    bytes_per_parameter: float
    seconds: float
    steps: int
    threads: int


class Record:
    """The runs in a file; several processes may append to it at once.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self.runs = [_parse(line) for line in lines if line.endswith(b"\n")]  # a torn line is that of no run

    def append(self, run: Run) -> None:
        """Write a run to the end of the file, in place of a line that an interruption tore.

        Args:
            run: The run.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = asdict(run) | {"loss": run.loss if math.isfinite(run.loss) else None}
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(facts).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.append(run)


def _parse(line: bytes) -> Run:
    facts: dict[str, Any] = json.loads(line)
    if facts["loss"] is None:
        facts["loss"] = math.inf
    return Run(**facts)


class Losses:
    """Runs of one task, of each contender those with the code of its newest run.

    Args:
        runs: Runs of that task, the newest last.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        codes = {run.contender: run.code for run in runs}
        self.runs = {(run.contender, run.lr, run.seed): run for run in runs if codes.get(run.contender) == run.code}

    def get(self, contender: str, lr: float, seed: int) -> Run | None:
        """Return a run, or None where it was not done.

        Args:
            contender: Name of the optimizer.
            lr: Peak learning rate.
            seed: Its seed.
        """
        return self.runs.get((contender, lr, seed))

    def by_rate(self, contender: str, seeds: Sequence[int]) -> dict[float, list[float]]:
        """Return the losses of the seeds at each rate that has all of them.

        Args:
            contender: Name of the optimizer.
            seeds: Seeds.
        """
        rates = sorted({lr for name, lr, _ in self.runs if name == contender})
        found = {lr: [run.loss for seed in seeds if (run := self.get(contender, lr, seed))] for lr in rates}
        return {lr: losses for lr, losses in found.items() if len(losses) == len(seeds)}


class OutOfTimeError(Exception):
    """The minutes that were granted are over."""


@dataclass
class Protocol:
    """Seeds of the runs, and the time at which they end.

    Attributes:
        selection: Number of seeds on which each one's best rate is chosen.
        judged: Number of seeds on which it is judged, paired with the reference's; None: as many as the workload says.
        deadline: Value of :func:`time.monotonic` after which no run begins.
    """

    selection: int = 2
    judged: int | None = None
    deadline: float = math.inf

    @property
    def selection_seeds(self) -> range:
        """Return the seeds on which rates are chosen."""
        return range(SELECTION_SEEDS, SELECTION_SEEDS + self.selection)


class Runner:
    """Does the runs of one task that its record lacks.

    Args:
        task: Workload, size and length.
        record: Runs done so far.
        protocol: Seeds and deadline.
    """

    def __init__(self, task: Task, record: Record, protocol: Protocol) -> None:
        self._task, self._record, self._protocol = task, record, protocol
        self._codes: dict[str, str] = {}
        self._starts: dict[int, float] = {}
        self._best: dict[str, float] = {}

    @cached_property
    def _done(self) -> dict[tuple[str, str, float, int], Run]:
        runs = of_task(self._record.runs, self._task, self._task.version)
        return {(run.contender, run.code, run.lr, run.seed): run for run in runs}

    def select(self, contender: str) -> float:
        """Return the contender's best rate, extending the grid while it lies at an edge.

        Args:
            contender: Name of the optimizer.

        Raises:
            EdgeError: The best rate is still at an edge far from where the search began.
            OutOfTimeError: Before it was found.
        """
        contender = REFERENCE if CONTENDERS[contender].is_control else contender
        if contender not in self._best:
            self._best[contender] = self._search(contender)
        return self._best[contender]

    def _search(self, contender: str) -> float:
        center = self._task.kind.start + CONTENDERS[contender].shift
        steps = {grid_rate(step): step for step in (center - 1, center, center + 1)}
        while True:
            found = {lr: [self.run(contender, lr, seed) for seed in self._protocol.selection_seeds] for lr in steps}
            try:
                return best_rate(found)
            except EdgeError as edge:
                step = steps[edge.rate] + edge.direction
                if abs(step - center) > FARTHEST:
                    raise
                steps[grid_rate(step)] = step

    def judge(self, contender: str, seeds: Iterable[int]) -> None:
        """Run at the contender's best rate and at the reference's.

        Args:
            contender: Name of the optimizer.
            seeds: Seeds of the judgement.

        Raises:
            EdgeError: One of the rates is not known.
            OutOfTimeError: Before all were done.
        """
        for seed in seeds:
            for lr in (self.select(contender), self.select(REFERENCE)):
                self.run(contender, lr, seed)

    def run(self, contender: str, lr: float, seed: int) -> float:
        """Return the held-out loss of a run, done now if it is not in the record.

        Args:
            contender: Name of the optimizer.
            lr: Peak learning rate.
            seed: Its seed.

        Raises:
            OutOfTimeError: It would begin after the deadline.
        """
        if contender not in self._codes:
            self._codes[contender] = CONTENDERS[contender].version()
        key = contender, self._codes[contender], lr, seed
        if key not in self._done:
            if time.monotonic() > self._protocol.deadline:
                raise OutOfTimeError
            self._done[key] = run = self._train(contender, lr, seed)
            self._record.append(run)
            print(
                f"{run.workload}, {run.size}, {run.length}: {contender} at {lr:g}, seed {seed}: "
                f"{run.loss:.4f} in {run.seconds:.0f} s",
                flush=True,
            )
        return self._done[key].loss

    def _train(self, contender: str, lr: float, seed: int) -> Run:
        task, candidate = self._task, CONTENDERS[contender]
        optimizers: list[Optimizer] = []

        def make(model: nn.Module) -> Optimizer:
            optimizers.append(candidate.make(model, task))
            return optimizers[0]

        began = time.monotonic()
        model, optimizer = train(
            task.workload, make, training_rate(lr, task.steps), task.steps, seed,
            batch_seed=seed + OTHER_ORDER if candidate.other_order else None,
            perturbation=candidate.perturbation, max_norm=task.kind.max_norm,
        )  # fmt: skip
        seconds = time.monotonic() - began
        loss = held_out_loss(task.workload, model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Run(
            workload=task.name, size=task.size, length=task.length, data=task.version,
            contender=contender, code=self._codes[contender], lr=lr, seed=seed,
            loss=loss if math.isfinite(loss) else math.inf, start=self._start_loss(seed), parameters=parameters,
            bytes_per_parameter=tensor_bytes(optimizer.state) / parameters, seconds=round(seconds, 2),
            steps=task.steps, threads=torch.get_num_threads(),
        )  # fmt: skip

    def _start_loss(self, seed: int) -> float:
        if seed not in self._starts:
            self._starts[seed] = held_out_loss(self._task.workload, self._task.workload.new_model(seed))
        return self._starts[seed]


def of_task(runs: Iterable[Run], task: Task, version: str | None = None) -> list[Run]:
    """Return the runs of a task with one version of its data and model.

    Args:
        runs: Runs of any task.
        task: Workload, size and length.
        version: The version; None: that of the newest run.
    """
    found = [run for run in runs if (run.workload, run.size, run.length) == (task.name, task.size, task.length)]
    if version is None:
        version = found[-1].data if found else ""
    return [run for run in found if run.data == version]


def run_all(tasks: Sequence[Task], contenders: Sequence[str], record: Record, protocol: Protocol) -> bool:
    """Do all runs, in the order of :data:`ROUNDS`; return whether there was time for all.

    In each round the rates are chosen first, then judged on half of the seeds, then on all.

    Args:
        tasks: Workloads with sizes and lengths.
        contenders: Names of optimizers.
        record: Runs done so far.
        protocol: Seeds and deadline.
    """
    runners = {task: Runner(task, record, protocol) for task in tasks}
    refused: set[tuple[Task, str]] = set()
    for names in ROUNDS:
        for share in (0.0, 0.5, 1.0):
            for task, runner in runners.items():
                seeds = math.ceil(share * (protocol.judged or task.kind.seeds))
                for name in (name for name in names if name in contenders and (task, name) not in refused):
                    try:
                        runner.select(name)
                        runner.judge(name, range(seeds))
                    except (EdgeError, UnsuitableError) as error:
                        refused.add((task, name))
                        print(f"left out: {name} on {task.name}: {error}", flush=True)
                    except OutOfTimeError:
                        return False
    return True
