"""Slots: a parameter of an optimizer, plain or sharded, and the tensors that this rank holds for it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from slimadam.distributed.sharded_moments import SharedPart, shared_part, zeros
from slimadam.distributed.sharded_rules import LocalRule, local_rules, warn_of_old_torch
from slimadam.kernels.reference import scale_grad
from slimadam.layers.splits import key_of
from slimadam.state import second_moment
from slimadam.state.first_moment import momentum_in
from slimadam.state.rule import FACTORED, Rule, Source
from slimadam.utils.dtensor import (
    check_placement,
    full_tensor,
    is_dtensor,
    laid_out_as,
    local,
    local_gradient,
    place,
)
from slimadam.utils.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger("slimadam")


@dataclass(eq=False)
class ParamSlot:
    """A parameter of an optimizer, here one that is not sharded; :class:`ShardedSlot` is for DTensors.

    Attributes:
        name: Its name in the plan.
        param: The parameter.
        group: Its parameter group.
        rules: Its rule, or one for each of its parts.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    rules: Sequence[Rule]

    @property
    def shape(self) -> tuple[int, ...]:
        """The global shape."""
        return tuple(self.param.shape)

    @property
    def keys(self) -> list[str]:
        """The names of its parts, or its own, as in plans."""
        return [key_of(self.name, rule.part) for rule in self.rules]

    @property
    def is_measured(self) -> bool:
        """True while ``plan="auto"`` measures it, or a part of it."""
        return any(rule.source == Source.MEASURING for rule in self.rules)

    @property
    def own(self) -> Tensor:
        """This rank's shard."""
        return self.param

    @property
    def own_rules(self) -> Sequence[Rule]:
        """The rules in the coordinates of this rank's shard."""
        return self.rules

    @property
    def gradient(self) -> Tensor:
        """This rank's shard of the gradient."""
        return local_gradient(self.name, self.param)

    @property
    def stored_shapes(self) -> Sequence[tuple[int, ...]]:
        """The shapes of the second moments that this rank stores."""
        return second_moment.state_shapes(self.rules, self.shape)

    @property
    def stored(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and precision of each second moment that this rank stores."""
        return list(zip(self.stored_shapes, second_moment.dtypes_of(self.rules, self.param.dtype), strict=True))

    @property
    def is_shared(self) -> bool:
        """True if some of its second moments are averages over several ranks."""
        return False

    def check(self) -> None:
        """Check that the rules can be followed with the group's options and through the parameter's shards.

        Raises:
            PlanError: As in :meth:`check_options`.
            RuntimeError: Says why shards do not allow it, and what to use instead.
        """
        self.check_options()

    def check_options(self) -> None:
        """Check that the rules can be followed with the group's options, which may have changed.

        Raises:
            PlanError: Names the option.
        """
        reason = self._why_not_in_codes()
        if reason is not None:
            raise PlanError(f"{self.name!r}: {reason}; give the parameter form 'full', which goes with all options")
        if self.group["amsgrad"] and any(rule.form == FACTORED for rule in self.rules):
            raise PlanError(
                f"{self.name!r}: amsgrad=True has no factored form, since the maximum of a product is not the "
                "product of maxima; set amsgrad=False or give the parameter form 'mean' or 'full'"
            )

    def why_not_stored(self) -> str | None:
        """Return why second moments cannot be stored by the rules; None where they can."""
        try:
            self.check()
        except (PlanError, RuntimeError) as error:
            return str(error)
        return None

    def _why_not_in_codes(self) -> str | None:
        """Return why second moments in codes do not go with the parameter or its options; None where they do."""
        if not any(rule.stored_as.is_coded for rule in self.rules):
            return None
        if self.param.is_complex():
            return "form='float8' is for real numbers, the parameter is complex"
        option = next((name for name in ("amsgrad", "differentiable") if self.group[name]), None)
        return None if option is None else f"{option}=True has no form='float8'"

    def rules_that_shards_allow(self) -> list[Rule]:
        """Return the rules, or one full rule where shards, options or the precision do not allow them."""
        reason = self._why_not_in_codes()
        return list(self.rules) if reason is None else self._in_full(reason)

    def _in_full(self, reason: str) -> list[Rule]:
        logger.warning("plan='auto' keeps the second moment of %s in full: %s", self.name, reason)
        return [Rule(shape=self.shape, reason=reason)]

    def zero_moments(self) -> list[Tensor]:
        """Return second moments of zero."""
        stored = self.stored
        if self.rules[0].part is None and not any(self.rules[0].averaged_dims(self.param.dim())):
            return [torch.zeros_like(self.param, dtype=stored[0][1], memory_format=torch.preserve_format)]
        return [torch.zeros(shape, dtype=dtype, device=self.param.device) for shape, dtype in stored]

    def moments_from_gradient(self, clip_factor: Tensor | None) -> list[Tensor]:
        """Return second moments that start at the squared gradient (GI-Adam, arXiv 2406.09405).

        Averages over several ranks are left at zero: the all-reduce of the step computes them with ``beta2 = 0``.

        Args:
            clip_factor: Factor of the gradient.
        """
        assert self.param.grad is not None
        grads = ((rule, scale_grad(rule.take(self.param.grad), clip_factor)) for rule in self.rules)
        return [moment for rule, grad in grads for moment in rule.stored_as.start_from(grad)]

    def placed(self, moments: Sequence[Tensor], copy: bool = True) -> list[Tensor]:
        """Return second moments as the state stores them. Collective for a DTensor.

        Args:
            moments: Of the global shapes that the rules keep; full tensors the same on every rank.
            copy: Whether to return copies alone. False: it is the tensors themselves where they are what is stored.
        """
        dtypes, device = second_moment.dtypes_of(self.rules, self.param.dtype), self.param.device
        return [
            full_tensor(moment).to(device=device, dtype=dtype, copy=copy)
            for moment, dtype in zip(moments, dtypes, strict=True)
        ]

    def wrap(self, held: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape and layout from this rank's shard of it."""
        return held

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return this rank's tensors of the state.

        Raises:
            RuntimeError: The state is not sharded as the parameter is.
        """
        return state

    def shared_parts(self, state: Mapping[str, Any]) -> list[SharedPart | None]:
        """Return for each rule its averages over several ranks, or None where there are none.

        Args:
            state: This rank's tensors of the state.
        """
        return [None] * len(self.rules)


class ShardedSlot(ParamSlot):
    """A DTensor of an optimizer."""

    param: DTensor

    @cached_property
    def _local_rules(self) -> list[LocalRule]:
        return local_rules(self.name, self.rules, self.param)

    @property
    @override
    def own(self) -> Tensor:
        return local(self.param)

    @property
    @override
    def own_rules(self) -> Sequence[Rule]:
        return [one.rule for one in self._local_rules]

    @property
    @override
    def stored_shapes(self) -> Sequence[tuple[int, ...]]:
        return [rule.stored_shape(dims) for rule in self._local_rules for dims in rule.averaged_dims]

    @property
    @override
    def is_shared(self) -> bool:
        return any(rule.is_shared for rule in self._local_rules)

    @override
    def check(self) -> None:
        super().check()
        warn_of_old_torch()
        measures = self.rules[0].source == Source.MEASURING and self.rules[0].is_full
        if measures or not all(rule.is_full for rule in self.rules):
            check_placement(self.name, self.param)
        if not measures:
            local_rules(self.name, self.rules, self.param)

    @override
    def rules_that_shards_allow(self) -> list[Rule]:
        try:
            local_rules(self.name, self.rules, self.param)
        except RuntimeError as error:
            return self._in_full(str(error))
        return super().rules_that_shards_allow()

    @override
    def zero_moments(self) -> list[Tensor]:
        return [zeros(rule, self.param, dims) for rule in self._local_rules for dims in rule.averaged_dims]

    @override
    def moments_from_gradient(self, clip_factor: Tensor | None) -> list[Tensor]:
        moments = self.zero_moments()
        for rule, made in zip(self._local_rules, second_moment.by_rule(self.rules, moments), strict=True):
            if not rule.is_shared:
                grad = scale_grad(rule.rule.take(self.gradient), clip_factor)
                for moment, value in zip(made, rule.rule.stored_as.start_from(grad), strict=True):
                    local(moment).copy_(value)
        return moments

    @override
    def placed(self, moments: Sequence[Tensor], copy: bool = True) -> list[Tensor]:
        made = self.zero_moments()
        for target, values in zip(made, moments, strict=True):
            place(target, values)
        return made

    @override
    def wrap(self, held: Tensor) -> Tensor:
        return laid_out_as(self.param, held)

    @override
    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        own: dict[str, Any] = {"step": state["step"]}
        key = momentum_in(state).key
        own[key] = local(state[key])
        self._check_shapes(key, [tuple(own[key].shape)], [tuple(self.own.shape)])
        if "exp_avg_scale" in state:
            own["exp_avg_scale"] = local(state["exp_avg_scale"]).view(-1)
        for kind in second_moment.SECOND_MOMENTS:
            held = [local(moment) for moment in second_moment.moments_of(state, self.rules, kind)]
            if held:
                self._check_shapes(kind, [tuple(moment.shape) for moment in held], self.stored_shapes)
                own.update(second_moment.by_key(held, self.rules, kind))
        return own

    def _check_shapes(self, key: str, found: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, ...]]) -> None:
        if found != wanted:
            raise RuntimeError(
                f"{self.name!r}: this rank holds {key} of shape {' and '.join(map(str, found))}, its shard of the "
                f"parameter needs {' and '.join(map(str, wanted))}; shard the model before the optimizer is built, and "
                "load its checkpoints by torch.distributed.checkpoint"
            )

    @override
    def shared_parts(self, state: Mapping[str, Any]) -> list[SharedPart | None]:
        moments, maxima = (
            second_moment.by_rule(self.rules, second_moment.moments_of(state, self.rules, kind))
            for kind in second_moment.SECOND_MOMENTS
        )
        return [
            shared_part(rule, self.param, stored, largest) if rule.is_shared else None
            for rule, stored, largest in zip(self._local_rules, moments, maxima, strict=True)
        ]


def slot_of(name: str, param: Tensor, group: dict[str, Any], rules: Sequence[Rule]) -> ParamSlot:
    """Return the slot of a parameter.

    Args:
        name: Its name in the plan.
        param: The parameter.
        group: Its parameter group.
        rules: Its rule, or one for each of its parts.
    """
    return ShardedSlot(name, param, group, rules) if is_dtensor(param) else ParamSlot(name, param, group, rules)
