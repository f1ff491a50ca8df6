"""SlimAdam in the place of ``torch.optim.Adam`` and ``AdamW``, for the time that a script runs."""

from __future__ import annotations

import inspect
import itertools
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slimadam.cli.script.names import as_groups, as_list, pairs, prefix_of, prefixed
from slimadam.layers.names import NamedParameters, owning_modules, shared_names
from slimadam.layers.splits import key_of
from slimadam.optim.memory import MemoryReport
from slimadam.optim.slimadam import SlimAdam
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import Rule, Source, factored_rule, paper_rule
from slimadam.utils.errors import PlanError
from slimadam.utils.torch_private import disable_dynamo

NamedPlan = Literal["auto", "rules", "factored", "none"]
ScriptPlan = CompressionPlan | NamedPlan


class Substitution:
    """Builds SlimAdam where a script builds Adam or AdamW, and keeps account of what the plan covered.

    Args:
        plan: A plan for the parameters of all optimizers together, or one by name; ``"none"`` compresses nothing.

    Attributes:
        memory: What each optimizer costs, in the order in which they were built.
        undecided: Which of them are still measuring, with ``"auto"``.
        uncovered: Names of parameters with two or more dimensions that the plan has no entry for.
    """

    def __init__(self, plan: ScriptPlan) -> None:
        self.memory: dict[int, MemoryReport] = {}
        self.undecided: set[int] = set()
        self.uncovered: list[str] = []
        self._plan = plan
        self._used: set[str] = set()
        self._count = itertools.count()
        self._built = mmap.mmap(-1, 1)  # shared with the processes that this one forks

    @property
    def built_anywhere(self) -> bool:
        """Whether this process or one that the script has forked has built an optimizer."""
        return bool(self._built[0])

    @property
    def unused(self) -> list[str]:
        """Entries of the plan that matched no parameter."""
        return [] if isinstance(self._plan, str) else [key for key in self._plan if key not in self._used]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the substitutes where scripts look for Adam and AdamW."""
        adam, adamw = _substitutes(self)

        @disable_dynamo
        def check_before_first_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if isinstance(optimizer, adam):
                self.check_matched()

        places = (
            (torch.optim, "Adam", adam),
            (torch.optim, "AdamW", adamw),
            (import_module("torch.optim.adam"), "Adam", adam),
            (import_module("torch.optim.adamw"), "AdamW", adamw),
        )
        originals = [(module, name, getattr(module, name)) for module, name, _ in places]
        hook = register_optimizer_step_pre_hook(check_before_first_step)
        try:
            for module, name, substitute in places:
                setattr(module, name, substitute)
            yield
        finally:
            hook.remove()
            for module, name, original in originals:
                setattr(module, name, original)

    def check_matched(self) -> None:
        """Refuse a plan that has nothing to do with the script.

        Raises:
            PlanError: No entry matched any parameter.
        """
        unused = self.unused
        if unused and not self._used:
            raise PlanError(
                f"the plan's {len(unused)} entries, {unused[0]!r} among them, match no parameter of the script's "
                "optimizers; calibrate this script"
            )

    @property
    def automatic(self) -> bool:
        """Whether each optimizer measures for itself and decides."""
        return self._plan == "auto"

    def new_index(self) -> int:
        """The number of an optimizer that is being built."""
        self._built[0] = 1
        return next(self._count)

    def plan_for(self, named: list[tuple[str, Tensor]], roles: NamedParameters, prefix: str) -> CompressionPlan:
        """The part of the plan that concerns some parameters of one optimizer, under their own names."""
        return CompressionPlan(
            {
                key_of(name, rule.part): rule
                for name, tensor in named
                for rule in self._rules(name, tensor, roles, prefix)
            }
        )

    def _rules(self, name: str, tensor: Tensor, roles: NamedParameters, prefix: str) -> list[Rule]:
        shape = tuple(tensor.shape)
        if self._plan == "factored":
            return [factored_rule(piece) for piece in roles.pieces(tensor)]
        if self._plan == "rules" and roles.owned(tensor):
            return [paper_rule(piece) for piece in roles.pieces(tensor)]
        if isinstance(self._plan, str):
            return [Rule(shape=shape)]
        keys = self._keys(self._plan, name, shape, prefix)
        if not keys:
            if len(shape) > 1:
                self.uncovered.append(name)
            return [Rule(shape=shape, reason="not in the plan", source=Source.ABSENT)]
        self._used.update(keys)
        return [self._plan[key] for key in keys]

    def _keys(self, plan: CompressionPlan, name: str, shape: tuple[int, ...], prefix: str) -> list[str]:
        told_apart = itertools.takewhile(bool, map(plan.keys_of, prefixed(prefix, name)))
        fitting = [keys for keys in told_apart if plan[keys[0]].owner_shape in (None, shape)]
        return min(fitting, key=lambda keys: keys[0] in self._used, default=plan.keys_of(name))


def _substitutes(substitution: Substitution) -> tuple[type[SlimAdam], type[SlimAdam]]:
    class Adam(SlimAdam):
        """SlimAdam with the signature and defaults of ``torch.optim.Adam``; ``fused`` is left to SlimAdam."""

        def __init__(
            self,
            params: Iterable[Any],
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            *,
            foreach: bool | None = None,
            maximize: bool = False,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
            decoupled_weight_decay: bool = False,
        ) -> None:
            self._index = substitution.new_index()
            self._decoupled = decoupled_weight_decay
            groups: Any = params if isinstance(params, Tensor) else as_groups(params)
            if not isinstance(groups, Tensor):
                self._look_up(groups)
            plan = "auto" if substitution.automatic else None
            super().__init__(
                groups, lr, betas, eps, weight_decay, amsgrad, plan=plan, foreach=foreach, maximize=maximize,
                capturable=capturable, differentiable=differentiable,
            )  # fmt: skip
            self._account()
            if substitution.automatic:
                self.register_step_post_hook(disable_dynamo(lambda *_: self._account()))

        def _account(self) -> None:
            substitution.memory[self._index] = self.memory()
            if self._measuring is None:
                substitution.undecided.discard(self._index)
            else:
                substitution.undecided.add(self._index)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self._refuse_l2(param_group)
            # How AdamW was to be run; SlimAdam chooses the fastest implementation that it has.
            options = {key: value for key, value in param_group.items() if key != "fused"}
            group = {**options, "params": as_list(param_group["params"])}
            if any(self._found.name(_tensor(item)) is None for item in group["params"]):
                self._look_up([*self.param_groups, group])
            group["params"] = pairs(group["params"], self._found, len(self.param_groups), self._shared)
            if not substitution.automatic:
                group["plan"] = substitution.plan_for(group["params"], self._found, self._prefix)
            super().add_param_group(group)
            if self._index in substitution.memory:
                self._account()

        def _look_up(self, groups: list[dict[str, Any]]) -> None:
            items = [item for group in groups for item in group["params"]]
            tensors = [_tensor(item) for item in items]
            self._shared = shared_names((item[1], item[0]) for item in items if not isinstance(item, Tensor))
            self._found = NamedParameters(owning_modules(tensors))
            self._prefix = prefix_of(tensors)

        def _refuse_l2(self, group: dict[str, Any]) -> None:
            decay = group.get("weight_decay", self.defaults["weight_decay"])
            if decay != 0 and not group.get("decoupled_weight_decay", self._decoupled):
                raise PlanError(
                    f"the script builds Adam with weight_decay={decay}, an L2 penalty, which SlimAdam does not "
                    "have; use torch.optim.AdamW, or pass decoupled_weight_decay=True"
                )

    class AdamW(Adam):
        """SlimAdam with the signature and defaults of ``torch.optim.AdamW``."""

        def __init__(
            self,
            params: Iterable[Any],
            lr: float | Tensor = 1e-3,
            betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 1e-2,
            amsgrad: bool = False,
            *,
            maximize: bool = False,
            foreach: bool | None = None,
            capturable: bool = False,
            differentiable: bool = False,
            fused: bool | None = None,
        ) -> None:
            super().__init__(
                params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, foreach=foreach,
                maximize=maximize, capturable=capturable, differentiable=differentiable, fused=fused,
            )  # fmt: skip

    for substitute, original in ((Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)):
        substitute.__qualname__ = substitute.__name__
        substitute.__module__ = f"torch.optim.{substitute.__name__.lower()}"
        _show_as(substitute, original)
    return Adam, AdamW


def _show_as(substitute: type[SlimAdam], original: type[Optimizer]) -> None:
    """Show the parameters of torch's class, of this release, to whoever asks which ones there are."""
    init: Any = substitute.__init__
    init.__signature__ = inspect.signature(original.__init__)
    init.__annotations__ = dict(original.__init__.__annotations__)


def _tensor(item: Any) -> Tensor:
    found: Tensor = item if isinstance(item, Tensor) else item[1]
    return found
