"""Compression plans: for each parameter, how finely its second moment is stored, and why.

A plan file is untrusted: every value is checked, nothing is evaluated.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from torch import nn

from slimadam.layers.name_patterns import canonical_name, key_of, owner_of
from slimadam.layers.names import is_position
from slimadam.layers.splits import Part, Piece, Split, check_parts, pieces_of_target
from slimadam.measurement.history import MAX_NAME_LENGTH, MAX_SIZE, SNRHistory
from slimadam.plans.expectation import Expectation, expectation
from slimadam.plans.selection import Forms, choose
from slimadam.plans.transfer import rules_for_model
from slimadam.state.rule import (
    FACTORED,
    MAX_NDIM,
    Candidate,
    Rule,
    Source,
    check_rule,
    factored_rule,
    in_order,
    normalize_candidate,
    paper_rule,
    source_of_reason,
)
from slimadam.utils.atomic_write import write_whole
from slimadam.utils.errors import PlanError, shown

logger = logging.getLogger("slimadam")

SCHEMA_PATH = Path(__file__).with_name("plan.schema.json")
_FORMAT: Final = "slimadam.plan"
_VERSION: Final = 1
_MAX_FILE_BYTES = 64 << 20
_MAX_SHAPE_LENGTH = 64
_KEYS = {"form", "dims", "shape", "role", "reason", "source", "snr", "part", "batch_dims", "fan_in"}


class CompressionPlan(Mapping[str, Rule]):
    """A mapping from parameter names to :class:`Rule`.

    A parameter that falls into logical parts has one rule for each, under its name with the part's label in brackets:
    ``plan["h.0.attn.c_attn.weight[query]"]``.

    Args:
        rules: The rule of each parameter.
        cutoff: The SNR cutoff that the rules were chosen with, if any.

    Raises:
        PlanError: A rule contradicts itself (a dimension out of range, a form that needs another shape).
    """

    def __init__(self, rules: Mapping[str, Rule], *, cutoff: float | None = None) -> None:
        for name, rule in rules.items():
            check_rule(name, rule)
        self._rules = dict(rules)
        self.cutoff = cutoff

    def __getitem__(self, name: str) -> Rule:
        key = self.match(name)
        if key is None:
            parts = self.keys_of(name)
            raise KeyError(f"{name}: the plan has its parts, {', '.join(parts)}" if parts else name)
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
        compressed = sum(not rule.is_full for rule in self.values())
        return f"CompressionPlan({len(self)} parameters, {compressed} compressed)"

    @property
    def second_moments(self) -> tuple[int, int]:
        """Second-moment elements ``(kept, of AdamW)`` over the rules whose shape is known."""
        shaped = [(rule, rule.shape) for rule in self.values() if rule.shape is not None]
        return sum(rule.stored_elements(shape) for rule, shape in shaped), sum(math.prod(shape) for _, shape in shaped)

    @property
    def second_moments_saved(self) -> float:
        """Share of AdamW's second-moment elements that the plan does without, in 0..1."""
        kept, full = self.second_moments
        return 1.0 - kept / full if full else 0.0

    @property
    def expectation(self) -> Expectation | None:
        """The outcome to expect of training with the plan, from its SNRs; None where they were not measured."""
        return expectation(self.values())

    def match(self, name: str) -> str | None:
        """Return the plan's key for a parameter, whatever wrapper prefixes (``_orig_mod.``) either side carries.

        An exact match wins; an ambiguous one counts as none.
        """
        if name in self._rules:
            return name
        found = self._by_canonical_name.get(canonical_name(name), [])
        return found[0] if len(found) == 1 else None

    def keys_of(self, name: str) -> list[str]:
        """Return the plan's keys for a parameter, with or without wrapper prefixes: its own, or those of its parts."""
        key = self.match(name)
        if key is not None and self._rules[key].part is None:
            return [key]
        return self._parts_by_owner.get(name) or self._parts_by_owner.get(canonical_name(name), [])

    def by_parameter(self) -> dict[str, list[Rule]]:
        """Return the rules by parameter: one each, or one for each of its parts, in the order of these."""
        found: defaultdict[str, list[Rule]] = defaultdict(list)
        for key, rule in self._rules.items():
            found[owner_of(key, rule.part)].append(rule)
        return {name: in_order(rules) for name, rules in found.items()}

    @classmethod
    def of_parameters(cls, rules: Mapping[str, Iterable[Rule]], cutoff: float | None = None) -> CompressionPlan:
        """Make a plan from what :meth:`by_parameter` returns.

        Args:
            rules: One rule for each parameter, or for each of its parts.
            cutoff: The SNR cutoff that they were chosen with, if any.
        """
        flat = {key_of(name, rule.part): rule for name, found in rules.items() for rule in found}
        return cls(flat, cutoff=cutoff)

    @cached_property
    def _parts_by_owner(self) -> Mapping[str, list[str]]:
        index = defaultdict(list)
        for key, rule in self._rules.items():
            if rule.part is not None:
                owner = owner_of(key, rule.part)
                for name in {owner, canonical_name(owner)}:
                    index[name].append(key)
        return index

    @cached_property
    def _by_canonical_name(self) -> Mapping[str, list[str]]:
        index = defaultdict(list)
        for name in self._rules:
            index[canonical_name(name)].append(name)
        return index

    @classmethod
    def from_snr(
        cls,
        history: SNRHistory,
        cutoff: float = 1.0,
        *,
        budget: float | None = None,
        forms: Forms = "mean",
        keep: Iterable[str] = (),
    ) -> CompressionPlan:
        """Choose a form for each parameter, by default the average with the highest SNR strictly above the cutoff.

        With a budget instead: save at least that share of all second moments at the least loss (elements over SNR).

        Vectors and norm scales are kept in full. Candidates that would save nothing are not considered;
        among equal SNRs the one that saves more wins.

        Args:
            history: The measurements.
            cutoff: SNR that a candidate must exceed.
            budget: Share of all second moments to save, in 0..1; the cutoff is not used then.
            forms: ``"mean"``: only averages, as in the paper. ``"best"``: row and column averages compete too.
                ``"closest"``: row and column averages where their SNR is above three times the cutoff (of embeddings,
                the cutoff), else the best other average above three times the cutoff, else one byte for each element.
                With a budget it is as ``"best"``.
            keep: Patterns (``fnmatch``) of names or roles that stay in full; a parameter's name keeps all its parts,
                ``"*.c_attn.weight[key]"`` one of them. What is in brackets at the end is always a part's label.

        Raises:
            ValueError: An option is out of range, a pattern of ``keep`` matches nothing, the budget cannot be met, or
                the history is empty.
        """
        return cls(choose(history, cutoff, budget, forms, keep), cutoff=float(cutoff) if budget is None else None)

    @classmethod
    def from_rules(cls, model: nn.Module) -> CompressionPlan:
        """Follow the paper's recommendations by layer role, without calibration (arXiv 2503.01843)."""
        return cls.by_piece(model, paper_rule)

    @classmethod
    def factored(cls, model: nn.Module) -> CompressionPlan:
        """Keep row and column averages of each matrix, without calibration (arXiv 1804.04235).

        Parameters with fewer than two dimensions and norm scales are kept in full.
        """
        return cls.by_piece(model, factored_rule)

    @classmethod
    def by_piece(
        cls, model: nn.Module, rule: Callable[[Piece], Rule], parts: Mapping[str, Split] | None = None
    ) -> CompressionPlan:
        """Make a plan with a rule for each logical matrix of a model.

        Args:
            model: The model whose parameters the plan is for.
            rule: Called with each :class:`~slimadam.layers.splits.Piece`.
            parts: The logical matrices in parameters, where the model does not say; as in :class:`AutoPlan`.
        """
        found = pieces_of_target(model, parts)
        return cls({key_of(name, piece.part): rule(piece) for name, pieces in found.items() for piece in pieces})

    def for_model(self, model: nn.Module, parts: Mapping[str, Split] | None = None) -> CompressionPlan:
        """Carry this plan over to another depth or width of the same family of models.

        Layers are matched by role. With a cutoff each candidate's SNR is averaged over the layers of a role and decides
        anew, as the paper averages its rules over depth (arXiv 2503.01843); a plan by budget, or without measurements,
        carries over the most common rule of each role. What has no counterpart here stays in full, and says so.

        Args:
            model: The model that the new plan is for.
            parts: The logical matrices in parameters, where the model does not say; as in :class:`AutoPlan`.

        Raises:
            PlanError: No kind of layer is common to the plan and the model, or a pattern matches nothing.
        """
        return CompressionPlan(rules_for_model(self._rules, self.cutoff, model, parts), cutoff=self.cutoff)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (schema: ``slimadam/plans/plan.schema.json``). Replaces the file in one move.

        Warns if the names in it are only places in an optimizer that was given no names.
        """
        positions = [key for key in self if is_position(key)]
        if positions:
            logger.warning(
                "%s: %d of %d names are positions (%s, ...), which fit only an optimizer of the same parameters in the "
                "same order; SlimAdam(model.named_parameters()) or model=model gives real names",
                path, len(positions), len(self), positions[0],
            )  # fmt: skip
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
                raise PlanError("larger than 64 MiB, so it is no plan; pass a file that plan.save() wrote")
            text = path.read_text(encoding="utf-8")
            data = json.loads(text, object_pairs_hook=_object_without_duplicates, parse_constant=_refuse_constant)
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: cannot be read as a JSON plan ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        data: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
        if self.cutoff is not None:
            data["cutoff"] = self.cutoff
        return data | {"parameters": {name: rule_to_dict(rule) for name, rule in self._rules.items()}}

    @classmethod
    def from_dict(cls, data: object) -> CompressionPlan:
        """Read the data of :meth:`to_dict`, or the authors' rules.

        Raises:
            PlanError: The data is not a plan.
        """
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, not {shown(data)}")
        if not data:
            raise PlanError("the plan is empty; calibrate a model to get one")
        if not isinstance(data.get("format"), str):
            return cls({name: _rule_of_authors(name, value) for name, value in data.items()})
        rules, cutoff = _checked_contents(data)
        plan = cls(rules, cutoff=cutoff)
        for name, found in plan.by_parameter().items():
            parts = [rule.part for rule in found if rule.part is not None]
            if parts and len(parts) != len(found):
                raise PlanError(
                    f"{name!r}: the plan has a rule for the whole parameter and one for its part; remove one"
                )
            if parts:
                check_parts(name, parts, parts[0].of)
        return plan


def rule_to_dict(rule: Rule) -> dict[str, Any]:
    """Return a rule as JSON-compatible data."""
    part = rule.part
    snr = []
    for key, value in rule.snr.items():
        if not math.isnan(value):
            candidate = key if key == FACTORED else [*key]
            snr.append({"candidate": candidate, "value": value if math.isfinite(value) else "infinity"})
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
        "snr": snr or None,
    }
    return {key: value for key, value in data.items() if value is not None}


def _checked_contents(data: dict[str, Any]) -> tuple[dict[str, Rule], float | None]:
    version, parameters, cutoff = (data.get(key) for key in ("version", "parameters", "cutoff"))
    if data["format"] != _FORMAT:
        raise PlanError(f"format={shown(data['format'])}: expected {_FORMAT!r}")
    if not _is_integer(version, _VERSION, _VERSION):
        raise PlanError(
            f"version={shown(version)}: this release reads version {_VERSION}; update slimadam or calibrate again"
        )
    _check_keys("the plan", data, {"format", "version", "cutoff", "parameters"})
    if not isinstance(parameters, dict):
        raise PlanError(f"parameters={shown(parameters)}: expected an object of rules by parameter name")
    if cutoff is not None and not (_is_nonnegative_number(cutoff) and cutoff < math.inf):
        raise PlanError(f"cutoff={shown(cutoff)}: expected a number >= 0")
    rules = {name: _rule_from_dict(name, value) for name, value in parameters.items()}
    return rules, None if cutoff is None else float(cutoff)


def _rule_from_dict(name: str, data: Any) -> Rule:
    _check_name(name)
    if not isinstance(data, dict):
        raise PlanError(f"{name!r}: {shown(data)} is not a rule; expected an object with 'form'")
    _check_keys(repr(name), data, _KEYS)
    shape = None if data.get("shape") is None else _integers(name, "shape", data["shape"], MAX_SIZE, _MAX_SHAPE_LENGTH)
    role, reason, form = data.get("role", ""), data.get("reason", ""), data.get("form")
    _check(isinstance(role, str), name, "role", role, "be text")
    _check(isinstance(reason, str), name, "reason", reason, "be text")
    _check(isinstance(form, str), name, "form", form, "be 'full', 'mean' or 'factored'")
    source = data.get("source", source_of_reason(reason))
    _check(source in list(Source), name, "source", source, f"be one of {[one.value for one in Source]}")
    return Rule(
        dims=tuple(sorted(_integers(name, "dims", data.get("dims", []), MAX_NDIM - 1))),
        form=form,  # type: ignore[arg-type]  # checked by the plan's constructor
        shape=shape,
        snr=_snr_from_list(name, data.get("snr", []), MAX_NDIM if shape is None else len(shape)),
        reason=reason,
        role=role,
        part=None if data.get("part") is None else _part_from_dict(name, data["part"], shape),
        fan_in=tuple(sorted(_integers(name, "fan_in", data.get("fan_in", []), MAX_NDIM - 1))),
        batch_dims=_integer(name, "batch_dims", data.get("batch_dims", 0), MAX_NDIM - 2),
        source=Source(source),
    )


def _part_from_dict(name: str, data: Any, shape: tuple[int, ...] | None) -> Part:
    is_part = isinstance(data, dict) and set(data) == {"of", "view", "dim", "start"}
    _check(is_part, name, "part", data, "have 'of', 'view', 'dim' and 'start'")
    of, view = (_integers(name, key, data[key], MAX_SIZE) for key in ("of", "view"))
    dim = _integer(name, "dim", data["dim"], MAX_NDIM - 1)
    if shape is None or dim >= len(shape):
        raise PlanError(f"{name!r}: a part needs its 'shape', with the dimension {dim} along which the parts lie")
    label = name.rpartition("[")[2].removesuffix("]")
    return Part(label, of, view, dim, _integer(name, "start", data["start"], MAX_SIZE), shape[dim])


def _snr_from_list(name: str, data: Any, ndim: int) -> dict[Candidate, float]:
    is_list = isinstance(data, list) and len(data) <= 2**MAX_NDIM
    _check(is_list, name, "snr", data, "be a list of candidates with their values")
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
    numbers = [] if value is None else [value] if isinstance(value, int) else value
    dims = tuple(sorted(_integers(name, "dims", numbers, MAX_NDIM - 1)))
    return Rule(dims, "mean" if dims else "full", reason="taken from a rules file")


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(f"{shown(key)} appears twice in one object; keep one of them")
        found[key] = value
    return found


def _refuse_constant(constant: str) -> None:
    raise PlanError(f'{constant} is not JSON; write infinite SNRs as "infinity"')


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_LENGTH:
        raise PlanError(f"{shown(name)} is no parameter's name: longer than {MAX_NAME_LENGTH} characters")


def _check_keys(where: str, data: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where}: unknown key {shown(unknown[0])}; known are {sorted(known)}")


def _check(fits: bool, name: str, key: str, value: object, expected: str) -> None:
    if not fits:
        raise PlanError(f"{name!r}: {key}={shown(value)} must {expected}")


def _integers(name: str, key: str, value: Any, largest: int, longest: int = MAX_NDIM) -> tuple[int, ...]:
    is_short_list = isinstance(value, list) and len(value) <= longest
    _check(is_short_list, name, key, value, f"be a list of at most {longest} integers")
    fits = all(_is_integer(number, 0, largest) for number in value)
    _check(fits, name, key, value, f"hold integers in 0..{largest}")
    return tuple(value)


def _integer(name: str, key: str, value: Any, largest: int) -> int:
    _check(_is_integer(value, 0, largest), name, key, value, f"be an integer in 0..{largest}")
    return int(value)


def _is_integer(value: object, least: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= largest


def _is_nonnegative_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value <= math.inf and not (isinstance(value, int) and value > 1 << 1000)
