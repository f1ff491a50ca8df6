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
from slimadam.layers.names import NamedParameters
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
        undecided: For each optimizer, whether it is still measuring, with ``"auto"``.
        uncovered: Names of parameters with two or more dimensions that the plan has no rule for.
    """

    def __init__(self, plan: ScriptPlan) -> None:
        self.memory: dict[int, MemoryReport] = {}
        self.undecided: dict[int, bool] = {}
        self.uncovered: list[str] = []
        self._plan = plan
        self._used: set[str] = set()
        self._built = mmap.mmap(-1, 1)  # shared with the processes that this one forks

    @property
    def built_anywhere(self) -> bool:
        """True once this process, or one that the script has forked, has built an optimizer."""
        return bool(self._built[0])

    @property
    def unused(self) -> list[str]:
        """Names in the plan that matched no parameter."""
        return [] if isinstance(self._plan, str) else [key for key in self._plan if key not in self._used]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the substitutes where scripts look for Adam and AdamW."""
        adam, adamw = _substitutes(self)

        @disable_dynamo
        def check_before_first_step(optimizer: Optimizer, *_: Any) -> None:
            if isinstance(optimizer, adam):
                self.check_matched()

        with ExitStack() as stack:
            stack.enter_context(register_optimizer_step_pre_hook(check_before_first_step))
            for cls in (adam, adamw):
                for module in (torch.optim, sys.modules[cls.__module__]):
                    stack.enter_context(patch.object(module, cls.__name__, cls))
            yield

    def check_matched(self) -> None:
        """Raise PlanError where no name in the plan matched any parameter of the script."""
        unused = self.unused
        if unused and not self._used:
            raise PlanError(
                f"the plan's {len(unused)} entries, {unused[0]!r} among them, match no parameter of the script's "
                "optimizers; calibrate this script"
            )

    def _rules(self, name: str, tensor: Tensor, layers: NamedParameters, prefix: str) -> list[Rule]:
        shape = tuple(tensor.shape)
        if self._plan == "factored":
            return list(map(factored_rule, layers.pieces(tensor)))
        if self._plan == "rules" and layers.owned(tensor):
            return list(map(paper_rule, layers.pieces(tensor)))
        if isinstance(self._plan, str):
            return [Rule(shape=shape)]
        told_apart = itertools.takewhile(bool, map(self._plan.keys_of, prefixed(prefix, name)))
        fitting = [keys for keys in told_apart if self._plan[keys[0]].owner_shape in (None, shape)]
        keys = min(fitting, key=lambda keys: keys[0] in self._used, default=self._plan.keys_of(name))
        if not keys:
            if len(shape) > 1:
                self.uncovered.append(name)
            return [Rule(shape=shape, reason="not in the plan", source=Source.ABSENT)]
        self._used.update(keys)
        return [self._plan[key] for key in keys]


class _Groups(Optimizer):
    """Parameter groups in the form that torch gives them."""


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
            self._index = len(substitution.memory)
            substitution._built[0] = 1
            self._is_decoupled = is_decoupled
            groups = _Groups(options.pop("params"), options)
            self._look_up(groups)
            super().__init__(groups.param_groups, plan="auto" if is_auto else None, **options)
            self._account()
            if is_auto:
                self.register_step_post_hook(disable_dynamo(lambda *_: self._account()))

        def _account(self) -> None:
            substitution.memory[self._index] = self.memory()
            substitution.undecided[self._index] = self._registry.measuring is not None

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            decay = param_group.get("weight_decay", self.defaults["weight_decay"])
            if decay != 0 and not param_group.get("decoupled_weight_decay", self._is_decoupled):
                raise PlanError(
                    f"the script builds Adam with weight_decay={decay}, an L2 penalty, which SlimAdam does not "
                    "have; use torch.optim.AdamW, or pass decoupled_weight_decay=True"
                )
            # How AdamW was to be run; SlimAdam chooses the fastest implementation that it has.
            group = {key: value for key, value in param_group.items() if key != "fused"}
            [group] = _Groups([group], self.defaults).param_groups
            if any(self._layers.name(tensor) is None for tensor in group["params"]):
                keys = {"params", "param_names"} & group.keys()
                groups = [{key: own[key] for key in keys} for own in (*self.param_groups, group)]
                self._look_up(_Groups(groups, self.defaults))
            group.pop("param_names", None)
            group["params"] = named = [(str(self._layers.name(tensor)), tensor) for tensor in group["params"]]
            if not is_auto:
                rules = {name: substitution._rules(name, tensor, self._layers, self._prefix) for name, tensor in named}
                group["plan"] = CompressionPlan.of_parameters(rules)
            super().add_param_group(group)
            if self._index in substitution.memory:
                self._account()

        def _look_up(self, groups: Optimizer) -> None:
            self._layers = NamedParameters.of_optimizer(groups)
            self._prefix = prefix_of(tensor for group in groups.param_groups for tensor in group["params"])

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
