"""Rules to JSON and back. What is read is untrusted: every value is checked, nothing is evaluated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from slimadam.layers.splits import Part
from slimadam.measurement.history import MAX_NAME_LENGTH, MAX_SIZE
from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, Rule, normalize_candidate
from slimadam.utils.errors import PlanError, shown

_MAX_SHAPE_LENGTH = 64


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """A rule as JSON-compatible data."""
    data: dict[str, Any] = {"form": rule.form}
    if rule.dims:
        data["dims"] = list(rule.dims)
    if rule.shape is not None:
        data["shape"] = list(rule.shape)
    if rule.part is not None:
        part = rule.part
        data["part"] = {"of": list(part.of), "view": list(part.view), "dim": part.dim, "start": part.start}
    if rule.fan_in:
        data["fan_in"] = list(rule.fan_in)
    if rule.batch_dims:
        data["batch_dims"] = rule.batch_dims
    if rule.role:
        data["role"] = rule.role
    if rule.reason:
        data["reason"] = rule.reason
    if rule.snr:
        data["snr"] = [
            {
                "candidate": candidate if candidate == FACTORED else list(candidate),
                "value": value if math.isfinite(value) else "infinity",
            }
            for candidate, value in rule.snr.items()
            if not math.isnan(value)
        ]
    return data


def rule_from_dict(name: str, data: object) -> Rule:
    """The inverse of :func:`rule_to_dict`; raises :class:`PlanError` for anything else."""
    _check_name(name)
    if not isinstance(data, dict):
        raise PlanError(f"{name!r}: {shown(data)} is not a rule; expected an object with 'form'")
    no_unknown_keys(
        repr(name), data, {"form", "dims", "shape", "role", "reason", "snr", "part", "batch_dims", "fan_in"}
    )
    shape = None if data.get("shape") is None else _integers(name, "shape", data["shape"], MAX_SIZE, _MAX_SHAPE_LENGTH)
    for key in ("role", "reason"):
        if not isinstance(data.get(key, ""), str):
            raise PlanError(f"{name!r}: {key}={shown(data[key])} must be text")
    form = data.get("form")
    if not isinstance(form, str):
        raise PlanError(f"{name!r}: form={shown(form)} must be 'full', 'mean' or 'factored'")
    return Rule(
        dims=tuple(sorted(_integers(name, "dims", data.get("dims", []), MAX_NDIM - 1))),
        form=form,  # type: ignore[arg-type]  # checked by the plan's constructor
        shape=shape,
        snr=_snr_from_list(name, data.get("snr", []), MAX_NDIM if shape is None else len(shape)),
        reason=data.get("reason", ""),
        role=data.get("role", ""),
        part=None if data.get("part") is None else _part_from_dict(name, data["part"], shape),
        fan_in=tuple(sorted(_integers(name, "fan_in", data.get("fan_in", []), MAX_NDIM - 1))),
        batch_dims=_integer(name, "batch_dims", data.get("batch_dims", 0), MAX_NDIM - 2),
    )


def _part_from_dict(name: str, data: object, shape: tuple[int, ...] | None) -> Part:
    label = name.rpartition("[")[2].removesuffix("]")
    if not isinstance(data, dict) or set(data) != {"of", "view", "dim", "start"}:
        raise PlanError(f"{name!r}: part={shown(data)} must have 'of', 'view', 'dim' and 'start'")
    of, view = (_integers(name, key, data[key], MAX_SIZE) for key in ("of", "view"))
    dim = _integer(name, "dim", data["dim"], MAX_NDIM - 1)
    if shape is None or dim >= len(shape):
        raise PlanError(f"{name!r}: a part needs its 'shape', with the dimension {dim} along which the parts lie")
    return Part(label, of, view, dim, _integer(name, "start", data["start"], MAX_SIZE), shape[dim])


def _snr_from_list(name: str, data: object, ndim: int) -> dict[Candidate, float]:
    if not isinstance(data, list) or len(data) > 2**MAX_NDIM:
        raise PlanError(f"{name!r}: snr={shown(data)} must be a list of candidates with their values")
    found: dict[Candidate, float] = {}
    for item in data:
        if not isinstance(item, dict) or set(item) != {"candidate", "value"}:
            raise PlanError(f"{name!r}: snr entry {shown(item)} must have 'candidate' and 'value'")
        value = math.inf if item["value"] == "infinity" else item["value"]
        if not is_nonnegative_number(value):
            raise PlanError(f"{name!r}: SNR {shown(value)} must be a number >= 0 or 'infinity'")
        try:
            found[normalize_candidate(item["candidate"], ndim)] = float(value)
        except ValueError as error:
            raise PlanError(f"{name!r}: {error}") from error
    return found


def rule_of_authors(name: str, value: object) -> Rule:
    """A rule from the authors' format, a list of dimensions or null."""
    _check_name(name)
    if value is None:
        return Rule(reason="taken from a rules file")
    numbers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    dims = tuple(sorted(_integers(name, "dims", numbers, MAX_NDIM - 1)))
    return Rule(dims, "mean" if dims else "full", reason="taken from a rules file")


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_LENGTH:
        raise PlanError(f"{shown(name)} is no parameter's name: longer than {MAX_NAME_LENGTH} characters")


def _integers(name: str, key: str, value: object, largest: int, longest: int = MAX_NDIM) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > longest:
        raise PlanError(f"{name!r}: {key}={shown(value)} must be a list of at most {longest} integers")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= largest:
            raise PlanError(f"{name!r}: {key}={shown(value)} must hold integers in 0..{largest}")
    return tuple(value)


def _integer(name: str, key: str, value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise PlanError(f"{name!r}: {key}={shown(value)} must be an integer in 0..{largest}")
    return value


def is_nonnegative_number(value: object) -> bool:
    """Whether a JSON value is a number >= 0, infinity included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= math.inf and not (isinstance(value, int) and value > 1 << 1000)


def no_unknown_keys(where: str, data: Mapping[str, object], known: set[str]) -> None:
    """Refuse keys that no rule or plan has, by :class:`PlanError`."""
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown key {shown(unknown[0])}; known are {sorted(known)}")


def object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """``object_pairs_hook`` of ``json.loads`` that refuses repeated names."""
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise PlanError(f"{shown(twice)} appears twice in one object; keep one of them")
    return found


def no_constant(constant: str) -> None:
    """``parse_constant`` of ``json.loads`` that refuses NaN and infinities."""
    raise PlanError(f'{constant} is not JSON; write infinite SNRs as "infinity"')
