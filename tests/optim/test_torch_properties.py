"""SlimAdam has the properties that PyTorch's own suite asks of AdamW."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.correctness.torch_properties import CANNOT, FAILS, PASSES, outcome, share
from slimadam import SlimAdam
from tests.optim.torch_properties import CANNOT_APPLY, NOT_ON_A_CPU, NOT_YET, PROPERTIES, VARIANTS, check
from tests.versions import TORCH

EXCUSED = {**CANNOT_APPLY, **NOT_YET}
LATER_ADAMW = frozenset(
    {"tensor_lr", "sparse_gradients_are_refused", "differentiable", "differentiable_lr", "differentiable_betas"}
    | {"differentiable_weight_decay", "differentiable_all_hyperparameters"}
)
ASKED = [(name, variant) for name in PROPERTIES for variant in VARIANTS if (name, variant) not in EXCUSED]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Tensors of ten elements gain nothing from a second thread, and wait for it on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "variant"), ASKED)
def test_property(name: str, variant: str) -> None:
    if variant == "AdamW" and TORCH < (2, 11) and name in LATER_ADAMW:
        pytest.skip(f"the AdamW of torch {torch.__version__} does not have it; SlimAdam does")
    check(name, VARIANTS[variant])


@pytest.mark.parametrize(("name", "variant"), EXCUSED)
def test_what_is_excused_really_fails(name: str, variant: str) -> None:
    with pytest.raises((NotImplementedError, AssertionError)):
        check(name, VARIANTS[variant])


def test_what_cannot_run_here_is_not_run_under_the_same_name() -> None:
    assert not set(NOT_ON_A_CPU) & set(PROPERTIES)


class FiresHooksTwice(SlimAdam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class ForgetsState(SlimAdam):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class IgnoresGroupOptions(SlimAdam):
    def add_param_group(self, param_group: Any) -> None:
        super().add_param_group({key: value for key, value in param_group.items() if key == "params"})


class ReplacesState(SlimAdam):
    def _init_group(self, group: Any) -> None:
        super()._init_group(group)
        for state in self.state.values():
            state.update({key: copy.deepcopy(value) for key, value in state.items()})


class StopsGradients(SlimAdam):
    def _init_group(self, group: Any) -> None:
        super()._init_group(group)
        for param in group["params"]:
            param.grad = None if param.grad is None else param.grad.detach()


class TakesNoneForZero(SlimAdam):
    def _init_group(self, group: Any) -> None:
        for param in group["params"]:
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        super()._init_group(group)


@pytest.mark.parametrize(
    ("broken", "noticed_by"),
    [
        (FiresHooksTwice, ["step_hooks", "step_all_hooks"]),
        (ForgetsState, ["state_dict_deterministic", "load_nontensor_step", "state_dict_loads_into_another_dtype"]),
        (IgnoresGroupOptions, ["param_groups_lr", "param_groups_weight_decay"]),
        (ReplacesState, ["state_in_shared_memory_stays_there"]),
        (StopsGradients, ["differentiable", "differentiable_lr"]),
        (TakesNoneForZero, ["step_is_noop_when_params_have_no_grad"]),
    ],
)
def test_a_broken_optimizer_is_noticed(broken: type[SlimAdam], noticed_by: list[str]) -> None:
    info = copy.copy(VARIANTS["SlimAdam, plan=None"])
    info.optim_cls = partial(broken, plan=None)
    for name in noticed_by:
        with pytest.raises(Exception):  # noqa: B017, PT011
            check(name, info)


def test_the_benchmark_counts_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise ValueError("first line\nsecond line")

    monkeypatch.setitem(PROPERTIES, "errors", fails)
    assert outcome("errors", "AdamW") == (FAILS, "ValueError: first line")
    assert outcome("zero_grad", "AdamW") == (PASSES, "")
    assert outcome("capturable_inputs", "AdamW")[0] == CANNOT
    counted = share({"a": PASSES, "b": FAILS, "c": PASSES, "d": CANNOT, "e": PASSES})
    assert counted == {"passed": 3, "applicable": 4, "share": 0.75}
