"""The optimizer: arguments, groups, state, ``step()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimadam.distributed import grad_scaler
from slimadam.distributed.slots import ParamSlot, slot_of
from slimadam.kernels.interface import Scalar, number
from slimadam.layers.roles import canonical_name
from slimadam.layers.splits import key_of
from slimadam.measurement.monitor import Check
from slimadam.optim.checkpoint.conversion import in_present_format
from slimadam.optim.checkpoint.loading import check_is_mapping, taken_over
from slimadam.optim.checkpoint.state_dict import add_plan, as_adamw
from slimadam.optim.compression import compress, decision, expand
from slimadam.optim.memory import MemoryReport, memory_report
from slimadam.optim.registry import Registry
from slimadam.optim.resizing import (
    Index,
    check_replacement,
    checked_dim,
    positions,
    reset_all,
    reset_slices,
    resized_state,
)
from slimadam.optim.revision import revise
from slimadam.optim.step.clipping import check_have_norm, clip_factor, norm_in_step
from slimadam.optim.step.direction import Shared, averages_after_step, updates_without_decay, with_decay
from slimadam.optim.step.dispatch import BackendName
from slimadam.optim.step.options import check_group, checked_max_grad_norm, normalize_group
from slimadam.optim.step.param_groups import check_gradients, check_lacks_all
from slimadam.optim.step.stepper import Stepper, hyperparameters
from slimadam.optim.step.tasks import backend_of, initial_state
from slimadam.plans.plan import CompressionPlan
from slimadam.plans.resolver import PlanArgument
from slimadam.state import second_moment
from slimadam.state.first_moment import warn_of_other_formats
from slimadam.utils import torch_private
from slimadam.utils.dtensor import is_dtensor, local, on_any_rank
from slimadam.utils.errors import did_you_mean, shown

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]] | nn.Module


class SlimAdam(Optimizer):
    r"""AdamW whose second moments are stored only as finely as a plan says each parameter needs.

    For a parameter whose second moment is averaged over the dimensions :math:`K` (arXiv 2503.01843)::

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        v_t = beta2 v_{t-1} + (1 - beta2) mean_K(g_t ** 2)        # kept with size 1 in K; K = () is AdamW
        p_t = (1 - lr weight_decay) p_{t-1} - lr (m_t / (1 - beta1 ** t)) / (sqrt(v_t / (1 - beta2 ** t)) + eps)

    A factored parameter keeps the averages ``r`` over all dimensions but the first and ``c`` over the first,
    and uses ``r c / mean(r)`` for ``v`` (arXiv 1804.04235). ``eps`` is added outside the root, as in torch.

    Differences from ``torch.optim.AdamW``: second moments are kept in float32 (float64 for float64
    parameters) even where parameters have 16 bits, because a 16-bit second moment stops decaying at
    ``beta2 = 0.999``; sparse gradients and bad options are refused before any parameter has changed.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, parameter groups, or a module.
        lr: Learning rate, a number or a 1-element tensor.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        amsgrad: Use the running maximum of the second moment (not with factored parameters).
        plan: ``"auto"`` or an :class:`~slimadam.AutoPlan`: run as AdamW while measuring, then decide and free
            the memory. ``"rules"``: the paper's table by layer role. ``"factored"``: row and column averages for
            each matrix. A :class:`~slimadam.CompressionPlan` or the path of one: that. None: AdamW.
        model: Module that owns the parameters, to learn their names and roles from. A plan may then name
            parameters of the model that this optimizer does not hold.
        variance_init: ``"zeros"``, or ``"gradient"`` to start second moments at the first squared
            gradient, bias correction kept (GI-Adam, arXiv 2406.09405).
        momentum_dtype: How the first moment is stored. None: in the parameter's precision, as AdamW.
            ``torch.float32`` or ``torch.bfloat16``: in that (not that of complex parameters). ``"int8"``: in one
            byte per element, and one for each 256, see :mod:`slimadam.state.int8`; the update works on float32, for
            which one parameter at a time is decoded. It is this optimizer's choice, also after ``load_state_dict``.
        bf16_stochastic_round: Round bfloat16 parameters up or down at random when they are written; the
            randomness depends on nothing but the step and the parameter's name.
        maximize: Ascend.
        foreach: True: lists of tensors at once. False: one at a time, by the readable reference.
        capturable: Keep step counts on the device.
        differentiable: Let autograd follow the step.
        fused: False: the readable reference. None: Triton kernels on CUDA, on a CPU one compiled pass; where that was
            not built with the package and cannot be built now, one warning says why, and lists of tensors are taken.
            True: as None, and refuses parameters that are not floating point. :meth:`backend` says what runs.
        max_grad_norm: Clip the L2 norm of all gradients together (of all groups, of DTensors over all ranks), as
            ``torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)`` before each step, but within the update:
            gradients are read once for it and never written, so ``param.grad`` stays unclipped. ``inf`` only
            measures. :attr:`grad_norm` is the norm before clipping. Where each parameter has an optimizer of its
            own (optimizer-in-backward, ``ZeroRedundancyOptimizer``), it is the norm of that optimizer's alone.
        monitor: Keep watching a sample of each averaged parameter, at most 1% of what was saved, for
            :meth:`snr_check`. Steps under ``torch.compile`` and groups with ``capturable=True`` are not watched.

    Everything after ``amsgrad`` but ``model``, ``max_grad_norm`` and ``monitor`` may be set per parameter group.

    Raises:
        ValueError: An option is out of range.
        TypeError: An option has the wrong type or a misspelt name.
        PlanError: The plan does not fit the parameters.
        RuntimeError: The plan cannot be followed through the parameters' shards.
    """

    def __init__(
        self,
        params: Params,
        lr: Scalar = 1e-3,
        betas: tuple[Scalar, Scalar] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        plan: PlanArgument = "auto",
        model: nn.Module | None = None,
        variance_init: str = "zeros",
        momentum_dtype: torch.dtype | str | None = None,
        bf16_stochastic_round: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        monitor: bool = True,
    ) -> None:
        max_grad_norm = checked_max_grad_norm(max_grad_norm)
        if not isinstance(monitor, bool):
            raise TypeError(f"monitor={monitor!r} must be True or False")
        if isinstance(params, nn.Module):
            model = params if model is None else model
            params = params.named_parameters()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "variance_init": variance_init,
            "momentum_dtype": momentum_dtype,
            "bf16_stochastic_round": bf16_stochastic_round,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        normalize_group(defaults)
        check_group(defaults)
        self._registry = Registry(plan, model, monitor)
        self._complete = False
        # Made for a checkpoint to be loaded into, by a step of zero: no step was done.
        self._state_is_blank = False
        self._stepper = Stepper()
        self._max_grad_norm = max_grad_norm
        # In a dict, because torch.compile forgets what is assigned to attributes of an optimizer.
        self._norms: dict[str, Tensor] = {}
        super().__init__(params, defaults)
        self._registry.resolver.check_all_used()
        self._registry.resolver.forget_owners()
        self._complete = True

    # -- groups and plan ---------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`; it may have its own ``plan``.

        Raises:
            ValueError, TypeError, PlanError, RuntimeError: As the constructor; the optimizer is then as it was.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        if self._complete:
            self._follow_groups()
        group, resolver = dict(param_group), self._registry.resolver
        own_plan = resolver.take_arguments(group)
        normalize_group(group)
        check_group({**self.defaults, **group})
        before = resolver.snapshot()
        super().add_param_group(group)
        try:
            names = resolver.names(group, len(self.param_groups) - 1)
            new = self._registry.slots_of_new(group, names, own_plan, self._max_grad_norm is not None)
            if self._complete:
                resolver.check_all_used()
                resolver.forget_owners()
        except Exception:
            self.param_groups.pop()
            resolver.restore(before)
            raise
        self._registry.add_group(self.param_groups[-1], names, new, self.state)

    def _follow_groups(self) -> None:
        """Take note of groups that were edited by hand."""
        if self._registry.follow(self.param_groups, self.defaults, self.state, self._max_grad_norm is not None):
            self._stepper.forget()

    def _slots(self) -> Iterator[ParamSlot]:
        """Yield each parameter that has a shape."""
        self._follow_groups()
        return self._registry.slots(self.param_groups)

    @property
    def plan(self) -> CompressionPlan:
        """The plan in force: one rule for each parameter of this optimizer, or for each of its parts."""
        self._follow_groups()
        return self._registry.plan

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that all gradients together are clipped to; may be set between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        value = checked_max_grad_norm(value)
        if value is not None:
            check_have_norm((slot.name, slot.param) for slot in self._slots())
        self._max_grad_norm = value

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``max_grad_norm`` the norm of the last step's gradients before clipping; before the first step None.

        0-dimensional, on the first gradient's device, new in each step (the same in each replay of a CUDA graph), and
        of unscaled gradients under ``GradScaler``.
        """
        return self._norms.get("grad")

    def __repr__(self) -> str:
        clips = "" if self._max_grad_norm is None else f"max_grad_norm: {self._max_grad_norm}\n"
        plan = self._registry.measuring or self._registry.plan  # follows no groups, so that it never raises
        return f"{super().__repr__()[:-1]}{clips}plan: {plan}\n)"

    def backend(self, param: Tensor | str) -> BackendName:
        """The implementation that updates a parameter.

        Args:
            param: A parameter of this optimizer, or its name.

        Raises:
            KeyError: The optimizer does not hold it.
        """
        return backend_of(self._find(param)).name

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Return whether GradScaler leaves unscaling, and leaving out a step, to the step itself, as with fused AdamW.

        Not while gradients are also measured or sampled, which must be unscaled. With DTensors only where ranks must
        first agree whether to leave out the step.
        """
        slots = list(self._slots())
        if any(is_dtensor(slot.param) for slot in slots):
            return grad_scaler.may_differ(self._gradients())
        if self._registry.measuring is not None or self._registry.monitor is not None:
            return False
        return any(backend_of(slot).counts_steps for slot in slots)

    def memory(self) -> MemoryReport:
        """Return the bytes of the optimizer state, known before the first step. See :class:`MemoryReport`.

        Of DTensors this rank's shards are counted, state and elements. Frozen parameters count once they have state.

        ``total`` includes neither the samples for :meth:`snr_check` nor what Triton's kernels keep on a GPU for
        themselves; these come on top, as ``monitor`` and ``workspace``.
        """
        return memory_report(self._slots(), self.state, self._registry.measuring or self._registry.monitor)

    # -- the step ----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch_private.use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: A gradient is sparse; no parameter has changed then.
        """
        torch_private.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        recalled = self._recalled_gradients()
        if recalled is None:
            check_gradients(self._slots())
            if not torch.compiler.is_compiling() and not self.state and self._only_makes_state():
                for group in self.param_groups:
                    self._init_group(group)
                self._state_is_blank = True
                return loss
        scaled = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scaled != (None, None) and not self._takes_scaled_gradients(recalled is not None):
            if grad_scaler.unscale(list(self._gradients()), *scaled):
                return loss
            scaled = None, None
        if recalled is None:
            for group in self.param_groups:
                self._init_group(group)
        factor = self._measure_norm(scaled[0])
        groups = list(zip(self._registry.names, self.param_groups, strict=True))
        self._stepper.update(groups, self._registry.rules, self.state, recalled, *scaled, factor)
        if recalled is None:
            self._stepper.keep_only(param for group in self.param_groups for param in group["params"])
        if self._registry.measuring is not None:
            if not self._registry.measuring.counts_only(same_state=recalled is not None):
                self._measure(factor)
        elif self._registry.monitor is not None and not torch.compiler.is_compiling():
            measured = self._registry.monitor.after_step(groups, self._registry.rules, self.state, factor)
            if measured and self._registry.revising is not None:
                self._revise()
        return loss

    @torch_private.disable_dynamo
    @torch.no_grad()
    def _measure(self, clip_factor: Tensor | None) -> None:
        """Take one measurement of ``plan="auto"``, and put its decision in force."""
        plan = decision(self._registry, self.param_groups, self.state, clip_factor)
        if plan is not None:
            self._stepper.forget()  # its caches hold the moments that are freed here
            compress(self._registry, plan, self.param_groups, self.state)

    @torch.no_grad()
    def _revise(self) -> None:
        """Let the decided plan follow what was measured."""
        self._stepper.forget()  # its caches hold moments that may be freed here
        revise(self._registry, self.param_groups, self.state)

    def _recalled_gradients(self) -> list[list[Tensor]] | None:
        """Return the gradients of all groups, if nothing has changed since a step that was checked."""
        if torch.compiler.is_compiling() or len(self._registry.names) != len(self.param_groups):
            return None
        groups = list(zip(self._registry.names, self.param_groups, strict=True))
        found = [grads for grads in self._stepper.recall(groups, self._registry.rules, self.state) if grads is not None]
        return found if len(found) == len(groups) else None

    def _measure_norm(self, grad_scale: Tensor | None) -> Tensor | None:
        """Find :attr:`grad_norm`, and return what the step multiplies gradients by once they are not scaled."""
        if self._max_grad_norm is None:
            self._norms.clear()
            return None
        norm = self._global_norm()
        if grad_scale is not None:
            norm = norm / grad_scale.to(norm.device)
        self._norms["grad"] = norm.detach()
        return clip_factor(norm, self._max_grad_norm)

    def _global_norm(self) -> Tensor:
        return norm_in_step((slot.name, slot.param) for slot in self._slots() if slot.param.grad is not None)

    @torch.no_grad()
    def clip_factor(self) -> Tensor | None:
        """Return the factor of the pending step's gradients, ``min(1, max_grad_norm / (norm + 1e-6))``.

        Returns:
            0-dimensional, on the first gradient's device; None without ``max_grad_norm``. With DTensors all ranks must
            call.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        check_gradients(self._slots())
        return None if self._max_grad_norm is None else clip_factor(self._global_norm(), self._max_grad_norm)

    @torch.no_grad()
    def update_direction(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pending update of each parameter that has a gradient, one at a time; nothing is changed.

        Yields:
            ``(parameter, D)`` with ``D`` of the parameter's shape, in at least float32, weight decay
            included: a step with learning rate ``eta`` is ``parameter - eta * D``. That of a DTensor is one, laid
            out alike; all ranks must iterate.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        for param, group, direction in self.updates_without_decay():
            yield param, with_decay(direction, param, hyperparameters(group).weight_decay)

    @torch.no_grad()
    def averages_after_step(self) -> Shared:
        """Return the averages over several ranks after the pending step, and its clip factor. Collective.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        return averages_after_step(self._slots(), self._states_of_steps(), self.clip_factor())

    @torch.no_grad()
    def updates_without_decay(
        self, averages: Shared | None = None
    ) -> Iterator[tuple[Tensor, Mapping[str, Any], Tensor]]:
        """Yield pending updates as :meth:`update_direction`, but of gradients and state alone, without weight decay.

        Args:
            averages: The result of :meth:`averages_after_step` for the same gradients and state; None: it is called.

        Yields:
            ``(parameter, group, m_hat / (sqrt(v_hat) + eps))``.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        check_gradients(self._slots())
        if averages is None:
            averages = self.averages_after_step()
        yield from updates_without_decay(self._slots(), self._states_of_steps(), averages)

    def _states_of_steps(self) -> Mapping[Tensor, Any]:
        """Return the state without entries that a step of zero has made."""
        if not self._state_is_blank:
            return self.state
        return {param: state for param, state in self.state.items() if not second_moment.is_of_no_step(state)}

    # -- parameters that change ----------------------------------------------------------------------------

    @torch.no_grad()
    def reset_state(self, param: Tensor | str, index: Index | None = None, dim: int = 0) -> None:
        """Reset a parameter's state, or that of some of its rows or columns, as when dead neurons are resampled.

        All of it: moments and count of steps start anew. Some slices: their moments become zero and the count stays,
        as where rows of AdamW's state are set to zero. A second moment that is averaged over ``dim`` stays, since it is
        that of the other slices, too. Of an 8-bit first moment, a block of 256 elements that a NaN has reached becomes
        zero as a whole. Without state there is nothing to do.

        Args:
            param: A parameter of this optimizer, or its name.
            index: Positions along ``dim``, a mask, a slice or one number; None: everything.
            dim: The dimension that ``index`` is for.

        Raises:
            KeyError: The optimizer does not hold the parameter.
            IndexError: The parameter has no such dimension or position.
            RuntimeError: ``index`` is given for a DTensor.
        """
        slot = self._find(param)
        state = self.state.get(slot.param, {})
        if not second_moment.is_made(state):
            state = {}
        found = None
        if index is not None:
            dim = checked_dim(dim, slot.param)
            found = positions(index, slot.param, dim, "index")
            if is_dtensor(slot.param):
                raise RuntimeError(
                    f"{slot.name!r}: slices of a DTensor's state cannot be reset; use index=None on every rank"
                )
            if state:
                reset_slices(slot, state, found, dim)
        elif state and slot.group["variance_init"] == "gradient":
            for key in list(filter(second_moment.is_own, state)):
                del state[key]
        elif state:
            reset_all(state)
        if self._registry.measuring is not None:
            self._registry.measuring.forget(slot.keys, found, dim)
        self._registry.sample(slot.name, slot.param, self.state)

    @torch.no_grad()
    def replace_param(
        self, old: Tensor | str, new: Tensor, keep: Index | None = None, added: int = 0, dim: int = 0
    ) -> None:
        """Put a parameter in the place of another that has grown or been pruned, and carry its state over.

        ``new`` has the kept slices of ``old`` along ``dim``, in the order of ``keep``, and ``added`` new ones after
        them, whose moments are zero; the count of steps stays. So it is where AdamW's state is indexed and concatenated
        with zeros. A second moment that is averaged over ``dim`` stays as it is. State is moved to ``new``'s device and
        precision. With ``plan="factored"`` and ``"rules"``, what the size decides is decided anew.

        Args:
            old: A parameter of this optimizer, or its name.
            new: Takes its place in the parameter group, and its name and rule.
            keep: Positions along ``dim``, a mask or a slice, a position repeatedly where slices are split; None: all.
            added: How many slices are new.
            dim: The dimension along which the parameter has changed.

        Raises:
            KeyError: The optimizer does not hold ``old``.
            IndexError: ``keep`` or ``dim`` do not fit ``old``.
            ValueError: ``new`` does not have the shape that follows from ``keep`` and ``added``, is held already, or is
                nothing that a step can update. Nothing has changed then, as after any error.
            PlanError: ``new`` would be factored, which ``amsgrad=True`` cannot be.
            RuntimeError: One of both is a DTensor, or ``old`` is a fused weight whose parts have rules of their own.
        """
        slot = self._find(old)
        held, group, registry = slot.param, slot.group, self._registry
        dim = checked_dim(dim, held)
        kept = positions(keep, held, dim, "keep")
        check_replacement(slot, new, kept, added, dim)
        if any(one.param is new for one in self._slots()):
            raise ValueError(f"new, of shape {tuple(new.shape)}, is a parameter of this optimizer already")
        names = [one.name for one in self._slots() if one.param is held]  # several, if it is there repeatedly
        grids = {} if registry.measuring is None else dict(registry.measuring.grids)
        try:
            found = {name: registry.rules_of_successor(name, new, group) for name in names}
            rules = {name: own for name, (own, _) in found.items()}
            measured = {name: own for name, (_, own) in found.items() if own}
            successor = slot_of(slot.name, new, group, rules[slot.name])
            successor.check()
            state = resized_state(slot, successor, self.state.get(held, {}), kept, dim)
        except Exception:
            if registry.measuring is not None:
                registry.measuring.grids = grids
            raise
        params = [new if param is held else param for param in group["params"]]
        if isinstance(group["params"], list):
            group["params"][:] = params
        else:
            group["params"] = params
        if self.state.pop(held, None) is not None:
            self.state[new] = state
        registry.rules.update(rules)
        registry.measured.update(measured)
        registry.hold(self.param_groups)
        self._stepper.forget()
        for name in names:
            registry.resolver.note(name, new)
            registry.sample(name, new, self.state)

    def _find(self, param: Tensor | str) -> ParamSlot:
        self._follow_groups()
        return self._registry.find(param, self.param_groups)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of :meth:`torch.optim.Optimizer.state_dict` with the plan under ``"slimadam"``.

        The keys of a parameter's state are those of ``optimizer.state[param]``. A group with second moments that are
        not kept in full says ``fused=None``: AdamW's fused kernels would take the state for its own, and write past it.
        """
        self._follow_groups()
        saved = super().state_dict()
        add_plan(saved, self._registry)
        return saved

    def adamw_state_dict(self) -> dict[str, Any]:
        """Return a state dict that ``torch.optim.AdamW`` loads, with every second moment in full.

        Averages are broadcast back, factored ones multiplied out; moments take the parameter's dtype. Those of
        DTensors lie as their parameters do, and every rank must call.
        """
        self._follow_groups()
        return as_adamw(super().state_dict(), self._registry, self.param_groups)

    @torch_private.disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SlimAdam, ``torch.optim.AdamW`` or ``torch.optim.Adam``.

        Full second moments are averaged by this optimizer's plan; none is cast to the parameter's dtype.
        First moments are stored as this optimizer's ``momentum_dtype`` says, whatever they were saved in.
        Tensors are copied. Options that the saved groups lack keep their present values. With DTensors among the
        parameters every rank must call; tensors of the state dict may lie otherwise, or be full on every rank.

        Beside the state dict and the new state it takes the memory of one parameter's moments. Where this optimizer's
        state has the form of the new one, its tensors are freed parameter by parameter, the largest first, once all has
        been checked; an interruption then leaves moments of both. A state of another form stays until all is loaded.

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
            check_is_mapping(state_dict)
            state_dict = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = pre_hook(self, state_dict) or state_dict
            self._follow_groups()
            taken = taken_over(state_dict, self._registry, self.param_groups)
        except Exception:
            on_any_rank(True, (slot.param for slot in self._slots()))
            raise
        taken.check_on_all_ranks()
        self._stepper.forget()  # its caches hold moments
        state = taken.loaded_state(self.state)
        registry = self._registry
        registry.rules, registry.measuring, registry.monitor = taken.rules, taken.measuring, taken.monitor
        registry.revising = taken.revising
        self._state_is_blank = False
        self.__setstate__({"state": state, "param_groups": taken.groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._follow_groups()  # names and rules are those of the groups as they are
        kept = ("_complete", "_state_is_blank", "_max_grad_norm", "_norms")
        return {**super().__getstate__(), **self._registry.to_pickle(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        resumed = "_names" in state
        if resumed:
            self._registry = Registry.from_pickle(state)
            state = {"_max_grad_norm": None, "_norms": {}, **state}  # a pickle of an earlier release lacks them
        self._stepper = Stepper()
        super().__setstate__(state)
        self._registry.hold(self.param_groups)
        if resumed:
            self._registry.resume(self.param_groups)
            for slot in self._slots():
                if self.state.get(slot.param):  # of an earlier release, perhaps
                    self.state[slot.param] = in_present_format(slot.name, self.state[slot.param], slot.rules)

    # -- does it still hold? -----------------------------------------------------------------------------

    def snr_check(self) -> dict[str, Check]:
        """Return the last SNR of a sample of each averaged parameter, to see whether averaging still holds.

        A few slices of each keep being tracked in full. Every 200 steps (``1 / (1 - beta2)`` where that is longer)
        their SNR is taken, and where it has clearly fallen below the cutoff, one warning says so. Samples that start
        at zero, as with every plan but ``"auto"``, are ready when that is next done after ``3 / (1 - beta2)`` steps.

        Returns:
            The SNR by parameter, or part, and a verdict in words. Empty while ``plan="auto"``
            measures. Before a sample is ready ``ready`` is False and ``snr`` NaN; so it stays, with the reason
            "too small to monitor", where 1% of what was saved is too few elements for a sample.

        Raises:
            RuntimeError: The optimizer was built with ``monitor=False``.
        """
        if self._registry.monitor is None:
            raise RuntimeError("snr_check() needs samples, which monitor=False has switched off; use monitor=True")
        return self._registry.monitor.check()

    @torch.no_grad()
    def expand(self, name: str) -> None:
        """Return a parameter, or one part of it, to a full second moment.

        The averages are broadcast back to full shape and refined over about ``1 / (1 - beta2)`` steps.
        A checkpoint remembers it. With a DTensor every rank must call.

        Args:
            name: A parameter's name, or a part's (``"attn.c_attn.weight[query]"``), as in ``plan``.

        Raises:
            TypeError: ``name`` is no text.
            KeyError: The optimizer holds no such parameter; the closest name is told.
            RuntimeError: ``plan="auto"`` is still measuring, or shards end inside the part.
        """
        if not isinstance(name, str):
            raise TypeError(f"name={shown(name)} must be a parameter's name, one of those in optimizer.plan")
        if self._registry.measuring is not None:
            raise RuntimeError(
                f"expand({name!r}): nothing is compressed while plan='auto' measures; wait for its decision"
            )
        for slot in self._slots():
            keys = [key_of(slot.name, rule.part) for rule in slot.rules]
            if canonical_name(name) == slot.name or canonical_name(name) in keys:
                self._stepper.forget()
                expand(self._registry, slot, set(keys) & {canonical_name(name)} or set(keys), self.state)
                return
        raise KeyError(f"{name!r} is not a parameter of this optimizer; {did_you_mean(name, self.plan)}".rstrip("; "))

    def _only_makes_state(self) -> bool:
        """Return whether this is the step of torch's ``get_optimizer_state_dict``: all rates and gradients are zero."""
        if any(number(group["lr"]) for group in self.param_groups):
            return False
        params = [slot.param for slot in self._slots()]
        grads = [local(param.grad) for param in params if param.grad is not None]
        return not on_any_rank(any(bool(grad.any()) for grad in grads), params)

    def _takes_scaled_gradients(self, repeats: bool) -> bool:
        """Return whether the kernels divide by GradScaler's scale, and leave a step out, for every parameter."""
        if any(group["variance_init"] == "gradient" for group in self.param_groups):
            return False
        if repeats:
            return self._stepper.counts_recalled_steps(self.param_groups)
        for group in self.param_groups:
            self._init_group(group)
        return self._stepper.counts_steps(self._slots(), self.state)

    def _gradients(self) -> Iterator[Tensor]:
        return (slot.param.grad for slot in self._slots() if slot.param.grad is not None)

    def _init_group(self, group: dict[str, Any]) -> None:
        """Make missing state. ``torch.compile`` runs a method of this name and signature untraced, once."""
        if self._state_is_blank:
            self._state_is_blank = False
            for param in [param for param, state in self.state.items() if second_moment.is_of_no_step(state)]:
                del self.state[param]
        missing = {param for param in group["params"] if param.grad is not None and "step" not in self.state[param]}
        if missing:
            check_lacks_all((slot.name, self.state[slot.param]) for slot in self._slots() if slot.param in missing)
            factor = self.clip_factor() if group["variance_init"] == "gradient" else None
            for slot in self._slots():
                if slot.group is group and slot.param in missing:
                    self.state[slot.param].update(initial_state(slot, factor))
            if group["variance_init"] == "gradient":
                self._stepper.start_from_gradient(missing)
            warn_of_other_formats(group, missing)
