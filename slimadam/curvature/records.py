"""One measurement of a run as a row: of a CSV file, of a dict of scalars, of a state dict."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from slimadam.curvature.critical import SharpnessMeasurement
from slimadam.curvature.probe.bracketing import Status
from slimadam.utils.errors import shown


@dataclass(frozen=True)
class SharpnessRow:
    """What was measured at a step; see :class:`~slimadam.SharpnessMeasurement`.

    Attributes:
        step: Optimizer steps taken before the measurement.
        sharpness: ``2 / critical_lr``.
        critical_lr: The smallest learning rate of the pending update that raises the loss.
        lower: The end of the bracket where the loss does not rise.
        upper: The end where it does.
        forward_passes: Calls of the closure.
        loss: At the parameters.
        lr: The learning rate at that step.
        threshold: Where the edge of stability lies; None: no formula for the optimizer.
        status: Whether anything was found, or why not.
        task: Whose loss it is; empty for the loss that is trained on.
    """

    step: int
    sharpness: float
    critical_lr: float
    lower: float
    upper: float
    forward_passes: int
    loss: float
    lr: float
    threshold: float | None
    status: Status
    task: str = ""

    @classmethod
    def of(cls, step: int, measured: SharpnessMeasurement) -> SharpnessRow:
        """The row of a measurement."""
        lower, upper = measured.bracket
        return cls(
            step=step,
            sharpness=measured.sharpness,
            critical_lr=measured.critical_lr,
            lower=lower,
            upper=upper,
            forward_passes=measured.forward_passes,
            loss=measured.loss,
            lr=measured.lr,
            threshold=measured.threshold,
            status=measured.status,
            task=measured.task,
        )

    @property
    def found(self) -> bool:
        """Whether there is a crossing."""
        return self.status in ("found", "noisy")

    def as_dict(self) -> dict[str, float]:
        """Scalars for W&B, TensorBoard and the like: ``sharpness/critical`` and so on; with a task, after its name.

        What is NaN or infinite is left out, because not every tool takes it; ``sharpness/found`` says whether
        a crossing was found.
        """
        prefix = f"sharpness/{self.task}/" if self.task else "sharpness/"
        scalars = {
            "critical": self.sharpness,
            "critical_lr": self.critical_lr,
            "lower": self.lower,
            "upper": self.upper,
            "loss": self.loss,
            "lr": self.lr,
            "threshold": math.nan if self.threshold is None else self.threshold,
            "forward_passes": float(self.forward_passes),
            "found": float(self.found),
        }
        return {prefix + name: value for name, value in scalars.items() if math.isfinite(value)}

    def cells(self) -> list[str]:
        """The row of a CSV file: numbers in full precision, a missing threshold empty."""
        values = (getattr(self, name) for name in COLUMNS)
        return ["" if value is None else str(value) for value in values]


COLUMNS = tuple(field.name for field in fields(SharpnessRow))
_NUMBERS = ("sharpness", "critical_lr", "lower", "upper", "loss", "lr")


def row_from(values: Mapping[str, Any]) -> SharpnessRow:
    """A row from its values by column, numbers or text.

    Raises:
        ValueError: A column is missing, or a value is not what belongs there.
    """
    if set(values) != set(COLUMNS):
        raise ValueError(f"has the columns {shown(list(values))}, not {','.join(COLUMNS)}")
    if values["status"] not in get_args(Status):
        raise ValueError(f"has the status {shown(values['status'])}, not one of {', '.join(get_args(Status))}")
    threshold = values["threshold"]
    return SharpnessRow(
        step=int(values["step"]),
        forward_passes=int(values["forward_passes"]),
        threshold=None if threshold in (None, "") else float(threshold),
        status=values["status"],
        task=str(values["task"]),
        **{name: float(values[name]) for name in _NUMBERS},
    )


def read_csv(path: str | Path) -> list[SharpnessRow]:
    """The measurements that a :class:`~slimadam.SharpnessLogger` wrote, in the order of their steps.

    A step that was measured again, by a run that resumed from before it, counts once: as it was measured last.

    Args:
        path: The file.

    Raises:
        ValueError: It is no such file; the message names the line.
        OSError: It cannot be read.
    """
    check_csv(Path(path))
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        _check_header(next(reader, []), path)
        rows: dict[tuple[int, str], SharpnessRow] = {}
        for cells in reader:
            try:
                row = row_from(dict(zip(COLUMNS, cells, strict=True)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            rows[row.step, row.task] = row
    return sorted(rows.values(), key=lambda row: row.step)


def append_csv(path: Path, rows: list[SharpnessRow]) -> None:
    """Add rows to a file, with the header in front where there is none yet; all is on disk when it returns.

    Raises:
        ValueError: The file holds something else.
        OSError: It cannot be written.
    """
    is_new = check_csv(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)


def check_csv(path: Path) -> bool:
    """Whether the file is still to begin; one that holds something else is refused.

    Raises:
        ValueError: The file's first line is not the header, its last line is not whole, or its folder is missing.
        OSError: It cannot be read.
    """
    if not path.parent.is_dir():
        raise ValueError(f"csv={str(path)!r}: there is no folder {str(path.parent)!r}; create it first")
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", errors="replace")
        file.seek(-1, 2)
        ends_whole = file.read(1) == b"\n"
    _check_header(next(csv.reader([header]), []), path)
    if not ends_whole:
        raise ValueError(f"csv={str(path)!r}: its last line is cut off; end or remove that line, or name another file")
    return False


def _check_header(header: list[str], path: str | Path) -> None:
    if tuple(header) != COLUMNS:
        raise ValueError(
            f"csv={str(path)!r}: the file begins with {shown(','.join(header))}, not with {','.join(COLUMNS)}; "
            "name another file, or move this one away"
        )
