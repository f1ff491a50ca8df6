"""SlimAdam in the place of ``torch.optim.Adam`` and ``AdamW``, for the time that a script runs."""

from __future__ import annotations

import inspect
import itertools
import mmap
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slimadam.cli.script.names import prefix_of, prefixed
from slimadam.layers.names import NamedParameters, owning_modules, position_name, shared_names
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
        memory: The memory report of each optimizer, in the order in which they were built.
        undecided: Numbers of the optimizers that are still measuring, with ``"auto"``.
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
        """True once this process, or one that the script has forked, has built an optimizer."""
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

        with ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(check_before_first_step).remove)
            for cls in (adam, adamw):
                for module in (torch.optim, sys.modules[cls.__module__]):
                    stack.enter_context(patch.object(module, cls.__name__, cls))
            yield

    def check_matched(self) -> None:
        """Check that the plan has to do with the script.

        Raises:
            PlanError: No entry matched any parameter.
        """
        unused = self.unused
        if unused and not self._used:
            raise PlanError(
                f"the plan's {len(unused)} entries, {unused[0]!r} among them, match no parameter of the script's "
                "optimizers; calibrate this script"
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
    originals = torch.optim.Adam, torch.optim.AdamW
    is_auto = substitution._plan == "auto"

    class Adam(SlimAdam):
        """SlimAdam with the signature and defaults of ``torch.optim.Adam``; ``fused`` is left to SlimAdam."""

        def __init__(self, *args: Any, decoupled_weight_decay: bool = False, **kwargs: Any) -> None:
            self._build(originals[0], decoupled_weight_decay, *args, **kwargs)

        def _build(self, original: type[Optimizer], is_decoupled: bool, /, *args: Any, **kwargs: Any) -> None:
            signature = inspect.signature(original)
            options = {key: signature.parameters[key].default for key in ("lr", "betas", "eps", "weight_decay")}
            options |= signature.bind(*args, **kwargs).arguments
            options.pop("fused", None)
            self._index = next(substitution._count)
            substitution._built[0] = 1
            self._is_decoupled = is_decoupled
            groups: Any = options.pop("params")
            if not isinstance(groups, Tensor):
                groups = _groups(groups)
                self._look_up(groups)
            super().__init__(groups, plan="auto" if is_auto else None, **options)
            self._account()
            if is_auto:
                self.register_step_post_hook(disable_dynamo(lambda *_: self._account()))

        def _account(self) -> None:
            substitution.memory[self._index] = self.memory()
            if self._registry.measuring is None:
                substitution.undecided.discard(self._index)
            else:
                substitution.undecided.add(self._index)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self._check_decoupled(param_group)
            # How AdamW was to be run; SlimAdam chooses the fastest implementation that it has.
            group = {key: value for key, value in param_group.items() if key != "fused"}
            [group] = _groups([group])
            if any(self._found.name(tensor) is None for _, tensor in group["params"]):
                self._look_up(_groups([*self.param_groups, group]))
            group["params"] = named = list(self._named(group["params"]))
            if not is_auto:
                found = [(name, substitution._rules(name, tensor, self._found, self._prefix)) for name, tensor in named]
                rules = {key_of(name, rule.part): rule for name, own in found for rule in own}
                group["plan"] = CompressionPlan(rules)
            super().add_param_group(group)
            if self._index in substitution.memory:
                self._account()

        def _look_up(self, groups: list[dict[str, Any]]) -> None:
            items = [item for group in groups for item in group["params"]]
            tensors = [tensor for _, tensor in items]
            self._shared = shared_names((tensor, name) for name, tensor in items if name is not None)
            self._found = NamedParameters(owning_modules(tensors))
            self._prefix = prefix_of(tensors)

        def _named(self, items: list[tuple[str | None, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            """Yield each parameter of the next group with a name: the script's where it gave one of its own."""
            for index, (name, tensor) in enumerate(items):
                if name is None or name in self._shared:
                    name = self._found.name(tensor) or name or position_name(len(self.param_groups), index)
                yield name, tensor

        def _check_decoupled(self, group: dict[str, Any]) -> None:
            decay = group.get("weight_decay", self.defaults["weight_decay"])
            if decay != 0 and not group.get("decoupled_weight_decay", self._is_decoupled):
                raise PlanError(
                    f"the script builds Adam with weight_decay={decay}, an L2 penalty, which SlimAdam does not "
                    "have; use torch.optim.AdamW, or pass decoupled_weight_decay=True"
                )

    class AdamW(Adam):
        """SlimAdam with the signature and defaults of ``torch.optim.AdamW``."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._build(originals[1], True, *args, **kwargs)

    for substitute, original in zip((Adam, AdamW), originals, strict=True):
        substitute.__qualname__ = substitute.__name__
        substitute.__module__ = f"torch.optim.{substitute.__name__.lower()}"
        # The parameters of this release of torch, for whoever asks which ones there are.
        init, original_init = vars(substitute)["__init__"], vars(original)["__init__"]
        init.__signature__ = inspect.signature(original_init)
        init.__annotations__ = dict(original_init.__annotations__)
    return Adam, AdamW


def _groups(params: Any) -> list[dict[str, Any]]:
    """Return parameter groups whose parameters are a list of pairs of the given name, if any, and the tensor."""
    given = list(params)
    groups = [{"params": given}] if given and not isinstance(given[0], dict) else given
    return [{**group, "params": _pairs(group["params"])} for group in groups]


def _pairs(params: Any) -> list[tuple[str | None, Tensor]]:
    items = [params] if isinstance(params, Tensor) else params
    return [(None, item) if isinstance(item, Tensor) else item for item in items]
