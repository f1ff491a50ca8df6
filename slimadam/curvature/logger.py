"""Critical sharpness over a run: measured every so many steps, kept, and written to files and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed
from torch.optim import Optimizer

from slimadam.curvature.critical import CriticalSharpness
from slimadam.curvature.probe.line import Closure
from slimadam.curvature.records import SharpnessRow, append_csv, check_csv, row_from

Log = Callable[[dict[str, float], int], object]
"""Takes scalars by name and the step, as ``wandb.log`` does."""


class _ScalarWriter(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class SharpnessLogger:
    """Measures critical sharpness every ``every`` steps of a training loop.

    Call :meth:`step` in each step, after ``backward()`` and clipping and before ``optimizer.step()``. A row's step is
    how many updates its parameters have seen. Of several ranks all must call it; all measure, and rank 0 writes.

    Example:
        >>> logger = SharpnessLogger(optimizer, every=100, csv="sharpness.csv", log=wandb.log)  # doctest: +SKIP
        >>> for batch in data:  # doctest: +SKIP
        ...     loss_of(batch).backward()
        ...     logger.step(lambda: loss_of(batch))
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Args:
        optimizer: The optimizer, or a :class:`~slimadam.CriticalSharpness` with settings of its own.
        every: Measure in steps 0, ``every``, ``2 every``, ...
        csv: A file to which each row is added when it is measured. One that a logger wrote is continued.
        log: Called with a row's scalars and its step, such as ``wandb.log``.
        writer: Each scalar goes to its ``add_scalar``, as of a TensorBoard ``SummaryWriter``.

    Attributes:
        probe: The measuring object.
        rows: All measurements so far.
        steps: Training steps seen so far.

    Raises:
        TypeError: ``log`` or ``writer`` cannot be called.
        ValueError: ``every`` is out of range, or the file holds something else.
    """

    def __init__(
        self,
        optimizer: Optimizer | CriticalSharpness,
        every: int = 100,
        *,
        csv: str | Path | None = None,
        log: Log | None = None,
        writer: _ScalarWriter | None = None,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r} must be an integer >= 1")
        if log is not None and not callable(log):
            raise TypeError(f"log={log!r} must be a function of a dict of scalars and the step, such as wandb.log")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer={writer!r} must have add_scalar(tag, value, step), as a SummaryWriter has")
        self.probe = optimizer if isinstance(optimizer, CriticalSharpness) else CriticalSharpness(optimizer)
        self.rows: list[SharpnessRow] = []
        self.steps = 0
        self._every = every
        self._csv = None if csv is None else Path(csv)
        self._log = log
        self._writer = writer
        if self._csv is not None:
            check_csv(self._csv)

    @property
    def is_due(self) -> bool:
        """True where the coming :meth:`step` measures."""
        return self.steps % self._every == 0

    def step(self, closure: Closure | Mapping[str, Closure]) -> list[SharpnessRow]:
        """Count a training step, and measure in it if one is due.

        Args:
            closure: Computes the loss on the batch of the pending gradient, forward only. A dict measures several
                tasks' losses along the same update, each under its name.

        Returns:
            One row for each task measured in this step; where nothing was found its ``status`` says why.

        Raises:
            RuntimeError: No gradient is pending.
            TypeError: A closure does not return a number.
        """
        measured = self.measure(closure) if self.is_due else []
        self.steps += 1
        return measured

    def measure(self, closure: Closure | Mapping[str, Closure]) -> list[SharpnessRow]:
        """Measure now, in whatever step; counts none. Arguments, results and errors are those of :meth:`step`."""
        tasks = closure if isinstance(closure, Mapping) else {"": closure}
        measured = [SharpnessRow.of(self.steps, self.probe.measure(loss, task=task)) for task, loss in tasks.items()]
        self.rows += measured
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
            return measured
        if self._csv is not None:
            append_csv(self._csv, measured)
        for row in measured:
            if self._log is not None:
                self._log(row.as_dict(), row.step)
            if self._writer is not None:
                for tag, value in row.as_dict().items():
                    self._writer.add_scalar(tag, value, row.step)
        return measured

    def plot(self, path: str | Path) -> None:
        """Draw sharpness over the steps, with ``2 / lr`` and the edge-of-stability threshold, to a picture file.

        Needs the extra ``slimadam[cli]``.

        Raises:
            ImportError: matplotlib is missing; the extra ``slimadam[cli]`` brings it.
            ValueError: Nothing has been measured.
        """
        from slimadam.curvature.plots import draw_run

        draw_run(self.rows, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, all rows, and where the next search begins; numbers and strings only."""
        return {"steps": self.steps, "rows": [asdict(row) for row in self.rows], "probe": self.probe.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`. A file is only added to; reading it counts repeated steps once.

        Raises:
            ValueError: It is no state dict of this class.
        """
        try:
            rows = [row_from(row) for row in state_dict["rows"]]
            steps = int(state_dict["steps"])
            self.probe.load_state_dict(state_dict["probe"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state_dict is not one of a SharpnessLogger: {error!r}") from error
        self.rows, self.steps = rows, steps
