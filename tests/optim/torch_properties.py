"""What PyTorch's own suite asks of ``torch.optim.AdamW`` on a CPU, as functions of an optimizer.

Options, error cases and schedulers come from PyTorch's optimizer database
(``torch.testing._internal.common_optimizers``, shipped in the torch wheel). A property is a function of an
``OptimizerInfo`` that raises where the optimizer does not have it, named where possible after the test that
asks for it in PyTorch's ``test/test_optim.py``. ``torch.optim.AdamW`` itself is a variant: what it does not pass
would not be a property.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_utils import TestCase

from slimadam import SlimAdam

# PyTorch's test machinery has no types, or wrong ones.
DATABASE: Any = common_optimizers
CASE: Any = TestCase()  # type: ignore[no-untyped-call]
Info = Any  # DATABASE.OptimizerInfo
Options = dict[str, Any]
Property = Callable[[Info], None]

PROPERTIES: dict[str, Property] = {}

TORCH_INFO: Info = next(info for info in DATABASE.optim_db if info.optim_cls is torch.optim.AdamW)


def variant(plan: str | None, option_inputs: Callable[..., list[Any]]) -> Info:
    """SlimAdam with a plan, as an entry of PyTorch's database: what AdamW's entry says, without ``fused``."""
    return DATABASE.OptimizerInfo(
        partial(SlimAdam, plan=plan),
        optim_inputs_func=option_inputs,
        optim_error_inputs_func=TORCH_INFO.optim_error_inputs_func,
        scheduler_inputs=TORCH_INFO.scheduler_inputs,
        supported_impls=("foreach", "differentiable"),
        not_og_supported_flags=TORCH_INFO.not_og_supported_flags,
        has_capturable_arg=True,
    )


def without_amsgrad(device: str, dtype: torch.dtype | None = None) -> list[Any]:
    """AdamW's options in the database but for amsgrad, which has no factored form."""
    inputs = TORCH_INFO.optim_inputs_func(device, dtype)
    return [given for given in inputs if not given.kwargs.get("amsgrad")]


VARIANTS: Mapping[str, Info] = {
    "AdamW": TORCH_INFO,
    "SlimAdam, plan=None": variant(None, TORCH_INFO.optim_inputs_func),
    "SlimAdam, plan='factored'": variant("factored", without_amsgrad),
}

CANNOT_APPLY: Mapping[tuple[str, str], str] = {
    ("complex_parameters", "SlimAdam, plan='factored'"): (
        "view_as_real adds a dimension, so that other elements are averaged; complex_2d compares with the parts"
    ),
    ("capturable_inputs", "AdamW"): "AdamW refuses capturable=True on a CPU",
}
"""Pairs of a property and a variant that contradict each other, and why."""

NOT_YET: Mapping[tuple[str, str], str] = {}
"""Pairs that fail because something is not built, and what."""

NOT_ON_A_CPU: Mapping[str, str] = {
    "cpu_load_state_dict": "state moves from CPU to accelerator",
    "defaults_changed_to_foreach": "the default on CUDA",
    "forloop_goes_right_direction_multigpu": "several GPUs",
    "foreach_large_tensor": "72 GB on a GPU",
    "fused_cpu_matches_cuda": "compares with CUDA",
    "fused_does_not_step_if_foundinf": "fused on CUDA",
    "fused_large_tensor": "64 GB, fused",
    "mixed_device_dtype": "several GPUs; mixed_dtypes is its part for one device",
    "peak_memory_foreach": "the CUDA allocator's statistics",
    "rosenbrock_sparse": "AdamW takes no sparse gradients; sparse_gradients_are_refused says so",
    "second_order_optims_return_consistent_types": "only optimizers that require a closure",
    "state_dict_with_cuda_params": "state moves from CPU to CUDA",
}
"""Tests of PyTorch's suite that no optimizer can run here, and why."""


FORLOOP_ONLY = ("differentiable", "fused")
"""Left out where AdamW's fused CPU kernel is wrong (it ignores strides) or refuses (complex)."""


def torch_property(function: Property) -> Property:
    """Add a property to the registry."""
    PROPERTIES[function.__name__] = function
    return function


def check(name: str, info: Info) -> None:
    """Run one property on one optimizer, from a fixed seed and with warnings as errors; raises where it fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        PROPERTIES[name](info)


# -- what properties are made of -------------------------------------------------------------------------


def equal(actual: object, expected: object, **tolerances: float) -> None:
    """PyTorch's own comparison: nested containers of tensors and anything else, tolerances by dtype."""
    CASE.assertEqual(actual, expected, **tolerances)  # noqa: PT009


def raises(error: type[Exception], message: str, function: Callable[[], object]) -> None:
    """Require an error whose message matches."""
    with pytest.raises(error, match=message):
        function()


def all_inputs(info: Info, *skip: str) -> Iterator[Options]:
    """The database's options: each with every implementation off, with each on, and left to the default.

    Args:
        info: The optimizer's entry.
        skip: Implementations left out: ``"differentiable"``, ``"fused"``.
    """
    every = DATABASE._get_optim_inputs_including_global_cliquey_kwargs
    for given in [*every("cpu", torch.float32, info, skip), *info.optim_inputs_func("cpu")]:
        yield dict(given.kwargs)


class Problem:
    """``|W x + b|**2``, the least that has a matrix and a vector to optimize."""

    def __init__(self, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        self.weight = Parameter(torch.randn(10, 5, 2, dtype=dtype)[..., 0])
        self.bias = Parameter(torch.randn(10, 2, dtype=dtype)[..., 0])
        if contiguous:
            self.weight = Parameter(self.weight.detach().contiguous())
            self.bias = Parameter(self.bias.detach().contiguous())
        self.input = torch.randn(5, dtype=dtype)

    @property
    def params(self) -> list[Parameter]:
        """Weight and bias."""
        return [self.weight, self.bias]

    def named(self, named: bool = True) -> list[Any]:
        """The parameters, with names if wanted."""
        return [("weight", self.weight), ("bias", self.bias)] if named else list(self.params)

    def backward(self) -> Tensor:
        """Loss, with fresh gradients."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def train(self, optimizer: Optimizer, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self.backward()
            optimizer.step()


def random_grads(params: Sequence[Tensor]) -> None:
    """A random gradient for each parameter."""
    for param in params:
        param.grad = torch.randn_like(param)


def step_schedulers(schedulers: Sequence[Any], loss: Tensor) -> None:
    """One step of each scheduler."""
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()


def descends(problem: Problem, optimizer: Optimizer, options: Options, schedulers: Sequence[Any] = ()) -> None:
    """After 20 steps the loss is lower, or higher where it is maximized."""
    before = problem.backward().item()
    for _ in range(20):
        problem.backward()
        loss: Any = optimizer.step(problem.backward)  # type: ignore[arg-type]
        step_schedulers(schedulers, loss)
    after = problem.backward().item()
    assert (after > before) if options.get("maximize") else (after < before), (options, before, after)


def saved(state_dict: Mapping[str, Any], weights_only: bool = True) -> Any:
    """A state dict after ``torch.save`` and ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def tensors(state: Mapping[str, Any]) -> list[Tensor]:
    """All tensors of one parameter's state, which holds nothing else."""
    assert all(isinstance(value, Tensor) for value in state.values())
    return list(state.values())


# -- construction ----------------------------------------------------------------------------------------


@torch_property
def errors(info: Info) -> None:
    """Bad parameters and options raise (or warn) as the database expects, message included."""
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        params, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
        if params is None:
            params = [Parameter(torch.randn(2, 3))]
        raises(case.error_type, case.error_regex, partial(info.optim_cls, params, **kwargs))


@torch_property
def bad_options_raise(info: Info) -> None:
    """Options out of range raise ValueError, as in the constructor of AdamW."""
    params = [Parameter(torch.randn(2, 3))]
    raises(ValueError, "Invalid learning rate: -0.1", lambda: info.optim_cls(params, lr=-0.1))
    raises(ValueError, "Invalid learning rate: nan", lambda: info.optim_cls(params, lr=float("nan")))
    raises(ValueError, "Invalid epsilon value: -1", lambda: info.optim_cls(params, eps=-1))
    raises(ValueError, "beta parameter at index 1: 1.5", lambda: info.optim_cls(params, betas=(0.8, 1.5)))
    raises(TypeError, "momentum", lambda: info.optim_cls(params, momentum=0.9))


@torch_property
def bad_params_raise(info: Info) -> None:
    """No parameters, a set, numbers and results of computations are refused."""
    param = Parameter(torch.randn(2, 3))
    raises(ValueError, "empty parameter list", lambda: info.optim_cls([]))
    raises(TypeError, "ordered|iterable", lambda: info.optim_cls([{"params": {param}}]))
    raises(TypeError, "can only optimize Tensors", lambda: info.optim_cls([1.0]))
    raises(ValueError, "non-leaf", lambda: info.optim_cls([param * 2]))


@torch_property
def add_param_group(info: Info) -> None:
    """A group added later takes the defaults and its own options; a bad one is refused and not added."""
    first, second, third = (Parameter(torch.randn(4, 3)) for _ in range(3))
    optimizer = info.optim_cls([first], lr=0.02, weight_decay=0.3)
    optimizer.add_param_group({"params": second, "weight_decay": 0.0})
    options = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert options == [(0.02, 0.3), (0.02, 0.0)]
    raises(TypeError, "must be a dict", lambda: optimizer.add_param_group([third]))
    raises(ValueError, "more than one parameter group", lambda: optimizer.add_param_group({"params": [first]}))
    raises(TypeError, "can only optimize Tensors", lambda: optimizer.add_param_group({"params": ["no"]}))
    raises(ValueError, "non-leaf", lambda: optimizer.add_param_group({"params": [third + 1]}))
    raises(ValueError, "with/without names", lambda: optimizer.add_param_group({"params": [("third", third)]}))
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]
    old = second.detach().clone()
    random_grads([first, second])
    optimizer.step()
    assert not torch.equal(second, old)


@torch_property
def optimizer_can_be_printed(info: Info) -> None:
    """``repr`` names the class, the groups and their options."""
    for options in all_inputs(info):
        shown = repr(info.optim_cls(Problem().params, **options))
        assert "Adam" in shown.splitlines()[0]
        assert "Parameter Group 0" in shown
        assert f"weight_decay: {options.get('weight_decay', 0.01)}" in shown


# -- the step --------------------------------------------------------------------------------------------


@torch_property
def forloop_goes_right_direction(info: Info) -> None:
    """20 steps lower the loss, or raise it with ``maximize``."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        descends(problem, info.optim_cls(problem.params, **options), options)


@torch_property
def noncontiguous_goes_right_direction(info: Info) -> None:
    """The same for parameters with holes in memory."""
    for options in all_inputs(info, *FORLOOP_ONLY):
        problem = Problem(contiguous=False)
        assert not problem.weight.is_contiguous()
        descends(problem, info.optim_cls(problem.params, **options), options)


@torch_property
def schedulers_go_right_direction(info: Info) -> None:
    """The same under each combination of learning-rate schedulers in the database."""
    for make_schedulers in info.scheduler_inputs:
        for options in all_inputs(info, "differentiable"):
            problem = Problem()
            optimizer = info.optim_cls(problem.params, **options)
            descends(problem, optimizer, options, [make(optimizer) for make in make_schedulers])


@torch_property
def param_group_with_lrscheduler_goes_right_direction(info: Info) -> None:
    """The same with a learning rate for each group."""
    for make_schedulers in info.scheduler_inputs:
        problem = Problem()
        optimizer = info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
        descends(problem, optimizer, {}, [make(optimizer) for make in make_schedulers])


@torch_property
def noncontiguous_equals_contiguous(info: Info) -> None:
    """Memory layout of parameter and gradient does not matter to the result."""
    for options in all_inputs(info, *FORLOOP_ONLY):
        start, grads = torch.randn(4, 3), torch.randn(3, 4, 3)
        results = []
        for strided in (False, True):
            param = Parameter(start.t().contiguous().t() if strided else start.clone())
            optimizer = info.optim_cls([param], **options)
            for index, grad in enumerate(grads):
                param.grad = grad.t().contiguous().t() if strided == (index % 2 == 0) else grad.clone()
                optimizer.step()
            results.append(param.detach())
        equal(results[1], results[0])


@torch_property
def tensor_lr(info: Info) -> None:
    """A learning rate in a tensor gives what the number gives, or is refused (``foreach``)."""
    for options in all_inputs(info, "differentiable"):
        for lr in (torch.tensor(2e-3), torch.tensor([2e-3])):
            with_number = Problem()
            with_tensor = copy.deepcopy(with_number)
            make = partial(info.optim_cls, with_tensor.params, **{**options, "lr": lr})
            if options.get("foreach"):
                raises(ValueError, "lr as a Tensor is not supported", make)
            else:
                with_number.train(info.optim_cls(with_number.params, **{**options, "lr": 2e-3}), 5)
                with_tensor.train(make(), 5)
                equal(with_tensor.params, with_number.params)


@torch_property
def tensor_betas(info: Info) -> None:
    """Betas in tensors of one element give what the numbers give, beside a number or a tensor as learning rate."""
    betas = (torch.tensor(0.8), torch.tensor(0.95))
    for options in info.optim_inputs_func("cpu"):
        for lr in (3e-3, torch.tensor(3e-3)):
            with_numbers = Problem()
            with_tensors = copy.deepcopy(with_numbers)
            shared = {**options.kwargs, "foreach": False}
            with_numbers.train(info.optim_cls(with_numbers.params, **{**shared, "lr": 3e-3, "betas": (0.8, 0.95)}), 5)
            with_tensors.train(info.optim_cls(with_tensors.params, **{**shared, "lr": lr, "betas": betas}), 5)
            equal(with_tensors.params, with_numbers.params)


@torch_property
def capturable_inputs(info: Info) -> None:
    """The database's capturable options (tensor lr, betas of any 1-element shape) give what plain ones give."""
    for given in info.optim_inputs_func("cuda"):
        options = given.kwargs
        if not options.get("capturable"):
            continue
        plain = {key: _plain(value) for key, value in options.items() if key != "capturable"}
        problem = Problem()
        expected = copy.deepcopy(problem)
        problem.train(info.optim_cls(problem.params, **options), 5)
        expected.train(info.optim_cls(expected.params, **plain), 5)
        equal(problem.params, expected.params)


def _plain(value: Any) -> Any:
    """Tensors as numbers."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) else value


@torch_property
def complex_parameters(info: Info) -> None:
    """Complex parameters step as their real views do, beside real ones."""
    for options in all_inputs(info, *FORLOOP_ONLY):
        params = [torch.randn(shape, dtype=torch.complex64) for shape in [(10, 5), (10,)]]
        params.append(torch.randn(10, 5))
        reals = [torch.view_as_real(param).clone() if param.is_complex() else param.clone() for param in params]
        optimizers = [info.optim_cls(held, **options) for held in (params, reals)]
        for _ in range(3):
            random_grads(params)
            for param, real in zip(params, reals, strict=True):
                assert param.grad is not None
                real.grad = torch.view_as_real(param.grad) if param.is_complex() else param.grad
            for optimizer in optimizers:
                optimizer.step()
            equal([torch.view_as_real(param) if param.is_complex() else param for param in params], reals)


@torch_property
def complex_2d(info: Info) -> None:
    """A complex parameter steps as its real and its imaginary part would as two parameters."""
    for options in all_inputs(info, *FORLOOP_ONLY):
        for shape in [(2,), (4, 3)]:
            param = torch.randn(shape, dtype=torch.complex64)
            parts = [param.real.clone(), param.imag.clone()]
            optimizers = [info.optim_cls([param], **options), info.optim_cls(parts, **options)]
            for _ in range(4):
                random_grads([param])
                assert param.grad is not None
                parts[0].grad, parts[1].grad = param.grad.real.clone(), 3 * param.grad.imag
                param.grad = torch.complex(parts[0].grad, parts[1].grad)
                for optimizer in optimizers:
                    optimizer.step()
                equal([param.real, param.imag], parts)


def _compare_with_forloop(info: Info, flags: Options, dtype: torch.dtype) -> None:
    """7 steps of a small network, one without gradients and two with a frozen layer; states are compared too."""
    tracker = DATABASE.TensorTracker({"atol": 5e-3, "rtol": 5e-3} if dtype.itemsize == 2 else {})
    for given in info.optim_inputs_func("cpu", dtype):
        x = torch.linspace(0.1, 0.6, 6, dtype=dtype).reshape(3, 2)
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
        model.register_parameter("scalar", Parameter(torch.tensor(0.5, dtype=dtype)))
        model.register_parameter("empty", Parameter(torch.empty(0, 3, dtype=dtype)))
        models = [model, copy.deepcopy(model)]
        both = [info.optim_cls(models[0].parameters(), **{**given.kwargs, "foreach": False})]
        both.append(info.optim_cls(models[1].parameters(), **{**given.kwargs, **flags}))
        for step in range(7):
            for one, optimizer in zip(models, both, strict=True):
                optimizer.zero_grad()
                one[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    (one(x).sum() + one.scalar.square() + one.empty.sum()).backward()  # type: ignore[operator]
                optimizer.step()
            for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
                states = [tensors(both[0].state[theirs]), tensors(both[1].state[ours])]
                for expected, actual in [(theirs, ours), *zip(*states, strict=True)]:
                    tracker.add(expected)
                    tracker.pop_check_set(actual, CASE)


@torch_property
def foreach_matches_forloop(info: Info) -> None:
    """Lists of tensors at once give what one after the other gives, state included."""
    _compare_with_forloop(info, {"foreach": True}, torch.float64)
    _compare_with_forloop(info, {"foreach": True}, torch.float32)


@torch_property
def default_matches_forloop(info: Info) -> None:
    """So does whatever is chosen by default, in each floating-point type."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _compare_with_forloop(info, {}, dtype)


@torch_property
def fused_matches_forloop(info: Info) -> None:
    """So does the fused implementation."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        _compare_with_forloop(info, {"foreach": None, "fused": True}, dtype)


@torch_property
def set_default_dtype_works_with_foreach(info: Info) -> None:
    """Steps are counted in float32, or in float64 where that is the default type."""
    before = torch.get_default_dtype()
    for default, expected in [(torch.float64, torch.float64), (torch.float16, torch.float32)]:
        try:
            torch.set_default_dtype(default)
            for flags in ({"foreach": True}, {}, {"foreach": False}):
                problem = Problem(torch.float64)
                optimizer = info.optim_cls(problem.params, **flags)
                problem.train(optimizer, 2)
                steps = [state["step"] for state in optimizer.state.values()]
                assert [(step.dtype, step.item()) for step in steps] == [(expected, 2)] * 2
        finally:
            torch.set_default_dtype(before)


@torch_property
def mixed_dtypes(info: Info) -> None:
    """Parameters of several types in one optimizer step as each would in its own."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for options in all_inputs(info, "differentiable"):
        params = [torch.randn(2, 3, dtype=dtype) for dtype in dtypes]
        alone = [param.clone() for param in params]
        optimizers = [info.optim_cls(params, **options), *(info.optim_cls([one], **options) for one in alone)]
        for _ in range(5):
            random_grads(params)
            for one, param in zip(alone, params, strict=True):
                one.grad = param.grad
            for optimizer in optimizers:
                optimizer.step()
        equal(params, alone, rtol=0, atol=0)


@torch_property
def param_groups_weight_decay(info: Info) -> None:
    """Each group has its own weight decay: without gradients' pull only the decaying one shrinks."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        groups = [
            {"params": [problem.weight], **options, "weight_decay": 0.4, "lr": 0.1},
            {"params": [problem.bias], **options, "weight_decay": 0.0, "lr": 0.1},
        ]
        weight, bias = (param.detach().clone() for param in problem.params)
        optimizer = info.optim_cls(groups)
        for param in problem.params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        equal(problem.params, [Parameter(weight * (1 - 0.1 * 0.4)), Parameter(bias)])


@torch_property
def param_groups_lr(info: Info) -> None:
    """Each group has its own learning rate: one that is almost zero does not move."""
    for options in all_inputs(info, "differentiable"):
        problem, irrelevant = Problem(), Parameter(torch.randn(2))
        before = irrelevant.detach().clone()
        relevant = {"params": problem.params, "lr": 1e-3, **options}
        optimizer = info.optim_cls([relevant, {"params": [irrelevant]}], lr=1e-28)
        irrelevant.grad = torch.rand_like(irrelevant)
        descends(problem, optimizer, options)
        assert torch.equal(irrelevant, before)


@torch_property
def step_is_noop_when_params_have_no_grad(info: Info) -> None:
    """Without gradients nothing changes, no state is made, and the closure's value comes back."""
    for options in all_inputs(info):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = copy.deepcopy(params)
        optimizer = info.optim_cls(params, **options)
        assert optimizer.step(lambda: torch.tensor([7.0])) == 7
        assert optimizer.step() is None
        assert torch.equal(params[0], before[0])
        assert torch.equal(params[1], before[1])
        assert not any(optimizer.state.values())


@torch_property
def step_is_noop_for_zero_grads(info: Info) -> None:
    """Zero gradients move nothing but by weight decay."""
    for options in all_inputs(info):
        for decay in (0.0, 0.2):
            param = torch.randn(5, 4)
            expected = param * (1 - 0.05 * decay)
            optimizer = info.optim_cls([param], **{**options, "lr": 0.05, "weight_decay": decay})
            param.grad = torch.zeros_like(param)
            optimizer.step()
            equal(param, expected)


@torch_property
def empty_parameters(info: Info) -> None:
    """Parameters without elements step, beside others that are not disturbed by them."""
    for options in all_inputs(info, "differentiable"):
        full = Parameter(torch.randn(4, 3))
        alone = copy.deepcopy(full)
        empties = [Parameter(torch.empty(shape)) for shape in [(0,), (0, 3), (3, 0), (2, 0, 4)]]
        optimizers = [info.optim_cls([*empties, full], **options), info.optim_cls([alone], **options)]
        for _ in range(3):
            random_grads([*empties, full])
            alone.grad = full.grad
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(full, alone)
        assert [optimizers[0].state[param]["step"].item() for param in empties] == [3] * 4


@torch_property
def non_empty_state(info: Info) -> None:
    """After a step every parameter has AdamW's state; of a factored matrix's second moment rows and columns."""
    is_factored = getattr(info.optim_cls, "keywords", {}).get("plan") == "factored"
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 1)
        keys = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if options.get("amsgrad") else set())
        of_weight = {"step", "exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"} if is_factored else keys
        assert [set(optimizer.state[param]) for param in problem.params] == [of_weight, keys]


@torch_property
def sparse_gradients_are_refused(info: Info) -> None:
    """A sparse gradient raises and is not taken for a dense one."""
    for options in all_inputs(info, "differentiable"):
        param = Parameter(torch.randn(4, 3))
        param.grad = torch.randn(4, 3).to_sparse()
        raises(RuntimeError, "sparse gradients.*SparseAdam", info.optim_cls([param], **options).step)


@torch_property
def zero_grad(info: Info) -> None:
    """Gradients become None, or zero without losing their memory."""
    problem = Problem()
    optimizer = info.optim_cls(problem.params)
    problem.backward()
    kept = problem.weight.grad
    optimizer.zero_grad(set_to_none=False)
    assert problem.weight.grad is kept
    assert kept is not None
    assert not kept.any()
    optimizer.zero_grad()
    assert problem.weight.grad is None


@torch_property
def closure_is_called_once_with_gradients_enabled(info: Info) -> None:
    """``step(closure)`` evaluates under autograd even inside ``no_grad``, once, and returns its value."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        calls: list[float] = []

        def closure(problem: Problem = problem, calls: list[float] = calls) -> Tensor:
            loss = problem.backward()
            calls.append(loss.item())
            return loss

        with torch.no_grad():
            loss = info.optim_cls(problem.params, **options).step(closure)
        assert calls == [loss.item()]


@torch_property
def params_on_meta(info: Info) -> None:
    """Parameters on the meta device step, and their state is there."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = info.optim_cls(model.parameters(), foreach=False)
    random_grads(list(model.parameters()))
    optimizer.step()
    assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"meta"}


@torch_property
def fused_error_on_params_on_meta(info: Info) -> None:
    """``fused=True`` refuses parameters on the meta device at the step, and works once they are real."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = info.optim_cls(model.parameters(), fused=True)
    random_grads(list(model.parameters()))
    raises(RuntimeError, "`fused=True` requires all the params", optimizer.step)
    optimizer.zero_grad()
    model.to_empty(device="cpu")
    random_grads(list(model.parameters()))
    optimizer.step()


@torch_property
def profiler_sees_step_and_zero_grad(info: Info) -> None:
    """The profiler shows both under the optimizer's class."""
    problem = Problem()
    optimizer = info.optim_cls(problem.params)
    problem.backward()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        optimizer.step()
        optimizer.zero_grad()
    recorded = {event.name for event in profile.function_events or ()}
    kind = type(optimizer).__name__
    assert {f"Optimizer.step#{kind}.step", f"Optimizer.zero_grad#{kind}.zero_grad"} <= recorded


# -- state dicts and copies ------------------------------------------------------------------------------


def _without_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """State and groups, names left out: they need not agree."""
    groups = [
        {key: value for key, value in group.items() if key != "param_names"} for group in state_dict["param_groups"]
    ]
    return {"state": state_dict["state"], "param_groups": groups}


@torch_property
def state_dict_deterministic(info: Info) -> None:
    """A loaded optimizer goes on as the saved one, and equal parameters have equal state dicts, names or not."""
    for options in all_inputs(info, "differentiable"):
        for named in ((False, False), (True, False), (False, True), (True, True)):
            problem = Problem()
            optimizer = info.optim_cls(problem.named(named[0]), **options)
            problem.train(optimizer, 4)
            resumed = copy.deepcopy(problem)
            copied = info.optim_cls(resumed.named(named[1]), **options)
            state_dict = copy.deepcopy(optimizer.state_dict())
            copied.load_state_dict(state_dict)
            equal(state_dict, optimizer.state_dict())
            problem.train(optimizer, 4)
            resumed.train(copied, 4)
            equal(resumed.params, problem.params, rtol=0, atol=0)
            equal(_without_names(copied.state_dict()), _without_names(optimizer.state_dict()), rtol=0, atol=0)
            copied.param_groups.extend(copied.param_groups)
            repeated = _without_names(copied.state_dict())["param_groups"][-1]
            equal(repeated, _without_names(optimizer.state_dict())["param_groups"][-1])


@torch_property
def can_load_older_state_dict(info: Info) -> None:
    """State dicts from before an option existed load, and training goes on."""
    for options in all_inputs(info, "differentiable"):
        model = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2))
        optimizer = info.optim_cls(model.parameters(), **options)
        x = torch.rand(1, 4, 16, 16)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in info.not_og_supported_flags:
                group.pop(flag, None)
        optimizer.load_state_dict(old)
        optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {4}


@torch_property
def can_load_from_to_named_state_dict(info: Info) -> None:
    """Optimizers with and without names load each other's state; names from either side are kept."""
    for options in all_inputs(info, "differentiable"):
        for source_named, target_named in ((False, True), (True, False), (True, True), (False, False)):
            problem = Problem()
            source = info.optim_cls(problem.named(source_named), **options)
            problem.train(source, 3)
            target = info.optim_cls(problem.named(target_named), **options)
            target.load_state_dict(copy.deepcopy(source.state_dict()))
            problem.train(target, 1)
            names = target.state_dict()["param_groups"][0].get("param_names")
            assert names == (["weight", "bias"] if source_named or target_named else None)


@torch_property
def save_load_equality_with_weights_only(info: Info) -> None:
    """``torch.save`` and ``torch.load``, with and without ``weights_only``, give the same state dict."""
    for options in all_inputs(info, "differentiable"):
        for named in (False, True):
            problem = Problem()
            optimizer = info.optim_cls(problem.named(named), **options)
            problem.train(optimizer, 3)
            state_dict = optimizer.state_dict()
            for weights_only in (False, True):
                equal(saved(state_dict, weights_only), state_dict, rtol=0, atol=0)


@torch_property
def load_nontensor_step(info: Info) -> None:
    """Step counts saved as numbers load, and counting goes on."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 3)
        state_dict = copy.deepcopy(optimizer.state_dict())
        for state in state_dict["state"].values():
            state["step"] = state["step"].item()
        optimizer.load_state_dict(state_dict)
        problem.train(optimizer, 1)
        assert [state["step"].item() for state in optimizer.state.values()] == [4, 4]


@torch_property
def state_dict_loads_into_another_dtype(info: Info) -> None:
    """State saved with float32 parameters goes on with float64 ones, and comes in their type."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 3)
        wide = Problem(torch.float64)
        loaded = info.optim_cls(wide.params, **options)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for mine, theirs in zip(loaded.state.values(), optimizer.state.values(), strict=True):
            moments = [
                tensors({key: value for key, value in state.items() if key != "step"}) for state in (mine, theirs)
            ]
            assert {moment.dtype for moment in moments[0]} == {torch.float64}
            equal(moments[0], [moment.double() for moment in moments[1]], rtol=0, atol=0)
        wide.train(loaded, 1)


@torch_property
def mismatched_state_dict_raises(info: Info) -> None:
    """Another number of groups, or of parameters in one, is refused and nothing is loaded."""
    problem = Problem()
    optimizer = info.optim_cls(problem.params, lr=0.02)
    problem.train(optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    groups = info.optim_cls([{"params": [param]} for param in Problem().params], lr=0.03).state_dict()
    raises(ValueError, "different number of parameter groups", lambda: optimizer.load_state_dict(groups))
    fewer = info.optim_cls([Problem().weight], lr=0.03).state_dict()
    raises(ValueError, "doesn't match the size of optimizer's group", lambda: optimizer.load_state_dict(fewer))
    equal(optimizer.state_dict(), before)


@torch_property
def deepcopy_copies_all_public_attrs(info: Info) -> None:
    """A deep copy has the same public attributes, and trains its own parameters as the original does."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 3)
        problem_copy, optimizer_copy = copy.deepcopy((problem, optimizer))
        _trains_on(problem, optimizer, problem_copy, optimizer_copy)


@torch_property
def pickled_trains_on(info: Info) -> None:
    """So does one that was pickled together with its parameters."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 3)
        problem_copy, optimizer_copy = pickle.loads(pickle.dumps((problem, optimizer)))
        _trains_on(problem, optimizer, problem_copy, optimizer_copy)


def _trains_on(problem: Problem, optimizer: Optimizer, problem_copy: Problem, optimizer_copy: Optimizer) -> None:
    """The copy has the same public attributes and takes the same three steps on its own parameters."""
    public = [{name for name in vars(one) if not name.startswith("_")} for one in (optimizer, optimizer_copy)]
    assert public[0] == public[1]
    assert problem_copy.weight is not problem.weight
    problem.train(optimizer, 3)
    problem_copy.train(optimizer_copy, 3)
    equal(problem_copy.params, problem.params, rtol=0, atol=0)
    equal(optimizer_copy.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


# -- hooks -----------------------------------------------------------------------------------------------


def _mark_state(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index]


def _take_mark(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {}, "was_marked": "test" in state_dict["state"]}


@torch_property
def state_dict_pre_hook(info: Info) -> None:
    """A hook before ``state_dict()`` may change what is saved."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.rand(2, 3)], **options)
        optimizer.register_state_dict_pre_hook(_mark_state)
        assert optimizer.state_dict()["state"]["test"] == 1


@torch_property
def state_dict_post_hook(info: Info) -> None:
    """A hook after it may replace the result."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.rand(2, 3)], **options)
        optimizer.register_state_dict_post_hook(_take_mark)
        assert optimizer.state_dict()["was_marked"] is False


@torch_property
def state_dict_pre_post_hook(info: Info) -> None:
    """Both together, in order; ``prepend`` puts a hook first, and a removed one is silent."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.rand(2, 3)], **options)
        optimizer.register_state_dict_post_hook(_take_mark)
        mark = optimizer.register_state_dict_pre_hook(_mark_state)
        seen: list[str] = []
        for name, prepend in (("last", False), ("first", True)):
            optimizer.register_state_dict_pre_hook(lambda _, n=name, s=seen: s.append(f"pre {n}"), prepend=prepend)
            optimizer.register_state_dict_post_hook(lambda _, d, n=name, s=seen: s.append(f"post {n}"), prepend=prepend)
        assert optimizer.state_dict()["was_marked"] is True
        assert seen == ["pre first", "pre last", "post first", "post last"]
        mark.remove()
        optimizer.state.clear()
        assert optimizer.state_dict()["was_marked"] is False


def _lower_lr(_: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["lr"] = 0.002


def _copy_with_higher_lr(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    replaced = copy.deepcopy(state_dict)
    replaced["param_groups"][0]["lr"] = 0.003
    return replaced


@torch_property
def load_state_dict_pre_hook_and_prepend(info: Info) -> None:
    """A hook before loading may change or replace the state dict; ``prepend`` puts it first."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.rand(2, 3)], **options)
        state_dict = optimizer.state_dict()
        optimizer.register_load_state_dict_pre_hook(_lower_lr)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(_copy_with_higher_lr, prepend=True)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.002
        optimizer.register_load_state_dict_pre_hook(_copy_with_higher_lr)
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.003


@torch_property
def load_state_dict_pre_post_hook(info: Info) -> None:
    """Hooks after loading see the loaded optimizer, and may write into its state."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.rand(2, 3)], **options)
        seen: list[tuple[str, float]] = []
        for name, prepend in (("last", False), ("first", True)):
            optimizer.register_load_state_dict_post_hook(
                lambda held, n=name, s=seen: s.append((n, held.param_groups[0]["lr"])), prepend=prepend
            )
        optimizer.register_load_state_dict_pre_hook(_copy_with_higher_lr)
        optimizer.register_load_state_dict_post_hook(_mark_state)
        optimizer.load_state_dict(state_dict=optimizer.state_dict())
        assert seen == [("first", 0.003), ("last", 0.003)]
        assert optimizer.state["test"] == 1


@torch_property
def step_hooks(info: Info) -> None:
    """Hooks around a step fire once each and get the step's arguments; a removed one is silent."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.ones(2)], **options)
        seen: list[Any] = []
        handles = [
            optimizer.register_step_pre_hook(lambda held, args, kwargs, s=seen: s.append(("pre", held, args, kwargs))),
            optimizer.register_step_post_hook(
                lambda held, args, kwargs, s=seen: s.append(("post", held, args, kwargs))
            ),
        ]
        optimizer.step()
        optimizer.step(closure=None)
        arguments: list[Options] = [{}, {"closure": None}]
        assert seen == [(when, optimizer, (optimizer,), given) for given in arguments for when in ("pre", "post")]
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert len(seen) == 4


@torch_property
def step_pre_hook_may_replace_arguments(info: Info) -> None:
    """What a hook before the step returns becomes the step's arguments; anything but a pair is refused."""
    for options in all_inputs(info):
        optimizer = info.optim_cls([torch.ones(2)], **options)
        handle = optimizer.register_step_pre_hook(lambda held, args, kwargs: ((held, lambda: 5.0), {}))
        assert optimizer.step() == 5.0
        handle.remove()
        optimizer.register_step_pre_hook(lambda *_: 3)
        raises(RuntimeError, "must return None or a tuple of", optimizer.step)


@torch_property
def step_all_hooks(info: Info) -> None:
    """Global hooks enclose the optimizer's own, for each optimizer of the process."""
    for options in all_inputs(info):
        params = [torch.ones(2, 3)]
        seen: list[str] = []
        optimizers = [info.optim_cls(params, **options), SGD(params)]
        handles = [
            register_optimizer_step_pre_hook(lambda *_, s=seen: s.append("global pre")),
            register_optimizer_step_post_hook(lambda *_, s=seen: s.append("global post")),
        ]
        for optimizer in optimizers:
            handles.append(optimizer.register_step_pre_hook(lambda *_, s=seen: s.append("pre")))
            handles.append(optimizer.register_step_post_hook(lambda *_, s=seen: s.append("post")))
        for optimizer in [*optimizers, optimizers[0]]:
            optimizer.step()
        for handle in handles:
            handle.remove()
        optimizers[0].step()
        assert seen == ["global pre", "pre", "post", "global post"] * 3


# -- autograd through the step ---------------------------------------------------------------------------


def _gradcheck(info: Info, options: Options, hyperparameters: Mapping[str, Tensor]) -> None:
    """Compare autograd through two steps with finite differences in all that they depend on.

    With amsgrad it is one step: AdamW modifies in place what the maximum needs for its gradient.
    """
    start, *grads = (torch.rand(3, 2, dtype=torch.float64) for _ in range(2 if options.get("amsgrad") else 3))
    moments, restore = _moments(info, options, start)
    tensors_of = [start, *grads, *moments]
    leaves = [tensor.requires_grad_() for tensor in tensors_of] + list(hyperparameters.values())

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        param, *rest = inputs
        values: Options = dict(zip(hyperparameters, rest[len(grads) + len(moments) :], strict=True))
        if "beta1" in values:
            values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        param = param.clone()
        optimizer = info.optim_cls([param], differentiable=True, **{**options, **values})
        optimizer.state[param].update(restore(rest[len(grads) : len(grads) + len(moments)]))
        for grad in rest[: len(grads)]:
            param.grad = grad
            optimizer.step()
        return (param, *(tensor for tensor in tensors(optimizer.state[param]) if tensor.requires_grad))

    assert torch.autograd.gradcheck(run, leaves)


def _moments(info: Info, options: Options, like: Tensor) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Options]]:
    """Random moments for a parameter, and what makes a state of (other) moments."""
    param = torch.rand_like(like)
    param.grad = torch.ones_like(param)
    optimizer = info.optim_cls([param], **options)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[param].items() if key != "step"}

    def restore(moments: Sequence[Tensor]) -> Options:
        held = dict(zip(state, (moment.clone() for moment in moments), strict=True))
        return {**held, "step": torch.tensor(10.0, dtype=torch.float64)}

    return [torch.rand_like(moment).add_(0.1) for moment in tensors(state)], restore


@torch_property
def differentiable(info: Info) -> None:
    """Autograd through two steps agrees with finite differences: parameter, gradients and state."""
    for given in info.optim_inputs_func("cpu"):
        _gradcheck(info, {**given.kwargs, "lr": 0.3, "betas": (0.8, 0.95)}, {})


def _differentiates(info: Info, *names: str) -> None:
    values = {"lr": 0.3, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.95}
    for given in info.optim_inputs_func("cpu"):
        leaves = {name: torch.tensor(values[name], dtype=torch.float64, requires_grad=True) for name in names}
        _gradcheck(info, {key: value for key, value in given.kwargs.items() if key not in names}, leaves)


@torch_property
def differentiable_lr(info: Info) -> None:
    """So it does for a learning rate that requires gradients."""
    _differentiates(info, "lr")


@torch_property
def differentiable_weight_decay(info: Info) -> None:
    """So it does for weight decay."""
    _differentiates(info, "weight_decay")


@torch_property
def differentiable_betas(info: Info) -> None:
    """So it does for betas."""
    _differentiates(info, "beta1", "beta2")


@torch_property
def differentiable_all_hyperparameters(info: Info) -> None:
    """So it does for all of them at once."""
    _differentiates(info, "lr", "weight_decay", "beta1", "beta2")


# -- memory and threads ----------------------------------------------------------------------------------


@torch_property
def state_in_shared_memory_stays_there(info: Info) -> None:
    """Parameters and state moved to shared memory are updated in place, as asynchronous training needs."""
    for options in all_inputs(info, "differentiable"):
        problem = Problem()
        optimizer = info.optim_cls(problem.params, **options)
        problem.train(optimizer, 1)
        held: list[Any] = [*problem.params, *(one for state in optimizer.state.values() for one in tensors(state))]
        for tensor in held:
            tensor.detach().share_memory_()
        before = [(tensor.data_ptr(), tensor.detach().clone()) for tensor in held]
        problem.train(optimizer, 1)
        after: list[Any] = [*problem.params, *(one for state in optimizer.state.values() for one in tensors(state))]
        for tensor, (address, value) in zip(after, before, strict=True):
            assert tensor.data_ptr() == address
            assert tensor.is_shared()
            assert not torch.equal(tensor, value)


@torch_property
def threads_do_not_disturb_each_other(info: Info) -> None:
    """Optimizers of several threads give what they give one after the other."""
    for options in all_inputs(info, "differentiable"):
        problems = [Problem() for _ in range(3)]
        expected = copy.deepcopy(problems)
        for problem in expected:
            problem.train(info.optim_cls(problem.params, **options), 5)
        threads = [
            threading.Thread(target=problem.train, args=(info.optim_cls(problem.params, **options), 5))
            for problem in problems
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for problem, alone in zip(problems, expected, strict=True):
            equal(problem.params, alone.params, rtol=0, atol=0)
