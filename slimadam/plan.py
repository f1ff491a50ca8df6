"""Compression plans: for each parameter, how finely its second moment is stored, and why.

Source of the rule: arXiv 2503.01843 (the candidate with the highest averaged SNR, if strictly above a cutoff).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

from torch import nn

from slimadam.errors import PlanError
from slimadam.files import write_whole
from slimadam.roles import (
    BIAS,
    NORM,
    ParameterRole,
    canonical_name,
    recommended_dims,
    role_from_name,
    roles_of,
)
from slimadam.snr import FACTORED, MAX_NDIM, Candidate, SNRHistory, normalize_candidate

Dims = tuple[int, ...]
Form = Literal["full", "mean", "factored"]
Forms = Literal["mean", "best"]

FORMAT: Final = "slimadam.plan"
FORMAT_VERSION: Final = 1
SCHEMA_PATH = Path(__file__).with_name("plan.schema.json")
_MAX_FILE_BYTES = 64 << 20
_MAX_SIZE = 1 << 62
_MAX_SHAPE_LENGTH = 64


@dataclass(frozen=True)
class Rule:
    """How one parameter's second moment is stored.

    Attributes:
        dims: Dimensions that share one value (``()`` unless ``form`` is ``"mean"``).
        form: ``"full"`` (as AdamW), ``"mean"`` (averaged over ``dims``) or ``"factored"`` (row and column
            averages, whose product stands in for the matrix).
        shape: Shape of the parameter, or None in rules that fit any shape.
        snr: The averaged SNR of each candidate that was measured.
        reason: Why, in words.
        role: What the parameter is.
    """

    dims: tuple[int, ...] = ()
    form: Form = "full"
    shape: tuple[int, ...] | None = None
    snr: Mapping[Candidate, float] = field(default_factory=dict)
    reason: str = ""
    role: str = ""

    def state_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the second-moment tensors for a parameter of the given shape.

        One tensor for ``"full"`` and ``"mean"`` (size 1 in ``dims``), two for ``"factored"``: the averages
        over all dimensions but the first, and over the first.
        """
        return tuple(reduced_shape(shape, dims) for dims in self.averaged_dims(len(shape)))

    def averaged_dims(self, ndim: int) -> tuple[tuple[int, ...], ...]:
        """For each second-moment tensor, the dimensions it is averaged over."""
        if self.form == FACTORED:
            return tuple(range(1, ndim)), (0,)
        return (self.dims,)

    def stored_elements(self, shape: tuple[int, ...]) -> int:
        """Second-moment elements kept for a parameter of the given shape."""
        return sum(math.prod(kept) for kept in self.state_shapes(shape))


def reduced_shape(shape: tuple[int, ...], dims: Iterable[int]) -> tuple[int, ...]:
    """``shape`` with size 1 in ``dims``."""
    dims = set(dims)
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


class CompressionPlan(Mapping[str, Rule]):
    """A mapping from parameter names to :class:`Rule`.

    Args:
        rules: The rule of each parameter.
        cutoff: The SNR cutoff that the rules were chosen with, if any.

    Raises:
        PlanError: A rule contradicts itself (a dimension out of range, a form that needs another shape).
    """

    def __init__(self, rules: Mapping[str, Rule], *, cutoff: float | None = None) -> None:
        for name, rule in rules.items():
            _check_rule(name, rule)
        self._rules = dict(rules)
        self.cutoff = cutoff

    def __getitem__(self, name: str) -> Rule:
        key = self.match(name)
        if key is None:
            raise KeyError(name)
        return self._rules[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompressionPlan):
            return NotImplemented
        return self._rules == other._rules and self.cutoff == other.cutoff

    def __hash__(self) -> int:
        return hash(tuple(self._rules))

    def __repr__(self) -> str:
        compressed = sum(rule.form != "full" for rule in self.values())
        return f"CompressionPlan({len(self)} parameters, {compressed} compressed)"

    @property
    def second_moments(self) -> tuple[int, int]:
        """Second-moment elements ``(kept, of AdamW)`` over the rules whose shape is known."""
        sized = [(rule, rule.shape) for rule in self.values() if rule.shape is not None]
        kept = sum(rule.stored_elements(shape) for rule, shape in sized)
        return kept, sum(math.prod(shape) for _, shape in sized)

    @property
    def second_moments_saved(self) -> float:
        """Share of AdamW's second-moment elements that the plan does without, in 0..1."""
        kept, full = self.second_moments
        return 1.0 - kept / full if full else 0.0

    def match(self, name: str) -> str | None:
        """The plan's own name for a parameter, whatever wrapper prefixes either side carries.

        Args:
            name: A parameter name, with or without ``_orig_mod.``, ``module.`` and the like.

        Returns:
            The key in this plan, or None. An exact match wins; an ambiguous one counts as none.
        """
        if name in self._rules:
            return name
        found = self._by_canonical_name.get(canonical_name(name), [])
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_canonical_name(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        for name in self._rules:
            index.setdefault(canonical_name(name), []).append(name)
        return index

    @classmethod
    def from_snr(
        cls,
        history: SNRHistory,
        cutoff: float = 1.0,
        *,
        forms: Forms = "mean",
        keep: Iterable[str] = (),
    ) -> CompressionPlan:
        """Choose for each parameter the candidate with the highest averaged SNR strictly above the cutoff.

        Vectors and norm scales are kept in full. Candidates that would save nothing are not considered;
        among equal SNRs the one that saves more wins.

        Args:
            history: The measurements.
            cutoff: SNR that a candidate must exceed.
            forms: ``"mean"``: only averages, as in the paper. ``"best"``: the factored form competes too.
            keep: Patterns (``fnmatch``) of names or roles that stay in full.

        Raises:
            ValueError: An option is out of range, or the history is empty.
        """
        check_choice(cutoff, forms)
        if not history:
            raise ValueError("the SNR history is empty: no Adam-like optimizer was measured")
        keep = tuple(keep)
        rules = {}
        for name, measured in history.items():
            role = measured.role or role_from_name(name, len(measured.shape))
            undecided = Rule(shape=measured.shape, snr=measured.average(), role=role)
            kept = next((pattern for pattern in keep if fnmatchcase(name, pattern) or role == pattern), None)
            rules[name] = _choose(undecided, float(cutoff), forms, kept)
        return cls(rules, cutoff=float(cutoff))

    @classmethod
    def from_rules(cls, model: nn.Module) -> CompressionPlan:
        """The paper's recommendations by layer role, without calibration (arXiv 2503.01843).

        Args:
            model: The model whose parameters the plan is for.
        """
        roles = roles_of(model)
        named = model.named_parameters()
        return cls({name: paper_rule(tuple(parameter.shape), roles[name]) for name, parameter in named})

    @classmethod
    def factored(cls, model: nn.Module) -> CompressionPlan:
        """Row and column averages for each matrix, without calibration (arXiv 1804.04235).

        Args:
            model: The model whose parameters the plan is for. Parameters with fewer than two dimensions and
                norm scales are kept in full.
        """
        roles = roles_of(model)
        named = model.named_parameters()
        return cls({name: factored_rule(tuple(parameter.shape), roles[name].role) for name, parameter in named})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (schema: ``slimadam/plan.schema.json``). Replaces the file in one move."""
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read a plan file, or rules in the authors' format ``{"name": [1], "other": null}``.

        Raises:
            PlanError: The file cannot be read or is not a plan; the message says where and why.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise PlanError(f"{path}: larger than 64 MiB, so it is no plan; pass a file that plan.save() wrote")
            data = json.loads(
                path.read_text(encoding="utf-8"),
                object_pairs_hook=_object_without_duplicates,
                parse_constant=_no_constant,
            )
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{path}: cannot be read as a JSON plan ({error})") from error
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-compatible data."""
        data: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION}
        if self.cutoff is not None:
            data["cutoff"] = self.cutoff
        data["parameters"] = {name: _rule_to_dict(rule) for name, rule in self.items()}
        return data

    @classmethod
    def from_dict(cls, data: object) -> CompressionPlan:
        """The inverse of :meth:`to_dict`; also takes the authors' rules.

        Raises:
            PlanError: The data is not a plan.
        """
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, not {_shown(data)}")
        if "format" not in data or not isinstance(data["format"], str):
            return cls({name: _rule_of_authors(name, value) for name, value in data.items()})
        if data["format"] != FORMAT:
            raise PlanError(f"format={_shown(data['format'])}: expected {FORMAT!r}")
        if data.get("version") != FORMAT_VERSION or isinstance(data["version"], bool):
            raise PlanError(
                f"version={_shown(data.get('version'))}: this release reads version {FORMAT_VERSION}; "
                "update slimadam or calibrate again"
            )
        _no_unknown_keys("the plan", data, {"format", "version", "cutoff", "parameters"})
        parameters = data.get("parameters")
        if not isinstance(parameters, dict):
            raise PlanError(f"parameters={_shown(parameters)}: expected an object of rules by parameter name")
        cutoff = data.get("cutoff")
        if cutoff is not None and not (_is_nonnegative_number(cutoff) and cutoff < math.inf):
            raise PlanError(f"cutoff={_shown(cutoff)}: expected a number >= 0")
        rules = {name: _rule_from_dict(name, value) for name, value in parameters.items()}
        return cls(rules, cutoff=None if cutoff is None else float(cutoff))


def paper_rule(shape: tuple[int, ...], role: ParameterRole) -> Rule:
    """The paper's recommendation for a role, where it has one and it saves anything."""
    dims = recommended_dims(role)
    if not dims:
        return Rule(shape=shape, role=role.role, reason=f"the paper has no rule for {role.role}")
    if math.prod(reduced_shape(shape, dims)) >= math.prod(shape):
        return Rule(shape=shape, role=role.role, reason="too small to save anything")
    return Rule(dims, "mean", shape, reason=f"the paper's rule for {role.role}", role=role.role)


def factored_rule(shape: tuple[int, ...], role: str) -> Rule:
    """The factored form where it saves anything, the full one elsewhere."""
    rule = Rule(form="factored", shape=shape, role=role, reason="every matrix factored, by choice")
    if len(shape) < 2 or role in (NORM, BIAS) or rule.stored_elements(shape) >= math.prod(shape):
        return Rule(shape=shape, role=role, reason="not a matrix that factoring makes smaller")
    return rule


def check_choice(cutoff: float, forms: str) -> None:
    """Check what a plan is chosen by.

    Raises:
        ValueError: An option is out of range.
    """
    if not isinstance(cutoff, (int, float)) or isinstance(cutoff, bool) or not 0 <= cutoff < math.inf:
        raise ValueError(f"cutoff={cutoff!r} must be a number >= 0")
    if forms not in get_args(Forms):
        raise ValueError(f"forms={forms!r} must be 'mean' or 'best'")


def fit_rule(name: str, rule: Rule, shape: tuple[int, ...]) -> Rule:
    """``rule`` checked against a parameter's actual shape.

    Raises:
        PlanError: The rule was made for another shape, or names a dimension the parameter lacks.
    """
    if rule.shape is not None and rule.shape != shape:
        raise PlanError(
            f"{name!r}: the plan is for shape {rule.shape}, the parameter has {shape}; "
            "calibrate this model, or carry the plan over with plan.for_model(model)"
        )
    fitted = replace(rule, shape=shape)
    _check_rule(name, fitted)
    return fitted


def _choose(rule: Rule, cutoff: float, forms: Forms, kept: str | None) -> Rule:
    shape = rule.shape or ()
    if kept is not None:
        return replace(rule, reason=f"kept in full as asked (keep={kept!r})")
    if len(shape) < 2:
        return replace(rule, reason="fewer than two dimensions: nothing worth saving")
    if rule.role in (NORM, BIAS):
        return replace(rule, reason=f"{rule.role}: never compressed by default")
    options = [
        (value, option)
        for candidate, value in rule.snr.items()
        if forms == "best" or candidate != FACTORED
        for option in (_rule_for_candidate(rule, candidate),)
        if option.stored_elements(shape) < math.prod(shape)
    ]
    if not options:
        return replace(rule, reason="no candidate was measured that would save anything")
    value, best = max(options, key=lambda option: (option[0], -option[1].stored_elements(shape)))
    label = describe_candidate(FACTORED if best.form == FACTORED else best.dims)
    if value > cutoff:
        return replace(best, reason=f"{label} has the highest SNR, {value:.3g}, above the cutoff {cutoff:g}")
    return replace(rule, reason=f"the highest SNR, {value:.3g} ({label}), is not above the cutoff {cutoff:g}")


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in words, for reports and reasons."""
    if candidate == FACTORED:
        return "row and column averages"
    return "averaging over dimension" + ("s " if len(candidate) > 1 else " ") + ", ".join(map(str, candidate))


def _rule_for_candidate(rule: Rule, candidate: Candidate) -> Rule:
    if candidate == FACTORED:
        return replace(rule, form="factored", dims=())
    return replace(rule, form="mean", dims=candidate)


def _check_rule(name: str, rule: Rule) -> None:
    if rule.form not in get_args(Form):
        raise PlanError(f"{name!r}: form={_shown(rule.form)} must be 'full', 'mean' or 'factored'")
    if bool(rule.dims) != (rule.form == "mean"):
        raise PlanError(f"{name!r}: form={rule.form!r} with dims={rule.dims}; only form='mean' has dims, and needs one")
    if any(not isinstance(dim, int) or isinstance(dim, bool) or not 0 <= dim < MAX_NDIM for dim in rule.dims):
        raise PlanError(f"{name!r}: dims={_shown(rule.dims)} must be dimensions in 0..{MAX_NDIM - 1}")
    if len(set(rule.dims)) != len(rule.dims):
        raise PlanError(f"{name!r}: dims={rule.dims} names a dimension twice")
    if rule.shape is None:
        return
    ndim = len(rule.shape)
    if any(dim >= ndim for dim in rule.dims):
        raise PlanError(f"{name!r}: dims={rule.dims} is out of range for shape {rule.shape}; use 0..{ndim - 1}")
    if rule.form == FACTORED and ndim < 2:
        raise PlanError(f"{name!r}: form='factored' needs two dimensions, the shape is {rule.shape}; use 'full'")


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"form": rule.form}
    if rule.dims:
        data["dims"] = list(rule.dims)
    if rule.shape is not None:
        data["shape"] = list(rule.shape)
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


def _rule_from_dict(name: str, data: object) -> Rule:
    if not isinstance(data, dict):
        raise PlanError(f"{name!r}: {_shown(data)} is not a rule; expected an object with 'form'")
    _no_unknown_keys(repr(name), data, {"form", "dims", "shape", "role", "reason", "snr"})
    shape = None if data.get("shape") is None else _integers(name, "shape", data["shape"], _MAX_SIZE, _MAX_SHAPE_LENGTH)
    for key in ("role", "reason"):
        if not isinstance(data.get(key, ""), str):
            raise PlanError(f"{name!r}: {key}={_shown(data[key])} must be text")
    form = data.get("form")
    if not isinstance(form, str):
        raise PlanError(f"{name!r}: form={_shown(form)} must be 'full', 'mean' or 'factored'")
    return Rule(
        dims=tuple(sorted(_integers(name, "dims", data.get("dims", []), MAX_NDIM - 1))),
        form=form,  # type: ignore[arg-type]  # checked by the plan's constructor
        shape=shape,
        snr=_snr_from_list(name, data.get("snr", []), MAX_NDIM if shape is None else len(shape)),
        reason=data.get("reason", ""),
        role=data.get("role", ""),
    )


def _snr_from_list(name: str, data: object, ndim: int) -> dict[Candidate, float]:
    if not isinstance(data, list) or len(data) > 2**MAX_NDIM:
        raise PlanError(f"{name!r}: snr={_shown(data)} must be a list of candidates with their values")
    found: dict[Candidate, float] = {}
    for item in data:
        if not isinstance(item, dict) or set(item) != {"candidate", "value"}:
            raise PlanError(f"{name!r}: snr entry {_shown(item)} must have 'candidate' and 'value'")
        value = math.inf if item["value"] == "infinity" else item["value"]
        if not _is_nonnegative_number(value):
            raise PlanError(f"{name!r}: SNR {_shown(value)} must be a number >= 0 or 'infinity'")
        try:
            found[normalize_candidate(item["candidate"], ndim)] = float(value)
        except ValueError as error:
            raise PlanError(f"{name!r}: {error}") from error
    return found


def _rule_of_authors(name: str, value: object) -> Rule:
    if value is None:
        return Rule(reason="taken from a rules file")
    numbers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    dims = tuple(sorted(_integers(name, "dims", numbers, MAX_NDIM - 1)))
    return Rule(dims, "mean" if dims else "full", reason="taken from a rules file")


def _integers(name: str, key: str, value: object, largest: int, longest: int = MAX_NDIM) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > longest:
        raise PlanError(f"{name!r}: {key}={_shown(value)} must be a list of at most {longest} integers")
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= largest:
            raise PlanError(f"{name!r}: {key}={_shown(value)} must hold integers in 0..{largest}")
    return tuple(value)


def _is_nonnegative_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= math.inf and not (isinstance(value, int) and value > 1 << 1000)


def _no_unknown_keys(where: str, data: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown key {_shown(unknown[0])}; known are {sorted(known)}")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise PlanError(f"{_shown(twice)} appears twice in one object; keep one of them")
    return found


def _no_constant(constant: str) -> None:
    raise PlanError(f'{constant} is not JSON; write infinite SNRs as "infinity"')


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
