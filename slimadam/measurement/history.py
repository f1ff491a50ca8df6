"""The SNR of every parameter over training, and its CSV file, in which every cell is checked.

The columns are those of the authors of arXiv 2503.01843, ``step,key,shape,compress_dims,snr``. Further ones follow
where the parameters are known: the part (``of,view,dim,start``), ``batch_dims``, ``role`` and ``fan_in``.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from slimadam.layers.names import is_position
from slimadam.layers.splits import Part
from slimadam.measurement.snr import average_snr, measure
from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, Rule, normalize_candidate
from slimadam.utils.dtensor import full_tensor
from slimadam.utils.errors import PlanError, shown

CSV_COLUMNS = ("step", "key", "shape", "compress_dims", "snr")
MAX_NAME_LENGTH = 1000
MAX_SIZE = 1 << 62
_LAYOUT_COLUMNS = ("of", "view", "dim", "start", "batch_dims", "role", "fan_in")
_MAX_CSV_BYTES = 1 << 30
_MAX_STEP = 1 << 53
_INTEGER_TUPLE = re.compile(r"(?:torch\.Size)?[\d\s,()\[\]]*")


@dataclass
class ParameterSNR:
    """SNR measurements of one parameter.

    Attributes:
        shape: Shape of the parameter.
        role: Role of the parameter (:mod:`slimadam.layers.roles`), empty when not known.
        part: The part of a parameter that it is; None for a whole one.
        batch_dims: Number of leading dimensions that count separate matrices.
        fan_in: Dimensions that the forward pass sums over, where known.
        values: For each measured optimizer step (from 1), the SNR of each candidate.
        all_names: Every name of the parameter where it has several, as a tied one; not in the CSV file.
    """

    shape: tuple[int, ...]
    role: str = ""
    part: Part | None = None
    batch_dims: int = 0
    fan_in: tuple[int, ...] = ()
    values: dict[int, dict[Candidate, float]] = field(default_factory=dict)
    all_names: tuple[str, ...] = ()

    def series(self, candidate: Candidate) -> list[tuple[int, float]]:
        """Return ``(step, snr)`` of one candidate, in the order of the steps."""
        return [(step, found[candidate]) for step, found in sorted(self.values.items()) if candidate in found]

    def average(self) -> dict[Candidate, float]:
        """Return the mean over the measured steps of each candidate's SNR, as :func:`average_snr` takes it."""
        return average_snr(self.values.values())


class SNRHistory(Mapping[str, ParameterSNR]):
    """SNR measurements: per parameter, per measured step, per candidate.

    A mapping from parameter names to :class:`ParameterSNR`.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, ParameterSNR] = {}

    def __getitem__(self, name: str) -> ParameterSNR:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        return f"SNRHistory({len(self)} parameters, {len(self.steps)} measured steps)"

    @property
    def steps(self) -> list[int]:
        """The optimizer steps at which anything was measured, ascending."""
        return sorted({step for parameter in self.values() for step in parameter.values})

    def record(
        self,
        step: int,
        name: str,
        shape: Sequence[int],
        values: Mapping[Candidate, float],
        role: str = "",
        part: Part | None = None,
        batch_dims: int = 0,
        fan_in: tuple[int, ...] = (),
        all_names: Sequence[str] = (),
    ) -> None:
        """Add one measurement.

        Args:
            step: Optimizer step, from 1.
            name: Qualified name of the parameter.
            shape: Shape of the parameter.
            values: SNR of each measured candidate.
            role: Role of the parameter, where known.
            part: The part of a parameter that it is.
            batch_dims: Number of leading dimensions that count separate matrices.
            fan_in: Dimensions that the forward pass sums over, where known.
            all_names: Every name of the whole parameter, where known.

        Raises:
            ValueError: The parameter was recorded before with another shape.
        """
        shape = tuple(int(size) for size in shape)
        parameter = self._parameters.setdefault(name, ParameterSNR(shape, role, part, batch_dims, fan_in))
        if parameter.shape != shape:
            raise ValueError(f"{name!r} was recorded with shape {parameter.shape}, now with {shape}")
        if all_names:
            parameter.all_names = tuple(all_names)
        if values:
            parameter.values.setdefault(int(step), {}).update(values)

    def measure(self, step: int, key: str, rule: Rule, second_moment: Tensor | None, all_names: Sequence[str]) -> None:
        """Measure one parameter, or part, and add its SNR; drop measurements of another shape under its key.

        Args:
            step: Optimizer step, from 1.
            key: Name of the parameter or part.
            rule: Its rule, in full.
            second_moment: Second moment of the whole parameter; None to make it known without a measurement.
            all_names: Every name of the whole parameter, where known.
        """
        values = {} if second_moment is None else measure(rule.take(full_tensor(second_moment)), rule.batch_dims)
        self.add(step, key, rule, values, all_names)

    def add(self, step: int, key: str, rule: Rule, values: Mapping[Candidate, float], all_names: Sequence[str]) -> None:
        """Add one measurement of a parameter, or part; drop those of another shape under its key.

        Args:
            step: Optimizer step, from 1.
            key: Name of the parameter or part.
            rule: Its rule, in full.
            values: SNR of each measured candidate.
            all_names: Every name of the whole parameter, where known.
        """
        assert rule.shape is not None
        if key in self and self[key].shape != rule.shape:
            del self._parameters[key]
        self.record(step, key, rule.shape, values, rule.role, rule.part, rule.batch_dims, rule.fan_in, all_names)

    def rename(self, keys: Mapping[str, str]) -> None:
        """Give parameters other names at once; other measurements under the new names, or places, are dropped."""
        left = {name: found for name, found in self._parameters.items() if name not in keys and not is_position(name)}
        self._parameters = left | {keys[name]: found for name, found in self._parameters.items() if name in keys}

    def save_csv(self, path: str | Path) -> None:
        """Write one row per measurement to a file, with the further columns where any parameter has them."""
        known = any(one.part or one.batch_dims or one.role or one.fan_in for one in self.values())
        with Path(path).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow([*CSV_COLUMNS, *_LAYOUT_COLUMNS] if known else CSV_COLUMNS)
            for name, parameter in self.items():
                part = parameter.part
                place = [part.of, part.view, part.dim, part.start] if part else [""] * 4
                layout = [*place, parameter.batch_dims, parameter.role, parameter.fan_in or ""] if known else []
                for step, measured in sorted(parameter.values.items()):
                    for candidate, value in measured.items():
                        writer.writerow([step, name, parameter.shape, candidate, repr(value), *layout])

    @classmethod
    def load_csv(cls, path: str | Path) -> SNRHistory:
        """Read measurements written by :meth:`save_csv` or by the authors' own analysis code.

        Args:
            path: A CSV file with the columns ``step,key,shape,compress_dims,snr``; the further ones of
                :meth:`save_csv` are read where they are there, others are ignored.

        Raises:
            PlanError: The file is not such a table; the message names the line.
        """
        path = Path(path)
        history = cls()
        try:
            if path.stat().st_size > _MAX_CSV_BYTES:
                raise PlanError(f"{path}: larger than 1 GiB, so it is no SNR history; pass the CSV of one run")
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, strict=True)
                missing = [column for column in CSV_COLUMNS if column not in (reader.fieldnames or ())]
                if missing:
                    raise PlanError(f"{path}: columns {missing} are missing; expected {','.join(CSV_COLUMNS)}")
                for row in reader:
                    try:
                        _read_row(history, row)
                    except ValueError as error:
                        raise PlanError(f"{path}, line {reader.line_num}: {error}") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise PlanError(f"{path}: cannot be read as CSV ({error})") from error
        return history


def _read_row(history: SNRHistory, row: Mapping[str, str | None]) -> None:
    name, step, value = row["key"], row["step"], row["snr"]
    if not name or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"key={shown(name)} must be a parameter's name, neither empty nor longer than {MAX_NAME_LENGTH} characters"
        )
    try:
        cells = tuple(map(row.get, ("shape", "compress_dims", *_LAYOUT_COLUMNS)))
        shape, candidate, layout = _read_layout(name, cells)
        number, ratio = int(step or ""), float(value or "")
        if not 0 <= number < _MAX_STEP or ratio < 0:
            raise ValueError(f"step={shown(step)}, snr={shown(value)} must be >= 0, and the step below 2**53")
        history.record(number, name, shape, {candidate: ratio}, *layout)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


@functools.lru_cache(maxsize=4096)
def _read_layout(
    name: str, cells: tuple[str | None, ...]
) -> tuple[tuple[int, ...], Candidate, tuple[str, Part | None, int, tuple[int, ...]]]:
    """Return shape and candidate of a row, and the role, part, batch and input dimensions of its parameter."""
    shape_text, dims, of, view, dim, start, batch_dims, role, fan_in = cells
    shape = _integers("shape", shape_text)
    candidate = normalize_candidate(dims if dims == FACTORED else _integers("compress_dims", dims), len(shape))
    leading, inputs = int(batch_dims or 0), _integers("fan_in", fan_in) if fan_in else ()
    if not 0 <= leading <= max(0, len(shape) - 2):
        raise ValueError(f"batch_dims={leading} leaves less than a matrix of shape {shape}")
    if any(one >= len(shape) for one in inputs):
        raise ValueError(f"fan_in={inputs} must be dimensions of the shape {shape}")
    if len(role or "") > MAX_NAME_LENGTH:
        raise ValueError(f"role={shown(role)} must not be longer than {MAX_NAME_LENGTH} characters")
    part = None
    if of:
        along, first = int(dim or ""), int(start or "")
        label = name.rpartition("[")[2].removesuffix("]")
        if not 0 <= along < len(shape) or not 0 <= first <= MAX_SIZE or not name.endswith(f"[{label}]"):
            raise ValueError(f"dim={shown(dim)}, start={shown(start)} are not those of a part of shape {shape}")
        part = Part(label, _integers("of", of), _integers("view", view), along, first, shape[along])
        if along >= len(part.view) or part.shape != shape:
            raise ValueError(f"view={part.view} has no part of shape {shape} along dimension {along}")
    return shape, candidate, (role or "", part, leading, inputs)


def _integers(column: str, text: str | None) -> tuple[int, ...]:
    well_formed = text is not None and len(text) <= 200 and _INTEGER_TUPLE.fullmatch(text.strip())
    numbers = tuple(map(int, re.findall(r"\d+", text or ""))) if well_formed else ()
    if not well_formed or len(numbers) > MAX_NDIM or any(number > MAX_SIZE for number in numbers):
        raise ValueError(f"{column}={shown(text)} must be a tuple of at most {MAX_NDIM} integers up to 2**62")
    return numbers
