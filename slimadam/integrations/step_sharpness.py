"""Critical sharpness on the loss of a step, computed again on its micro-batches with their own dropout masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.curvature.critical import CriticalSharpness
from slimadam.curvature.logger import Log, SharpnessLogger
from slimadam.curvature.probe.displacement import Memory
from slimadam.curvature.probe.line import Closure
from slimadam.curvature.probe.snapshot import RandomState


class StepSharpness:
    """Base of the callbacks: collects the losses of a step's micro-batches and measures on their sum.

    The arguments are those of the callbacks. ``logger`` exists from the beginning of training on.
    """

    logger: SharpnessLogger

    def __init__(
        self,
        every: int = 100,
        *,
        csv: str | Path | None = None,
        tasks: Mapping[str, Closure] | None = None,
        tol: float = 1 / 16,
        memory: Memory = "copy",
    ) -> None:
        self._every = every
        self._csv = csv
        self._tasks = dict(tasks or {})
        self._tol = tol
        self._memory: Memory = memory
        self._losses: list[Callable[[], Tensor]] = []
        self._unsupported: str | None = "training has not begun"

    def _supports(self, unsupported: str | None) -> bool:
        """Return whether anything can be measured, and warn of the reason why not."""
        self._unsupported = unsupported
        if unsupported is not None:
            warnings.warn(f"critical sharpness is not measured: {unsupported}", stacklevel=3)
        return unsupported is None

    def _begin(self, optimizer: Optimizer, log: Log) -> None:
        probe = CriticalSharpness(optimizer, self._tol, memory=self._memory)
        self.logger = SharpnessLogger(probe, self._every, csv=self._csv, log=log)

    def _record(self, loss: Callable[[], Tensor], module: nn.Module) -> None:
        """Add a micro-batch's share of the step's loss, to be computed again with the random numbers of now."""
        random = RandomState([param.device for param in module.parameters()])

        def again() -> Tensor:
            random.restore()
            return loss().detach()

        self._losses.append(again)

    def _measure(self) -> None:
        losses, self._losses = self._losses, []
        self.logger.measure({"": lambda: torch.stack([loss() for loss in losses]).sum(), **self._tasks})
