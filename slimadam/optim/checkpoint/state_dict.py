"""The state dicts of an optimizer: what it saves, and what it takes over."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Monitor
from slimadam.optim.checkpoint import format
from slimadam.optim.checkpoint.conversion import full_state, in_present_format
from slimadam.optim.checkpoint.loading import as_kept, check_saved, loaded_state, merged_groups
from slimadam.optim.membership import Members
from slimadam.optim.step.param_groups import named_parameters
from slimadam.optim.step.stepper import Stepper
from slimadam.plans.auto import AutoPlan, Measuring
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import DECIDED_BEFORE, Resolver, check_factored_amsgrad
from slimadam.state import second_moment
from slimadam.state.rule import Rule, Source, fit_rules
from slimadam.utils.dtensor import differing, on_any_rank
from slimadam.utils.torch_private import disable_dynamo

# Torch's Adam has the option, and AdamW's groups the key, from 2.7 on.
_DECOUPLED = {key: True for key in ("decoupled_weight_decay",) if key in inspect.signature(torch.optim.Adam).parameters}


class _Taken(NamedTuple):
    """What is taken over from a state dict: ``owners`` are name, parameter and group by key of ``state``."""

    groups: list[dict[str, Any]]
    owners: dict[Any, tuple[str, Tensor, dict[str, Any]]]
    state: Mapping[Any, Any]
    rules: dict[str, list[Rule]]
    measuring: Measuring | None
    monitor: Monitor | None


def _described(taken: _Taken) -> Iterator[tuple[str, Tensor, str]]:
    """What must be the same on all ranks that share a parameter, for each of those in the state dict."""
    for saved_id, (name, param, _) in taken.owners.items():
        saved = taken.state.get(saved_id, {})
        tensors = [
            (key, tuple(part.shape), str(part.dtype), str(getattr(part, "placements", None)))
            for key in second_moment.FIRST_MOMENTS
            for part in ([saved[key]] if key in saved else [])
        ]
        tensors += [
            (kind, tuple(part.shape), str(part.dtype), str(getattr(part, "placements", None)))
            for kind in second_moment.SECOND_MOMENTS
            for part in second_moment.saved_moments(saved, taken.rules[name], kind)
        ]
        rules = [(rule.form, rule.dims, rule.batch_dims, key_of(name, rule.part)) for rule in taken.rules[name]]
        yield name, param, repr((float(saved.get("step", 0)), tensors, rules))


class Checkpointed(Optimizer):
    """The half of :class:`~slimadam.SlimAdam` that saves and loads its state."""

    _resolver: Resolver
    _names: list[list[str]]
    _members: Members
    _rules: dict[str, list[Rule]]
    _measured: dict[str, list[Rule]]
    _measuring: Measuring | None
    _monitor: Monitor | None
    _complete: bool
    _state_is_blank: bool
    _max_grad_norm: float | None
    _norms: dict[str, Tensor]
    _stepper: Stepper

    def _parameters(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, tensor and group of each parameter that has a shape."""
        self._follow_groups()
        found = named_parameters(self._names, self.param_groups)
        return (one for one in found if not is_lazy(one[1])) if self._members.holds_lazy else found

    def _follow_groups(self) -> None:
        """Take note of what has come to the groups, left them or was exchanged in them."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`, with the plan and a format version under ``"slimadam"``.

        The keys of a parameter's state are those of ``optimizer.state[param]``. A group with second moments that are
        not kept in full says ``fused=None``: AdamW's fused kernels would take the state for its own, and write past it.
        """
        self._follow_groups()
        saved = super().state_dict()
        for names, group in zip(self._names, saved["param_groups"], strict=True):
            if any(rule.form != "full" for name in names for rule in self._rules.get(name, ())):
                group["fused"] = None
            if isinstance(group.get("momentum_dtype"), torch.dtype):
                group["momentum_dtype"] = str(group["momentum_dtype"])  # torch gathers and broadcasts no dtypes
        saved[format.KEY] = {
            "format_version": format.FORMAT_VERSION,
            "plan": CompressionPlan.of_parameters(self._rules, self._resolver.chosen_by_cutoff).to_dict(),
        }
        if self._measuring is not None:
            saved[format.KEY]["measuring"] = self._measuring.to_dict()
        elif self._monitor is not None:
            saved[format.KEY]["monitor"] = self._monitor.state_dict()
        return saved

    def adamw_state_dict(self) -> dict[str, Any]:
        """A state dict that ``torch.optim.AdamW`` loads, with every second moment in full.

        Averages are broadcast back, factored ones multiplied out; moments take the parameter's dtype. Those of
        DTensors lie as their parameters do, and every rank must call.
        """
        self._follow_groups()
        packed = super().state_dict()
        state = {
            index: full_state(param, self._rules.get(name, ()), packed["state"][index])
            for index, (name, param, _) in enumerate(named_parameters(self._names, self.param_groups))
            if index in packed["state"]
        }
        own = ("variance_init", "momentum_dtype", "bf16_stochastic_round")
        groups = [
            {**{key: value for key, value in group.items() if key not in own}, **_DECOUPLED}
            for group in packed["param_groups"]
        ]
        return {"state": state, "param_groups": groups}

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SlimAdam, ``torch.optim.AdamW`` or ``torch.optim.Adam``.

        Full second moments are averaged by this optimizer's plan; none is cast to the parameter's dtype.
        First moments are stored as this optimizer's ``momentum_dtype`` says, whatever they were saved in.
        Tensors are copied. Options that the saved groups lack keep their present values. With DTensors among the
        parameters every rank must call; tensors of the state dict may lie otherwise, or be whole on every rank.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: Groups or shapes do not match, or a later release wrote it.
            PlanError: It was saved under another plan.
            RuntimeError: Another rank that holds shards of the same parameters has refused its state dict, or was
                given another one.
                The optimizer is as it was after any error.
        """
        try:
            taken = self._checked(state_dict)
        except Exception:
            on_any_rank(True, self._held())
            raise
        if on_any_rank(False, self._held()):
            raise RuntimeError("another rank cannot load its state dict, and says why; this optimizer is as it was")
        name = differing(_described(taken))
        if on_any_rank(name is not None, self._held()):
            raise RuntimeError(
                f"{name or 'a parameter of other ranks'!r}: ranks that share it were given state dicts of which that "
                "parameter's steps, entries, their layout or its rules differ; pass the same one on every rank; this "
                "optimizer is as it was"
            )
        state: dict[Any, Any] = defaultdict(dict)
        with torch.inference_mode(False):  # else of no use once that mode has ended
            for saved_id, saved in taken.state.items():
                if saved and saved_id not in taken.owners:
                    state[saved_id] = deepcopy(saved)
            for saved_id, (name, param, group) in taken.owners.items():
                loaded = loaded_state(name, taken.rules[name], param, group, taken.state.get(saved_id, {}))
                if loaded:
                    state[param] = loaded
        self._rules, self._measuring, self._monitor = taken.rules, taken.measuring, taken.monitor
        self._state_is_blank = False
        self.__setstate__({"state": state, "param_groups": taken.groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _held(self) -> Iterator[Tensor]:
        return (param for _, param, _ in self._parameters())

    def _checked(self, state_dict: dict[str, Any]) -> _Taken:
        """All that is taken over from a state dict; nothing has changed, and no other rank been asked."""
        format.check_is_mapping(state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        format.check_layout(state_dict)
        saved_state = {
            key: as_kept(value) if isinstance(value, Mapping) else value for key, value in state_dict["state"].items()
        }
        self._follow_groups()
        groups = merged_groups(self.param_groups, state_dict["param_groups"])
        owners = {
            saved_id: (name, param, group)
            for names, group, saved in zip(self._names, groups, state_dict["param_groups"], strict=True)
            for name, param, saved_id in zip(names, group["params"], saved["params"], strict=True)
        }
        own = state_dict.get(format.KEY) or {}
        rules, measuring = self._phase_of(own)
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
        monitor = self._loaded_monitor(rules, measuring, own)
        return _Taken(groups, owners, saved_state, rules, measuring, monitor)

    def _phase_of(self, own: Mapping[str, Any]) -> tuple[dict[str, list[Rule]], Measuring | None]:
        """Rules and phase under which to load.

        With ``plan="auto"`` those of the checkpoint; else the present ones, but for what ``expand()`` has changed.
        """
        if not own:
            return self._rules, self._measuring
        settings = self._resolver.plan
        automatic = isinstance(settings, AutoPlan)
        saved = CompressionPlan.from_dict(own["plan"])
        rules = dict(self._rules)
        for name, param, _ in self._parameters():
            found = [saved[key] for key in saved.keys_of(name)]
            expanded = any(rule.source == Source.EXPANDED for rule in [*found, *self._rules[name]])
            if found and automatic and found[0].owner_shape not in (None, tuple(param.shape)):
                # Its saved state, where it has any, is refused with the remedy; without, it is as if newly added.
                rules[name] = [Rule(shape=tuple(param.shape), reason=DECIDED_BEFORE)]
            elif found and (automatic or expanded):
                rules[name] = fit_rules(name, found, tuple(param.shape))
        if not isinstance(settings, AutoPlan):
            return rules, self._measuring
        if "measuring" not in own:
            return rules, None
        measured = CompressionPlan.of_parameters(self._measured)
        return rules, Measuring.from_dict(settings, own["measuring"], measured)

    def _loaded_monitor(
        self, rules: Mapping[str, list[Rule]], measuring: Measuring | None, own: Mapping[str, Any]
    ) -> Monitor | None:
        if self._monitor is None:
            return None
        monitor = Monitor(self._monitor.cutoff)
        if measuring is None:
            for name, param, _ in self._parameters():
                for rule in rules[name]:
                    monitor.add(key_of(name, rule.part), rule, param)
            if "monitor" in own:
                monitor.load_state_dict(own["monitor"])
        return monitor

    def __getstate__(self) -> dict[str, Any]:
        self._follow_groups()  # names and rules are those of the groups as they are
        return {
            **super().__getstate__(),
            "_names": self._names,
            "_rules": self._rules,
            "_measured": self._measured,
            "_plan": self._resolver.plan,
            "_measuring": self._measuring,
            "_monitor": self._monitor,
            "_complete": self._complete,
            "_state_is_blank": self._state_is_blank,
            "_max_grad_norm": self._max_grad_norm,
            "_norms": self._norms,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_plan" in state:
            self._resolver = Resolver(state.pop("_plan"), None)
        resumed = "_resolver" not in self.__dict__ or "_names" in state
        self._stepper = Stepper()
        self._members = Members()
        if resumed:  # a pickle of an earlier release lacks them
            state = {"_max_grad_norm": None, "_norms": {}, **state}
        super().__setstate__(state)
        self._members.hold(self.param_groups)
        if resumed:
            self._resolver.resume((name, param) for name, param, _ in self._parameters())
            for name, param, _ in self._parameters():
                if self.state.get(param):  # of an earlier release, perhaps
                    self.state[param] = in_present_format(name, self.state[param], self._rules[name])
