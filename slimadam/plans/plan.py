"""Compression plans: for each parameter, how finely its second moment is stored, and why."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from slimadam.layers.fused_weights import pieces_of_target
from slimadam.layers.names import is_position
from slimadam.layers.roles import canonical_name
from slimadam.layers.splits import Piece, Split, check_parts, key_of, owner_of
from slimadam.measurement.history import SNRHistory
from slimadam.plans.expected_loss import Expectation, expectation
from slimadam.plans.selection import Forms, choose
from slimadam.plans.serialization import plan_from_dict, plan_to_dict, read_json
from slimadam.plans.transfer import rules_for_model
from slimadam.state.rule import Rule, check_rule, factored_rule, in_order, paper_rule
from slimadam.utils.atomic_write import write_whole
from slimadam.utils.errors import PlanError

logger = logging.getLogger("slimadam")

SCHEMA_PATH = Path(__file__).with_name("plan.schema.json")


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
        kept = sum(rule.stored_elements(rule.shape) for rule in self.values() if rule.shape is not None)
        return kept, sum(math.prod(rule.shape) for rule in self.values() if rule.shape is not None)

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
        index: dict[str, list[str]] = {}
        for key, rule in self._rules.items():
            if rule.part is not None:
                owner = owner_of(key, rule.part)
                for name in {owner, canonical_name(owner)}:
                    index.setdefault(name, []).append(key)
        return index

    @cached_property
    def _by_canonical_name(self) -> Mapping[str, list[str]]:
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

        With a budget instead: save at least that share of all second moments at the least loss (elements over SNR).

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
        rules = choose(history, cutoff, budget, forms, keep)
        return cls(rules, cutoff=float(cutoff) if budget is None else None)

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
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-compatible data."""
        return plan_to_dict(self._rules, self.cutoff)

    @classmethod
    def from_dict(cls, data: object) -> CompressionPlan:
        """Read the data of :meth:`to_dict`, or the authors' rules.

        Raises:
            PlanError: The data is not a plan.
        """
        rules, cutoff = plan_from_dict(data)
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
