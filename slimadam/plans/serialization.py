"""Plans to JSON and back. What is read is untrusted: every value is checked, nothing is evaluated."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from slimadam.layers.splits import Part
from slimadam.measurement.history import MAX_NAME_LENGTH, MAX_SIZE
from slimadam.state.rule import FACTORED, MAX_NDIM, Candidate, Rule, Source, normalize_candidate, source_of_reason
from slimadam.utils.errors import PlanError, shown

_FORMAT: Final = "slimadam.plan"
_VERSION: Final = 1
_MAX_FILE_BYTES = 64 << 20
_MAX_SHAPE_LENGTH = 64
_KEYS = {"form", "dims", "shape", "role", "reason", "source", "snr", "part", "batch_dims", "fan_in"}


def read_json(path: str | Path) -> object:
    """Read a file that may hold a plan.

    Raises:
        PlanError: It cannot be read, or is not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise PlanError(f"{path}: larger than 64 MiB, so it is no plan; pass a file that plan.save() wrote")
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
    except PlanError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot be read as a JSON plan ({error})") from error


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise PlanError(f"{shown(twice)} appears twice in one object; keep one of them")
    return found


def _refuse_constant(constant: str) -> None:
    raise PlanError(f'{constant} is not JSON; write infinite SNRs as "infinity"')


def plan_to_dict(rules: Mapping[str, Rule], cutoff: float | None) -> dict[str, Any]:
    """Return a plan as JSON-compatible data.

    Args:
        rules: The rules by key.
        cutoff: The SNR cutoff that they were chosen with, if any.
    """
    data: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    if cutoff is not None:
        data["cutoff"] = cutoff
    return data | {"parameters": {name: rule_to_dict(rule) for name, rule in rules.items()}}


def plan_from_dict(data: object) -> tuple[dict[str, Rule], float | None]:
    """Return rules and cutoff from the data of :func:`plan_to_dict`, or from the authors' rules.

    Raises:
        PlanError: The data is not a plan.
    """
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a JSON object, not {shown(data)}")
    if not data:
        raise PlanError("the plan is empty; calibrate a model to get one")
    if "format" not in data or not isinstance(data["format"], str):
        return {name: _rule_of_authors(name, value) for name, value in data.items()}, None
    if data["format"] != _FORMAT:
        raise PlanError(f"format={shown(data['format'])}: expected {_FORMAT!r}")
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version != _VERSION:
        raise PlanError(
            f"version={shown(version)}: this release reads version {_VERSION}; update slimadam or calibrate again"
        )
    _check_keys("the plan", data, {"format", "version", "cutoff", "parameters"})
    parameters, cutoff = data.get("parameters"), data.get("cutoff")
    if not isinstance(parameters, dict):
        raise PlanError(f"parameters={shown(parameters)}: expected an object of rules by parameter name")
    if cutoff is not None and not (_is_nonnegative_number(cutoff) and cutoff < math.inf):
        raise PlanError(f"cutoff={shown(cutoff)}: expected a number >= 0")
    rules = {name: _rule_from_dict(name, value) for name, value in parameters.items()}
    return rules, None if cutoff is None else float(cutoff)


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as JSON-compatible data."""
    part = rule.part
    data = {
        "form": rule.form,
        "dims": [*rule.dims] or None,
        "shape": None if rule.shape is None else [*rule.shape],
        "part": part and {"of": [*part.of], "view": [*part.view], "dim": part.dim, "start": part.start},
        "fan_in": [*rule.fan_in] or None,
        "batch_dims": rule.batch_dims or None,
        "role": rule.role or None,
        "reason": rule.reason or None,
        "source": Source(rule.source).value,
        "snr": [
            {
                "candidate": candidate if candidate == FACTORED else [*candidate],
                "value": value if math.isfinite(value) else "infinity",
            }
            for candidate, value in rule.snr.items()
            if not math.isnan(value)
        ]
        or None,
    }
    return {key: value for key, value in data.items() if value is not None}


def _rule_from_dict(name: str, data: object) -> Rule:
    _check_name(name)
    if not isinstance(data, dict):
        raise PlanError(f"{name!r}: {shown(data)} is not a rule; expected an object with 'form'")
    _check_keys(repr(name), data, _KEYS)
    shape = None if data.get("shape") is None else _integers(name, "shape", data["shape"], MAX_SIZE, _MAX_SHAPE_LENGTH)
    for key in ("role", "reason"):
        if not isinstance(data.get(key, ""), str):
            raise PlanError(f"{name!r}: {key}={shown(data[key])} must be text")
    reason, form = data.get("reason", ""), data.get("form")
    if not isinstance(form, str):
        raise PlanError(f"{name!r}: form={shown(form)} must be 'full', 'mean' or 'factored'")
    source = data.get("source", source_of_reason(reason))
    if source not in list(Source):
        raise PlanError(f"{name!r}: source={shown(source)} must be one of {[one.value for one in Source]}")
    return Rule(
        dims=tuple(sorted(_integers(name, "dims", data.get("dims", []), MAX_NDIM - 1))),
        form=form,  # type: ignore[arg-type]  # checked by the plan's constructor
        shape=shape,
        snr=_snr_from_list(name, data.get("snr", []), MAX_NDIM if shape is None else len(shape)),
        reason=reason,
        role=data.get("role", ""),
        part=None if data.get("part") is None else _part_from_dict(name, data["part"], shape),
        fan_in=tuple(sorted(_integers(name, "fan_in", data.get("fan_in", []), MAX_NDIM - 1))),
        batch_dims=_integer(name, "batch_dims", data.get("batch_dims", 0), MAX_NDIM - 2),
        source=Source(source),
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
        if not _is_nonnegative_number(value):
            raise PlanError(f"{name!r}: SNR {shown(value)} must be a number >= 0 or 'infinity'")
        try:
            found[normalize_candidate(item["candidate"], ndim)] = float(value)
        except ValueError as error:
            raise PlanError(f"{name!r}: {error}") from error
    return found


def _rule_of_authors(name: str, value: object) -> Rule:
    _check_name(name)
    numbers = [] if value is None else [value] if isinstance(value, int) and not isinstance(value, bool) else value
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


def _is_nonnegative_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= math.inf and not (isinstance(value, int) and value > 1 << 1000)


def _check_keys(where: str, data: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown key {shown(unknown[0])}; known are {sorted(known)}")
