"""Compression plans: for each parameter, how finely its second moment is stored, and why."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from torch import nn

from slimadam.layers.fused_weights import pieces_of_target
from slimadam.layers.names import is_position
from slimadam.layers.roles import canonical_name
from slimadam.layers.splits import Piece, Split, key_of, owner_of
from slimadam.measurement.history import SNRHistory
from slimadam.plans.expected_loss import Expectation, expectation
from slimadam.plans.selection import (
    Forms,
    check_choice,
    check_keep,
    check_patterns_match,
    choose_by_budget,
    choose_by_cutoff,
    keep_full,
    keeps,
    measured_rules,
)
from slimadam.plans.serialization import (
    is_nonnegative_number,
    no_constant,
    no_unknown_keys,
    object_without_duplicates,
    rule_from_dict,
    rule_of_authors,
    rule_to_dict,
)
from slimadam.plans.transfer import rules_for_model
from slimadam.state.rule import Rule, check_rule, check_together, factored_rule, in_order, paper_rule
from slimadam.utils.atomic_write import write_whole
from slimadam.utils.errors import PlanError, shown

logger = logging.getLogger("slimadam")

FORMAT: Final = "slimadam.plan"
FORMAT_VERSION: Final = 1
SCHEMA_PATH = Path(__file__).with_name("plan.schema.json")
_MAX_FILE_BYTES = 64 << 20


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

    @property
    def expectation(self) -> Expectation | None:
        """What training with the plan will probably cost, from its SNRs; None where they were not measured."""
        return expectation(self.values())

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

    def keys_of(self, name: str) -> list[str]:
        """The plan's keys for a parameter: its own name, or those of its parts; empty if it has none.

        Args:
            name: A parameter name, with or without wrapper prefixes.
        """
        key = self.match(name)
        if key is not None and self._rules[key].part is None:
            return [key]
        return self._parts_by_owner.get(name) or self._parts_by_owner.get(canonical_name(name), [])

    def by_parameter(self) -> dict[str, list[Rule]]:
        """The rules by parameter: one each, or one for each of its parts, in the order in which they lie in it."""
        found: dict[str, list[Rule]] = {}
        for key, rule in self._rules.items():
            found.setdefault(owner_of(key, rule.part), []).append(rule)
        return {name: in_order(rules) for name, rules in found.items()}

    @classmethod
    def of_parameters(cls, rules: Mapping[str, Iterable[Rule]], cutoff: float | None = None) -> CompressionPlan:
        """The inverse of :meth:`by_parameter`."""
        flat = {key_of(name, rule.part): rule for name, found in rules.items() for rule in found}
        return cls(flat, cutoff=cutoff)

    @cached_property
    def _parts_by_owner(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        for key, rule in self._rules.items():
            if rule.part is not None:
                owner = owner_of(key, rule.part)
                for name in {owner, canonical_name(owner)}:
                    index.setdefault(name, []).append(key)
        return index

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
        budget: float | None = None,
        forms: Forms = "mean",
        keep: Iterable[str] = (),
    ) -> CompressionPlan:
        """Choose for each parameter the candidate with the highest averaged SNR strictly above the cutoff.

        With a budget instead: save at least that share of all second moments at the least loss (elements over SNR), by
        :func:`slimadam.plans.selection.choose_by_budget`.

        Vectors and norm scales are kept in full. Candidates that would save nothing are not considered;
        among equal SNRs the one that saves more wins.

        Args:
            history: The measurements.
            cutoff: SNR that a candidate must exceed.
            budget: Share of all second moments to save, in 0..1; the cutoff is not used then.
            forms: ``"mean"``: only averages, as in the paper. ``"best"``: the factored form competes too.
            keep: Patterns (``fnmatch``) of names or roles that stay in full; a parameter's name keeps all its parts,
                ``"*.c_attn.weight[key]"`` one of them. What is in brackets at the end is always a part's label.

        Raises:
            ValueError: An option is out of range, a pattern of ``keep`` matches nothing, the budget cannot be met, or
                the history is empty.
        """
        check_choice(cutoff, forms, budget)
        keep = check_keep(keep)
        if not history:
            raise ValueError("the SNR history is empty: no Adam-like optimizer was measured")
        measured = measured_rules(history)
        check_patterns_match(keep, history)
        undecided, kept = {}, {}
        for key, rule in measured.items():
            names = history[key].all_names
            full = keep_full(rule, next((pattern for pattern in keep if keeps(pattern, key, rule, names)), None))
            if full is None:
                undecided[key] = rule
            else:
                kept[key] = full
        if budget is None:
            chosen = choose_by_cutoff(undecided, cutoff, forms)
        else:
            elements = sum(math.prod(parameter.shape) for parameter in history.values())
            chosen = choose_by_budget(undecided, elements, budget, forms)
        rules = {**kept, **chosen}
        return cls({name: rules[name] for name in history}, cutoff=float(cutoff) if budget is None else None)

    @classmethod
    def from_rules(cls, model: nn.Module) -> CompressionPlan:
        """The paper's recommendations by layer role, without calibration (arXiv 2503.01843).

        Args:
            model: The model whose parameters the plan is for.
        """
        return cls.by_piece(model, paper_rule)

    @classmethod
    def factored(cls, model: nn.Module) -> CompressionPlan:
        """Row and column averages for each matrix, without calibration (arXiv 1804.04235).

        Args:
            model: The model whose parameters the plan is for. Parameters with fewer than two dimensions and
                norm scales are kept in full.
        """
        return cls.by_piece(model, factored_rule)

    @classmethod
    def by_piece(
        cls, model: nn.Module, rule: Callable[[Piece], Rule], parts: Mapping[str, Split] | None = None
    ) -> CompressionPlan:
        """A plan with a rule for each logical matrix of a model.

        Args:
            model: The model whose parameters the plan is for.
            rule: Called with each :class:`~slimadam.layers.splits.Piece`.
            parts: How parameters fall into parts, by pattern, where the model does not say; as in :class:`AutoPlan`.
        """
        found = pieces_of_target(model, parts)
        return cls({key_of(name, piece.part): rule(piece) for name, pieces in found.items() for piece in pieces})

    def for_model(self, model: nn.Module, parts: Mapping[str, Split] | None = None) -> CompressionPlan:
        """This plan carried over to another depth or width of the same family of models.

        Layers are matched by role. With a cutoff each candidate's SNR is averaged over the layers of a role and decides
        anew, as the paper averages its rules over depth (arXiv 2503.01843); a plan by budget, or without measurements,
        carries over the most common rule of each role. What has no counterpart here stays in full, and says so.

        Args:
            model: The model that the new plan is for.
            parts: What its parameters are made of, by pattern, where the model does not say; as in :class:`AutoPlan`.

        Raises:
            PlanError: No kind of layer is common to the plan and the model, or a pattern matches nothing.
        """
        return CompressionPlan(rules_for_model(self._rules, self.cutoff, model, parts), cutoff=self.cutoff)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON (schema: ``slimadam/plans/plan.schema.json``). Replaces the file in one move.

        One warning says if the names in it are only places in an optimizer that was given no names.
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
                raise PlanError(f"{path}: larger than 64 MiB, so it is no plan; pass a file that plan.save() wrote")
            data = json.loads(
                path.read_text(encoding="utf-8"),
                object_pairs_hook=object_without_duplicates,
                parse_constant=no_constant,
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
        data["parameters"] = {name: rule_to_dict(rule) for name, rule in self.items()}
        return data

    @classmethod
    def from_dict(cls, data: object) -> CompressionPlan:
        """The inverse of :meth:`to_dict`; also takes the authors' rules.

        Raises:
            PlanError: The data is not a plan.
        """
        if not isinstance(data, dict):
            raise PlanError(f"a plan is a JSON object, not {shown(data)}")
        if not data:
            raise PlanError("the plan is empty; calibrate a model to get one")
        if "format" not in data or not isinstance(data["format"], str):
            return cls({name: rule_of_authors(name, value) for name, value in data.items()})
        if data["format"] != FORMAT:
            raise PlanError(f"format={shown(data['format'])}: expected {FORMAT!r}")
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version != FORMAT_VERSION:
            raise PlanError(
                f"version={shown(version)}: this release reads version {FORMAT_VERSION}; "
                "update slimadam or calibrate again"
            )
        no_unknown_keys("the plan", data, {"format", "version", "cutoff", "parameters"})
        parameters = data.get("parameters")
        if not isinstance(parameters, dict):
            raise PlanError(f"parameters={shown(parameters)}: expected an object of rules by parameter name")
        cutoff = data.get("cutoff")
        if cutoff is not None and not (is_nonnegative_number(cutoff) and cutoff < math.inf):
            raise PlanError(f"cutoff={shown(cutoff)}: expected a number >= 0")
        rules = {name: rule_from_dict(name, value) for name, value in parameters.items()}
        plan = cls(rules, cutoff=None if cutoff is None else float(cutoff))
        for name, found in plan.by_parameter().items():
            check_together(name, found)
        return plan
