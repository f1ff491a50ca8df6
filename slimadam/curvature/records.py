"""A measurement of a run as a row: of a CSV file, of a dict of scalars, of a state dict."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from slimadam.curvature.critical import SharpnessMeasurement
from slimadam.curvature.probe.bracketing import Status
from slimadam.utils.errors import shown


@dataclass(frozen=True)
class SharpnessRow:
    """The measurement of a step; see :class:`~slimadam.SharpnessMeasurement`.

    Attributes:
        step: Optimizer steps taken before the measurement.
        sharpness: ``2 / critical_lr``.
        critical_lr: The smallest learning rate of the pending update that raises the loss.
        lower: The end of the bracket where the loss does not rise.
        upper: The end where it does.
        forward_passes: Calls of the closure.
        loss: The loss at the parameters.
        lr: The learning rate at that step.
        threshold: Where the edge of stability lies; None: no formula for the optimizer.
        status: Whether anything was found, or why not.
        task: The name of the loss; empty for the loss that is trained on.
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
        """Return the row of a measurement.

        Args:
            step: Optimizer steps taken before it.
            measured: The measurement.
        """
        lower, upper = measured.bracket
        same = {name: value for name, value in vars(measured).items() if name in COLUMNS}
        return cls(step=step, lower=lower, upper=upper, **same)

    @property
    def found(self) -> bool:
        """True where a crossing was found."""
        return self.status in ("found", "noisy")

    def as_dict(self) -> dict[str, float]:
        """Return scalars for W&B, TensorBoard and the like: ``sharpness/critical`` and so on.

        With a task, its name comes after ``sharpness/``. NaN and infinity are left out, because not every tool takes
        them; ``sharpness/found`` says whether a crossing was found.
        """
        prefix = f"sharpness/{self.task}/" if self.task else "sharpness/"
        names = ("critical_lr", "lower", "upper", "loss", "lr", "threshold", "forward_passes", "found")
        scalars = {"critical": self.sharpness, **{name: getattr(self, name) for name in names}}
        return {
            prefix + name: float(value) for name, value in scalars.items() if value is not None and math.isfinite(value)
        }

    def cells(self) -> list[str]:
        """Return the row of a CSV file: numbers in full precision, a missing threshold empty."""
        return ["" if value is None else str(value) for value in astuple(self)]


COLUMNS = tuple(field.name for field in fields(SharpnessRow))
_FROM_TEXT = {"step": int, "forward_passes": int, "status": str, "task": str}


def row_from(values: Mapping[str, Any]) -> SharpnessRow:
    """Return the row of values by column, numbers or text.

    Raises:
        TypeError: A number is neither.
        ValueError: Columns are missing or unknown, or a value is none of its column.
    """
    if set(values) != set(COLUMNS):
        raise ValueError(f"has the columns {shown(list(values))}, not {','.join(COLUMNS)}")
    if values["status"] not in get_args(Status):
        raise ValueError(f"has the status {shown(values['status'])}, not one of {', '.join(get_args(Status))}")
    threshold = values["threshold"]
    read: dict[str, Any] = {name: _FROM_TEXT.get(name, float)(values[name]) for name in COLUMNS if name != "threshold"}
    return SharpnessRow(threshold=None if threshold in (None, "") else float(threshold), **read)


def read_csv(path: str | Path) -> list[SharpnessRow]:
    """Return the measurements that a :class:`~slimadam.SharpnessLogger` wrote, in the order of their steps.

    A step that was measured again, by a run that resumed from before it, counts once: as it was measured last.

    Raises:
        ValueError: The file holds something else; the message names the line.
        OSError: It cannot be read.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        if check_csv(Path(path)):
            raise ValueError(f"csv={str(path)!r}: the file is empty")
        reader = csv.reader(file)
        next(reader)
        rows: dict[tuple[int, str], SharpnessRow] = {}
        for cells in reader:
            try:
                row = row_from(dict(zip(COLUMNS, cells, strict=True)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            rows[row.step, row.task] = row
    return sorted(rows.values(), key=lambda row: row.step)


def append_csv(path: Path, rows: Sequence[SharpnessRow]) -> None:
    """Add rows to a file, with the header in front where there is none yet; all is on disk when it returns.

    Args:
        path: The file.
        rows: The rows.

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
    """Return whether the file is still to begin.

    Raises:
        ValueError: The first line is not the header, the last line is not complete, or the folder is missing.
        OSError: The file cannot be read.
    """
    if not path.parent.is_dir():
        raise ValueError(f"csv={str(path)!r}: there is no folder {str(path.parent)!r}; create it first")
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        header = file.readline().decode("utf-8", errors="replace")
        file.seek(-1, 2)
        is_complete = file.read(1) == b"\n"
    if tuple(next(csv.reader([header]), ())) != COLUMNS:
        raise ValueError(
            f"csv={str(path)!r}: the file begins with {shown(header.strip())}, not with {','.join(COLUMNS)}; name "
            "another file, or move this one away"
        )
    if not is_complete:
        raise ValueError(f"csv={str(path)!r}: its last line is cut off; end or remove that line, or name another file")
    return False
