"""Signal-to-noise ratio of second moments, and its history over training.

Source: Kalra et al., "When Can You Get Away with Low Memory Adam?" (arXiv 2503.01843), equation for
``SNR_K``; the factored form judges Shazeer & Stern's row-column product (arXiv 1804.04235) on the same scale.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from slimadam.errors import PlanError

Candidate = tuple[int, ...] | Literal["factored"]
"""Dimensions to average over, or ``"factored"`` for row and column averages."""

FACTORED: Final = "factored"
CONSTANT_RELATIVE_VARIANCE = 1e-28
MAX_NDIM = 8
CSV_COLUMNS = ("step", "key", "shape", "compress_dims", "snr")
_MAX_CSV_BYTES = 1 << 30
_MAX_STEP = 1 << 53
_INTEGER_TUPLE = re.compile(r"(?:torch\.Size)?[\d\s,()\[\]]*")


def dimension_subsets(ndim: int) -> list[tuple[int, ...]]:
    """All non-empty subsets of ``range(ndim)``, smallest first.

    Example:
        >>> dimension_subsets(2)
        [(0,), (1,), (0, 1)]
    """
    dims = range(ndim)
    return [subset for size in range(1, ndim + 1) for subset in itertools.combinations(dims, size)]


def snr(v: Tensor, dims: int | Sequence[int] | Literal["factored"]) -> float:
    """Signal-to-noise ratio of a second moment for one way of compressing it.

    ``SNR_K(v)`` is the mean over the remaining dimensions of ``mean_K(v)**2 / var_K(v)`` with the population
    variance (arXiv 2503.01843). For ``"factored"`` it is ``mean(f)**2 / var(f)`` of the residual
    ``f = v * mean(v) / (r c)``, where ``r`` averages over all dimensions but the first and ``c`` over the
    first; entries whose row or column is zero are left out.

    Slices that are constant lose nothing by being averaged and are left out of the outer mean.

    Args:
        v: Second moment, any shape, real or complex (real and imaginary parts count as a last dimension
            that is kept). Computed in float64.
        dims: Dimension or dimensions to average over, negative ones counted from the end, or ``"factored"``
            (at least two dimensions).

    Returns:
        The ratio; infinity if every slice is constant; NaN if ``v`` has a NaN or infinite entry.

    Raises:
        ValueError: ``dims`` is empty, repeated or out of range.
    """
    subset = normalize_candidate(dims, v.dim())
    return _snr_of_scaled(_scaled(v), subset)


def measure(v: Tensor) -> dict[Candidate, float]:
    """SNR of every candidate of one second moment, in the order of :func:`dimension_subsets`.

    Args:
        v: Second moment of any shape.

    Returns:
        Each candidate's SNR; ``"factored"`` is among them from two dimensions on. Empty for scalars, and for
        more than 8 dimensions, which have too many subsets.
    """
    if v.dim() > MAX_NDIM:
        return {}
    scaled = _scaled(v)
    wanted: list[Candidate] = [*dimension_subsets(v.dim())]
    if v.dim() >= 2:
        wanted.append(FACTORED)
    return {candidate: _snr_of_scaled(scaled, candidate) for candidate in wanted}


def normalize_candidate(dims: object, ndim: int) -> Candidate:
    """``dims`` as a sorted tuple of non-negative dimensions, or ``"factored"``.

    Raises:
        ValueError: ``dims`` is not a non-empty set of dimensions of an ``ndim``-dimensional tensor.
    """
    if dims == FACTORED:
        if ndim < 2:
            raise ValueError(f"dims='factored' needs at least two dimensions, the tensor has {ndim}")
        return FACTORED
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = (dims,)
    if not isinstance(dims, Sequence) or isinstance(dims, str) or not dims:
        raise ValueError(f"dims={dims!r} must be a dimension, a non-empty sequence of them, or 'factored'")
    for dim in dims:
        if not isinstance(dim, int) or isinstance(dim, bool) or not -ndim <= dim < ndim:
            raise ValueError(f"dims={dims!r}: {dim!r} is not a dimension of a {ndim}-dimensional tensor")
    subset = tuple(sorted(dim % ndim for dim in dims))
    if len(set(subset)) != len(subset):
        raise ValueError(f"dims={dims!r} names a dimension twice")
    return subset


def _scaled(v: Tensor) -> Tensor:
    """``v`` in float64 with its largest entry at 1, so that squares of tiny moments do not underflow."""
    v = torch.view_as_real(v) if v.is_complex() else v
    v = v.detach().to(torch.float64)
    if v.numel() == 0:
        return v
    largest = v.amax()
    return v / largest if largest > 0 else v + 0 * largest


def _snr_of_scaled(v: Tensor, candidate: Candidate) -> float:
    if v.numel() == 0:
        return math.inf
    if candidate == FACTORED:
        v, dims = _residual(v)
        if v.numel() == 0:
            return math.inf
    else:
        dims = candidate
    variance, mean = torch.var_mean(v, dim=dims, correction=0)
    signal = mean * mean
    varies = ~(variance <= CONSTANT_RELATIVE_VARIANCE * signal)
    if not bool(varies.any()):
        return math.inf
    return float((signal[varies] / variance[varies]).mean())


def _residual(v: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``v * mean(v) / (r c)`` as a vector, without entries whose row or column is zero."""
    matrix = v.reshape(v.shape[0], -1)
    product = matrix.mean(1, keepdim=True) * matrix.mean(0, keepdim=True)
    kept = ~(product == 0)
    return matrix[kept] * matrix.mean() / product[kept], (0,)


@dataclass
class ParameterSNR:
    """What was measured of one parameter.

    Attributes:
        shape: Shape of the parameter.
        role: What the parameter is (:mod:`slimadam.roles`), empty when not known.
        values: For each measured optimizer step (from 1), the SNR of each candidate.
    """

    shape: tuple[int, ...]
    role: str = ""
    values: dict[int, dict[Candidate, float]] = field(default_factory=dict)

    def series(self, candidate: Candidate) -> list[tuple[int, float]]:
        """``(step, snr)`` of one candidate, in the order of the steps."""
        return [(step, self.values[step][candidate]) for step in sorted(self.values)
                if candidate in self.values[step]]  # fmt: skip

    def average(self) -> dict[Candidate, float]:
        """The plain mean over the measured steps of each candidate's SNR.

        NaN measurements (non-finite gradients) are left out. A step at which every slice was constant says
        nothing about noise, so infinity counts only if it is all there is.
        """
        collected: dict[Candidate, list[float]] = {}
        for measured in self.values.values():
            for candidate, value in measured.items():
                if not math.isnan(value):
                    collected.setdefault(candidate, []).append(value)
        return {candidate: _mean_of_finite(values) for candidate, values in collected.items()}


def _mean_of_finite(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.inf


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
    ) -> None:
        """Add one measurement.

        Args:
            step: Optimizer step, from 1.
            name: Qualified name of the parameter.
            shape: Shape of the parameter.
            values: SNR of each measured candidate.
            role: What the parameter is, where known.

        Raises:
            ValueError: The parameter was recorded before with another shape.
        """
        shape = tuple(int(size) for size in shape)
        parameter = self._parameters.setdefault(name, ParameterSNR(shape, role))
        if parameter.shape != shape:
            raise ValueError(f"{name!r} was recorded with shape {parameter.shape}, now with {shape}")
        if values:
            parameter.values.setdefault(int(step), {}).update(values)

    def forget_if_reshaped(self, name: str, shape: Sequence[int]) -> None:
        """Drop what was recorded under a name if the parameter has another shape now: it is another parameter."""
        if name in self._parameters and self._parameters[name].shape != tuple(shape):
            del self._parameters[name]

    def save_csv(self, path: str | Path) -> None:
        """Write one row per measurement: ``step,key,shape,compress_dims,snr``."""
        with Path(path).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            for name, parameter in self.items():
                for step, measured in sorted(parameter.values.items()):
                    for candidate, value in measured.items():
                        writer.writerow([step, name, parameter.shape, candidate, repr(value)])

    @classmethod
    def load_csv(cls, path: str | Path) -> SNRHistory:
        """Read measurements written by :meth:`save_csv` or by the authors' own analysis code.

        Args:
            path: A CSV file with the columns ``step,key,shape,compress_dims,snr``; others are ignored.

        Raises:
            PlanError: The file is not such a table; the message names the line.
        """
        path = Path(path)
        history = cls()
        try:
            if path.stat().st_size > _MAX_CSV_BYTES:
                raise PlanError(f"{path}: larger than 1 GiB, so it is no SNR history; pass the CSV of one run")
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                missing = [column for column in CSV_COLUMNS if column not in (reader.fieldnames or ())]
                if missing:
                    raise PlanError(f"{path}: columns {missing} are missing; expected {','.join(CSV_COLUMNS)}")
                for row in reader:
                    _read_row(history, row, f"{path}, line {reader.line_num}")
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise PlanError(f"{path}: cannot be read as CSV ({error})") from error
        return history


def _read_row(history: SNRHistory, row: Mapping[str, str | None], where: str) -> None:
    if not row["key"]:
        raise PlanError(f"{where}: key is empty; every row needs the parameter's name")
    shape = _integers(row["shape"], "shape", where)
    dims = row["compress_dims"]
    try:
        candidate = normalize_candidate(
            dims if dims == FACTORED else _integers(dims, "compress_dims", where), len(shape)
        )
        step, value = int(row["step"] or ""), float(row["snr"] or "")
        if not 0 <= step < _MAX_STEP or value < 0:
            raise ValueError(f"step={step}, snr={value} must be >= 0, and the step below 2**53")
        history.record(step, row["key"], shape, {candidate: value})
    except ValueError as error:
        raise PlanError(f"{where}: {row['key']!r}: {error}") from error


def _integers(text: str | None, column: str, where: str) -> tuple[int, ...]:
    well_formed = text is not None and len(text) <= 200 and _INTEGER_TUPLE.fullmatch(text.strip())
    numbers = tuple(int(number) for number in re.findall(r"\d+", text or "")) if well_formed else ()
    if not well_formed or len(numbers) > MAX_NDIM:
        raise PlanError(f"{where}: {column}={text!r} must be a tuple of at most {MAX_NDIM} integers")
    return numbers
