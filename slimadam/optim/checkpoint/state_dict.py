"""The state dicts of an optimizer: what it saves, and what it takes over."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Monitor
from slimadam.optim.checkpoint import format
from slimadam.optim.checkpoint.conversion import full_state
from slimadam.optim.checkpoint.loading import check_saved, loaded_state, merged_groups
from slimadam.optim.registry import Registry
from slimadam.optim.step.options import NOT_IN_ADAMW
from slimadam.optim.step.param_groups import Held, named_parameters
from slimadam.plans.auto import AutoPlan, Measuring
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import DECIDED_BEFORE, check_factored_amsgrad
from slimadam.state import second_moment
from slimadam.state.first_moment import FIRST_MOMENTS, with_own_keys
from slimadam.state.rule import Rule, Source, fit_rules
from slimadam.utils.dtensor import differing, on_any_rank

# Torch's Adam has the option, and AdamW's groups the key, from 2.7 on.
_DECOUPLED = {key: True for key in ("decoupled_weight_decay",) if key in inspect.signature(torch.optim.Adam).parameters}


class Taken(NamedTuple):
    """Everything that a state dict brings to an optimizer.

    Attributes:
        groups: The optimizer's groups with the saved options.
        owners: Name, parameter and group by key of ``state``.
        state: The saved state of each parameter.
        rules: The rules in force afterwards.
        measuring: The measurement of ``plan="auto"`` that goes on.
        monitor: The samples.
    """

    groups: list[dict[str, Any]]
    owners: dict[Any, Held]
    state: Mapping[Any, Any]
    rules: dict[str, list[Rule]]
    measuring: Measuring | None
    monitor: Monitor | None

    def check_on_all_ranks(self) -> None:
        """Check that all ranks which share a parameter load the same. Collective.

        Raises:
            RuntimeError: Names the parameter.
        """
        params = [param for _, param, _ in self.owners.values()]
        if on_any_rank(False, params):
            raise RuntimeError("another rank cannot load its state dict, and says why; this optimizer is as it was")
        name = differing(self._described())
        if on_any_rank(name is not None, params):
            raise RuntimeError(
                f"{name or 'a parameter of other ranks'!r}: ranks that share it were given state dicts of which that "
                "parameter's steps, entries, their layout or its rules differ; pass the same one on every rank; this "
                "optimizer is as it was"
            )

    def _described(self) -> Iterator[tuple[str, Tensor, str]]:
        for saved_id, (name, param, _) in self.owners.items():
            saved = self.state.get(saved_id, {})
            stored = [(key, saved[key]) for key in FIRST_MOMENTS if key in saved]
            for kind in second_moment.SECOND_MOMENTS:
                stored += [(kind, part) for part in second_moment.saved_moments(saved, self.rules[name], kind)]
            tensors = [
                (key, tuple(part.shape), str(part.dtype), str(getattr(part, "placements", None)))
                for key, part in stored
            ]
            rules = [(rule.form, rule.dims, rule.batch_dims, key_of(name, rule.part)) for rule in self.rules[name]]
            yield name, param, repr((float(saved.get("step", 0)), tensors, rules))

    def loaded_state(self) -> dict[Any, Any]:
        """Return the state by parameter as the optimizer keeps it; tensors are copies."""
        state: dict[Any, Any] = defaultdict(dict)
        with torch.inference_mode(False):  # else of no use once that mode has ended
            for saved_id, saved in self.state.items():
                if saved and saved_id not in self.owners:
                    state[saved_id] = deepcopy(saved)
            for saved_id, (name, param, group) in self.owners.items():
                loaded = loaded_state(name, self.rules[name], param, group, self.state.get(saved_id, {}))
                if loaded:
                    state[param] = loaded
        return state


def add_plan(saved: dict[str, Any], registry: Registry) -> None:
    """Add the plan and a format version to a state dict of torch's optimizer.

    A group with second moments that are not kept in full says ``fused=None``: AdamW's fused kernels would take the
    state for its own, and write past it. Dtypes become text, because torch gathers and broadcasts none.

    Args:
        saved: What ``torch.optim.Optimizer.state_dict()`` returned; written.
        registry: Names and rules.
    """
    for names, group in zip(registry.names, saved["param_groups"], strict=True):
        if any(rule.form != "full" for name in names for rule in registry.rules.get(name, ())):
            group["fused"] = None
        if isinstance(group.get("momentum_dtype"), torch.dtype):
            group["momentum_dtype"] = str(group["momentum_dtype"])
    own = {"format_version": format.FORMAT_VERSION, "plan": registry.plan.to_dict()}
    if registry.measuring is not None:
        own["measuring"] = registry.measuring.to_dict()
    elif registry.monitor is not None:
        own["monitor"] = registry.monitor.state_dict()
    saved[format.KEY] = own


def as_adamw(packed: Mapping[str, Any], registry: Registry, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a state dict that ``torch.optim.AdamW`` loads, with every second moment in full.

    Args:
        packed: What ``torch.optim.Optimizer.state_dict()`` returned.
        registry: Names and rules.
        groups: The parameter groups.
    """
    state = {
        index: full_state(param, registry.rules.get(name, ()), packed["state"][index])
        for index, (name, param, _) in enumerate(named_parameters(registry.names, groups))
        if index in packed["state"]
    }
    return {
        "state": state,
        "param_groups": [
            {**{key: value for key, value in group.items() if key not in NOT_IN_ADAMW}, **_DECOUPLED}
            for group in packed["param_groups"]
        ],
    }


def taken_over(state_dict: Mapping[str, Any], registry: Registry, present: Sequence[dict[str, Any]]) -> Taken:
    """Return what an optimizer takes over from a state dict; nothing is changed, and no other rank is asked.

    Args:
        state_dict: What ``state_dict()`` of SlimAdam, AdamW or Adam returned.
        registry: Names and rules of the optimizer.
        present: Its groups.

    Raises:
        ValueError, PlanError: The state dict does not fit.
    """
    format.check_layout(state_dict)
    saved_state = {
        key: with_own_keys(value) if isinstance(value, Mapping) else value for key, value in state_dict["state"].items()
    }
    groups = merged_groups(present, state_dict["param_groups"])
    owners = {
        saved_id: (name, param, group)
        for names, group, saved in zip(registry.names, groups, state_dict["param_groups"], strict=True)
        for name, param, saved_id in zip(names, group["params"], saved["params"], strict=True)
    }
    own = state_dict.get(format.KEY) or {}
    rules, measuring = _phase(own, registry, present)
    for saved_id, (name, param, _) in owners.items():
        if is_lazy(param) and saved_state.get(saved_id):
            raise ValueError(
                f"{name!r} has no shape yet (a lazy module's), but the state dict has state for it; run a forward "
                "pass before loading"
            )
    owners = {saved_id: held for saved_id, held in owners.items() if not is_lazy(held[1])}
    for saved_id, (name, param, group) in owners.items():
        for rule in rules[name]:
            check_factored_amsgrad(name, rule, group)
        check_saved(name, rules[name], param, group, saved_state.get(saved_id, {}))
    monitor = None
    if registry.monitor is not None:
        monitor = Monitor(registry.monitor.cutoff)
        if measuring is None:
            for name, param, _ in registry.parameters(present):
                monitor.add(name, param, rules[name])
            if "monitor" in own:
                monitor.load_state_dict(own["monitor"])
    return Taken(groups, owners, saved_state, rules, measuring, monitor)


def _phase(
    own: Mapping[str, Any], registry: Registry, groups: Sequence[dict[str, Any]]
) -> tuple[dict[str, list[Rule]], Measuring | None]:
    """Return the rules and the phase under which to load.

    With ``plan="auto"`` those of the checkpoint; else the present ones, but for what ``expand()`` has changed.
    """
    if not own:
        return registry.rules, registry.measuring
    settings = registry.resolver.plan
    automatic = isinstance(settings, AutoPlan)
    saved = CompressionPlan.from_dict(own["plan"])
    rules = dict(registry.rules)
    for name, param, _ in registry.parameters(groups):
        found = [saved[key] for key in saved.keys_of(name)]
        expanded = any(rule.source == Source.EXPANDED for rule in [*found, *registry.rules[name]])
        if found and automatic and found[0].owner_shape not in (None, tuple(param.shape)):
            # Its saved state, where it has any, is refused with the remedy; without, it is as if newly added.
            rules[name] = [Rule(shape=tuple(param.shape), reason=DECIDED_BEFORE)]
        elif found and (automatic or expanded):
            rules[name] = fit_rules(name, found, tuple(param.shape))
    if not isinstance(settings, AutoPlan):
        return rules, registry.measuring
    if "measuring" not in own:
        return rules, None
    measured = CompressionPlan.of_parameters(registry.measured)
    return rules, Measuring.from_dict(settings, own["measuring"], measured)
