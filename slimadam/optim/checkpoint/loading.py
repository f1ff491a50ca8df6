"""State dicts that an optimizer takes over, all of it checked before any of it is used."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy, deepcopy
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.kernels.float8 import is_coded
from slimadam.kernels.interface import second_moment_dtype
from slimadam.layers.splits import key_of
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.monitor import Monitor
from slimadam.optim.registry import Registry
from slimadam.optim.step.dispatch import steps_on_device
from slimadam.optim.step.options import check_group, normalize_group
from slimadam.plans.auto import AutoPlan, Measuring, Revising
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import DECIDED_BEFORE
from slimadam.state import second_moment
from slimadam.state.first_moment import FIRST_MOMENTS, STORED, momentum_in, momentum_of, with_own_keys
from slimadam.state.rule import Rule, Source, fit_rules
from slimadam.state.second_moment import SECOND_MOMENTS, is_key_of
from slimadam.utils.dtensor import differing, full_tensor, is_dtensor, local, on_any_rank
from slimadam.utils.errors import PlanError, shown

logger = logging.getLogger("slimadam")

KEY: Final = "slimadam"
FORMAT_VERSION: Final = 3
"""1: second moments of several tensors were saved as lists; 2: as dicts by number. Both are still read."""

# What only Adam and AdamW keep in a group; "fused" there says how they were run, not how to go on. How first moments
# are stored is, like the plan, the choice of the optimizer that loads.
_NOT_LOADED: Final = ("params", "decoupled_weight_decay", "fused", "momentum_dtype", "plan", "model")


class Taken(NamedTuple):
    """Everything that a state dict brings to an optimizer.

    Attributes:
        groups: The optimizer's groups with the saved options.
        slots: The parameters by key of ``state``, with the groups and rules in force afterwards.
        state: The saved state of each parameter.
        rules: The rules in force afterwards.
        measuring: The measurement of ``plan="auto"`` that goes on.
        monitor: The samples.
        revising: What the revision of a decided plan goes on from.
    """

    groups: list[dict[str, Any]]
    slots: dict[Any, ParamSlot]
    state: Mapping[Any, Any]
    rules: dict[str, list[Rule]]
    measuring: Measuring | None
    monitor: Monitor | None
    revising: Revising | None

    def check_on_all_ranks(self) -> None:
        """Check that all ranks which share a parameter load the same. Collective.

        Raises:
            RuntimeError: Names the parameter.
        """
        params = [slot.param for slot in self.slots.values()]
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
        for saved_id, slot in self.slots.items():
            saved = self.state.get(saved_id, {})
            stored = [(key, saved[key]) for key in FIRST_MOMENTS if key in saved]
            for kind in SECOND_MOMENTS:
                stored += [(kind, moment) for moment in second_moment.saved_moments(saved, slot.rules, kind)]
            tensors = [
                (key, tuple(tensor.shape), str(tensor.dtype), str(getattr(tensor, "placements", None)))
                for key, tensor in stored
            ]
            rules = [(rule.form, rule.dims, rule.batch_dims, key_of(slot.name, rule.part)) for rule in slot.rules]
            yield slot.name, slot.param, repr((float(saved.get("step", 0)), tensors, rules))

    def loaded_state(self, held: MutableMapping[Any, Any]) -> dict[Any, Any]:
        """Return the state by parameter as the optimizer keeps it; tensors are copies.

        Where the state that is there has the same form, each parameter's gives way to its successor at once, so that
        no more than one parameter's moments exist twice. The largest parameter comes first: what does not fit fails
        there, before anything has changed, and whatever follows fits into the memory that was freed.

        Args:
            held: The optimizer's state until now; written.
        """
        state: dict[Any, Any] = defaultdict(dict)
        with torch.inference_mode(False):  # else of no use once that mode has ended
            for saved_id, saved in self.state.items():
                if saved and saved_id not in self.slots:
                    state[saved_id] = deepcopy(saved)
            loaded = {saved_id: _entries_of_users(self.state.get(saved_id, {})) for saved_id in self.slots}
            gives_way = self._replaces(held)
            for saved_id, slot in sorted(self.slots.items(), key=lambda one: -one[1].param.numel()):
                loaded[saved_id].update(_loaded_moments(slot, self.state.get(saved_id, {})))
                if gives_way and loaded[saved_id]:
                    held[slot.param] = loaded[saved_id]
        state.update((slot.param, loaded[saved_id]) for saved_id, slot in self.slots.items() if loaded[saved_id])
        return state

    def _replaces(self, held: Mapping[Any, Any]) -> bool:
        """Return whether a state has all that is loaded, in the same form, and in memory of its own."""
        pairs = [
            (slot, saved, held.get(slot.param, {}))
            for saved_id, slot in self.slots.items()
            if (saved := self.state.get(saved_id))
        ]
        if not all(_is_stored_alike(slot, saved, own) for slot, saved, own in pairs):
            return False
        saved_at = {address for _, saved, _ in pairs for address in _addresses(saved)}
        return all(saved_at.isdisjoint(_addresses(own)) for _, _, own in pairs)


def taken_over(state_dict: Mapping[str, Any], registry: Registry, present: Sequence[dict[str, Any]]) -> Taken:
    """Return what an optimizer takes over from a state dict; nothing is changed, and no other rank is asked.

    Args:
        state_dict: What ``state_dict()`` of SlimAdam, AdamW or Adam returned.
        registry: Names and rules of the optimizer.
        present: Its groups.

    Raises:
        ValueError, PlanError: The state dict does not fit.
    """
    check_layout(state_dict)
    saved_state = {
        key: with_own_keys(value) if isinstance(value, Mapping) else value for key, value in state_dict["state"].items()
    }
    _check_is_of_adam(state_dict["param_groups"], saved_state)
    groups = _merged_groups(present, state_dict["param_groups"])
    own = state_dict.get(KEY) or {}
    rules, measuring = _phase(own, registry, present)
    slots: dict[Any, ParamSlot] = {}
    for names, group, saved_group in zip(registry.names, groups, state_dict["param_groups"], strict=True):
        for name, param, saved_id in zip(names, group["params"], saved_group["params"], strict=True):
            if not is_lazy(param):
                slots[saved_id] = slot_of(name, param, group, rules[name])
            elif saved_state.get(saved_id):
                raise ValueError(
                    f"{name!r} has no shape yet (a lazy module's), but the state dict has state for it; run a forward "
                    "pass before loading"
                )
    for saved_id, slot in slots.items():
        slot.check()
        _check_saved(slot, saved_state.get(saved_id, {}))
    monitor = None
    with torch.inference_mode(False):  # else what is tracked is of no use once that mode has ended
        if measuring is not None and own:
            _track(measuring, own, slots, saved_state)
        elif measuring is not None:
            measuring = _tracked_anew(measuring, slots, saved_state)
        if registry.monitor is not None:
            monitor = Monitor(registry.monitor.cutoff, warns=registry.monitor.warns)
            if measuring is None:
                for slot in registry.slots(present):
                    monitor.add(slot.name, slot.param, rules[slot.name])
                if "monitor" in own:
                    monitor.load_state_dict(own["monitor"])
    revising = None if registry.revising is None else Revising(registry.revising.settings)
    if revising is not None:
        revising.load(own.get("high", {}))
    return Taken(groups, slots, saved_state, rules, measuring, monitor, revising)


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
    for slot in registry.slots(groups):
        found = [saved[key] for key in saved.keys_of(slot.name)]
        expanded = any(rule.source == Source.EXPANDED for rule in [*found, *slot.rules])
        if found and automatic and found[0].owner_shape not in (None, slot.shape):
            # Its saved state, where it has any, is refused with the remedy; without, it is as if newly added.
            rules[slot.name] = [Rule(shape=slot.shape, reason=DECIDED_BEFORE)]
        elif found and (automatic or expanded):
            rules[slot.name] = fit_rules(slot.name, found, slot.shape)
    if not isinstance(settings, AutoPlan):
        return rules, registry.measuring
    if "measuring" not in own:
        return rules, None
    measured = CompressionPlan.of_parameters(registry.measured)
    return rules, Measuring.from_dict(settings, own["measuring"], measured)


def _track(
    measuring: Measuring, own: Mapping[str, Any], slots: Mapping[Any, ParamSlot], state: Mapping[Any, Any]
) -> None:
    """Go on with the grids of a checkpoint; those of DTensors begin anew, and with them the measurement."""
    saved = own["measuring"].get("grids", {})
    if not isinstance(saved, Mapping):
        raise ValueError(f"the state dict's record of plan='auto' is damaged (grids={shown(saved)})")
    is_young = False
    for saved_id, slot in slots.items():
        for rule, key in zip(slot.rules, slot.keys, strict=True):
            if rule.source == Source.MEASURING and not rule.is_full and measuring.track(key, slot.param, rule) is None:
                grid = measuring.grids[key]
                grid.load(key, saved.get(key, {}))
                is_made = second_moment.is_made(state.get(saved_id, {}))
                is_young = is_young or (grid.shard is not None and grid.moment is None and is_made)
    if is_young and measuring.steps:
        logger.warning(
            "plan='auto' measures anew: the state dict of sharded parameters has no grids, by which %d steps before it "
            "were measured",
            measuring.steps,
        )
        measuring.steps, measuring.history = 0, SNRHistory()


def _tracked_anew(measuring: Measuring, slots: Mapping[Any, ParamSlot], state: Mapping[Any, Any]) -> Measuring:
    """Return a measurement whose grids begin at loaded second moments: where these are full, as AdamW's, at them."""
    after = copy(measuring)
    after.grids = dict(measuring.grids)
    for saved_id, slot in slots.items():
        saved = state.get(saved_id, {})
        moments = second_moment.saved_moments(saved, slot.rules)
        is_full = len(moments) == 1 and _shapes(moments) == (slot.shape,) and not is_coded(moments[0])
        known = is_full and not is_dtensor(slot.param) and not second_moment.is_of_no_step(saved)
        for key in filter(after.grids.__contains__, slot.keys):
            after.grids[key] = after.grids[key].begun(moments[0] if known else None)
    return after


def _merged_groups(groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the saved options over the present ones, with the present parameters."""
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    merged = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(saved['params'])} parameters, the optimizer's {len(group['params'])}"
            )
        options = {key: value for key, value in saved.items() if key not in _NOT_LOADED}
        merged.append({**group, **deepcopy(options), "params": group["params"]})
        normalize_group(merged[-1])
        check_group(merged[-1])
    return merged


def _check_saved(slot: ParamSlot, saved: Mapping[str, Any]) -> None:
    """Check that :func:`_loaded_moments` can take over a saved state; no other rank is asked."""
    if not any(map(second_moment.is_own, saved)):
        return
    name = slot.name
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if _is_missing(saved, key)]
    if missing:
        raise ValueError(f"{name!r}: the state dict lacks {missing}; it is not of Adam, AdamW or SlimAdam")
    if slot.group["amsgrad"] and _is_missing(saved, "max_exp_avg_sq"):
        raise ValueError(f"{name!r}: amsgrad=True, but the state dict has no max_exp_avg_sq; set amsgrad=False")
    _check_tensors(slot, saved)
    momentum_in(saved).check_saved(name, slot.param, saved)
    for kind in SECOND_MOMENTS:
        moments = second_moment.saved_moments(saved, slot.rules, kind)
        if moments:
            _check_second_moment(slot, moments)


def _entries_of_users(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of what users have put into a parameter's state."""
    return deepcopy({key: value for key, value in saved.items() if not second_moment.is_own(key)})


def _is_taken(slot: ParamSlot, saved: Mapping[str, Any]) -> bool:
    """Return whether a saved state has moments to go on from.

    With ``variance_init="gradient"`` one of no step is made anew from the first step's gradient.
    """
    is_anew = slot.group["variance_init"] == "gradient" and second_moment.is_of_no_step(saved)
    return second_moment.is_made(saved) and not is_anew


def _is_stored_alike(slot: ParamSlot, saved: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state is made of tensors such as a saved one will be loaded to."""
    if not _is_taken(slot, saved) or not any(key in held for key in STORED):
        return False
    wanted, present = momentum_of(slot.param, slot.group), momentum_in(held)
    if (wanted.key, wanted.dtype) != (present.key, present.dtype) or held[present.key].device != slot.param.device:
        return False
    for kind in SECOND_MOMENTS:
        kept = [(tuple(local(one).shape), one.dtype) for one in second_moment.moments_of(held, slot.rules, kind)]
        if kept != (slot.stored if second_moment.saved_moments(saved, slot.rules, kind) else []):
            return False
    return True


def _addresses(state: Mapping[str, Any]) -> Iterator[int]:
    """Yield where the memory of a state's tensors lies."""
    for value in state.values():
        several = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        )
        yield from (
            local(one).untyped_storage().data_ptr() for one in several if isinstance(one, Tensor) and one.numel()
        )


def _loaded_moments(slot: ParamSlot, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return steps and moments of a saved state as the optimizer keeps them, all copies. Collective for a DTensor.

    Full second moments are averaged by the rules.
    """
    if not _is_taken(slot, saved):
        return {}
    device = slot.param.device if steps_on_device(slot.param, slot.group) else torch.device("cpu")
    loaded = {"step": torch.as_tensor(saved["step"], dtype=second_moment.step_dtype()).to(device, copy=True)}
    loaded.update(momentum_of(slot.param, slot.group).load(slot.param, saved))
    for kind in SECOND_MOMENTS:
        moments = second_moment.saved_moments(saved, slot.rules, kind)
        if moments:
            fits = second_moment.fits(moments, slot.rules, slot.shape)
            if not fits:
                # In the wider precision before it is averaged, and never in inverted strides of a transposed view.
                full = full_tensor(moments[0]).to(slot.own.device, second_moment_dtype(slot.param.dtype)).contiguous()
                moments = second_moment.average(full, slot.rules)
                del full
            loaded.update(second_moment.by_key(slot.placed(moments, copy=fits), slot.rules, kind))
    return loaded


def _is_missing(saved: Mapping[str, Any], key: str) -> bool:
    if key in SECOND_MOMENTS:
        found = (value for own, value in saved.items() if is_key_of(own, key))
        return all(isinstance(value, (Mapping, list, tuple)) and not value for value in found)
    return key not in saved if key == "step" else not any(own in saved for own in STORED)


def _shapes(tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _check_second_moment(slot: ParamSlot, saved: Sequence[Tensor]) -> None:
    shapes, wanted = _shapes(saved), second_moment.state_shapes(slot.rules, slot.shape)
    is_full = shapes == (slot.shape,) and not is_coded(saved[0])
    if not is_full and not second_moment.fits(saved, slot.rules, slot.shape):
        described = ", ".join(f"{rule.form}, dims={rule.dims}" for rule in slot.rules)
        raise PlanError(
            f"{slot.name!r}: the state dict holds a second moment of shape {' and '.join(map(str, shapes))}"
            f"{' in codes' if is_coded(saved[0]) else ''}, this optimizer's plan ({described}) keeps "
            f"{' and '.join(map(str, wanted))}; "
            "convert it with slimadam.convert_state_dict(state_dict, optimizer.plan), or build the optimizer with the "
            "plan it was saved under, slimadam.CompressionPlan.from_dict(state_dict['slimadam']['plan']) or, with a "
            "distributed checkpoint, the one saved beside it (optimizer.plan.save)"
        )


def check_is_mapping(state_dict: object) -> None:
    """Check that a state dict is a dict.

    Raises:
        TypeError: Says what it should be.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict={shown(state_dict)} must be what an optimizer's state_dict() returned")


def check_layout(state_dict: Mapping[str, Any]) -> None:
    """Check that a dict is an optimizer's state dict that this release reads.

    Raises:
        ValueError: Names the entry that is missing or wrong.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the state dict's {key!r} is {type(state_dict.get(key)).__name__}; pass an optimizer's")
    if not isinstance(state_dict.get(KEY, {}), Mapping):
        raise ValueError(f"the state dict's {KEY!r} is {state_dict[KEY]!r}; pass what SlimAdam.state_dict() returned")
    for index, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"the state dict's param_groups[{index}]={shown(group)} is no dict with a list of 'params'; pass an "
                "optimizer's"
            )
    own = state_dict.get(KEY)
    if own and not isinstance(own.get("plan"), Mapping):
        raise ValueError(
            f"the state dict's {KEY!r} has plan={shown(own.get('plan'))}; pass what SlimAdam.state_dict() returned, or "
            f"remove {KEY!r} to load it as that of AdamW"
        )
    for saved_id, saved in state_dict["state"].items():
        if not isinstance(saved, Mapping):
            raise ValueError(f"the state dict's state of parameter {saved_id!r} is {type(saved).__name__}, not a dict")
    _check_version(state_dict)


def _check_tensors(slot: ParamSlot, saved: Mapping[str, Any]) -> None:
    """Check the entries of a saved state, which would else fail only in the next step."""
    name, param = slot.name, slot.param
    step = saved["step"]
    is_one = isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta)
    if not is_one or not 0 <= step < 2**53:
        raise ValueError(f"{name!r}: the state dict's step is {shown(step)}; it must be one number >= 0")
    for key, value in saved.items():
        if key in FIRST_MOMENTS or any(is_key_of(key, kind) for kind in SECOND_MOMENTS):
            _check_tensor_entry(name, key, value, param)


def _check_tensor_entry(name: str, key: str, value: Any, param: Tensor) -> None:
    if key in SECOND_MOMENTS and isinstance(value, Mapping):
        if set(value) != {str(index) for index in range(len(value))}:
            raise ValueError(f"{name!r}: the state dict's {key} has the keys {list(value)}, not '0', '1', ...")
        value = list(value.values())
    for tensor in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{name!r}: the state dict's {key} holds {type(tensor).__name__}, not a dense tensor")
        if tensor.is_meta and not param.is_meta:
            raise ValueError(f"{name!r}: the state dict's {key} has no values (device='meta'); pass it as it was saved")
        if second_moment.is_key_of_codes(key) and not is_coded(tensor):
            raise ValueError(f"{name!r}: the state dict's {key} is {tensor.dtype}, its codes must be torch.uint8")
        codes = key in ("exp_avg_codes", "exp_avg_scale") or (key == "exp_avg" and tensor.dtype == torch.int8)
        if not codes and not is_coded(tensor) and tensor.is_complex() != param.is_complex():
            raise ValueError(f"{name!r}: the state dict's {key} is {tensor.dtype}, the parameter {param.dtype}")
    if not isinstance(value, Tensor) and key not in SECOND_MOMENTS:
        raise ValueError(f"{name!r}: the state dict's {key} holds {type(value).__name__}, not a dense tensor")


def _check_is_of_adam(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Check that a state dict is not one of another optimizer, of whose state nothing could be used."""
    entries = {str(key) for saved in state.values() for key in saved}
    if entries and not any(map(second_moment.is_own, entries)) and not any("betas" in group for group in groups):
        raise ValueError(
            f"the state dict holds {sorted(entries)} and its groups no betas: it is not of Adam, AdamW or SlimAdam; "
            "pass one of theirs, or begin without it"
        )


def _check_version(state_dict: Mapping[str, Any]) -> None:
    """Check that no later release wrote a state dict.

    Raises:
        ValueError: Names the version found and those that are read.
    """
    version = state_dict.get(KEY, {}).get("format_version", FORMAT_VERSION)
    known = isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION
    if not known:
        raise ValueError(
            f"the state dict has format version {shown(version)}; this release reads 1 to "
            f"{FORMAT_VERSION}: update slimadam"
        )
