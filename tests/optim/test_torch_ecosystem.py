"""SlimAdam among what is used around an optimizer: schedulers, averaging, loss scaling, hooks, torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import state_dict as dcp
from torch.nn.utils import parametrizations
from torch.optim import AdamW, Optimizer, lr_scheduler, swa_utils

from slimadam import CompressionPlan, Rule, SlimAdam
from slimadam.layers.splits import Part
from tests.optim.torch_properties import equal
from tests.versions import TORCH

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
MEAN = CompressionPlan({"0.weight": Rule((1,), "mean"), "2.weight": Rule((0,), "mean")})
PARTS = CompressionPlan(
    {
        "0.weight[query]": Rule((1,), "mean", (3, 5), part=Part("query", (7, 5), (7, 5), 0, 0, 3)),
        "0.weight[value]": Rule(form="factored", shape=(4, 5), part=Part("value", (7, 5), (7, 5), 0, 3, 4)),
    }
)
CODES = CompressionPlan({"0.weight": Rule(form="float8"), "2.weight": Rule(form="float8")})
PLANS: dict[str, Any] = {"none": None, "mean": MEAN, "factored": "factored", "float8": CODES}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
Make = Callable[..., Optimizer]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slim(plan: Any) -> Make:
    """A constructor of SlimAdam with a plan."""
    return lambda params, **options: SlimAdam(params, plan=plan, **{**OPTIONS, **options})


def adamw(params: Any, **options: Any) -> Optimizer:
    """AdamW with the same options."""
    return AdamW(params, **{**OPTIONS, **options})


def network() -> nn.Sequential:
    """A small network, the same each time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model: nn.Module, seed: int) -> Tensor:
    """Loss and gradients (added to what there is) on the batch of a seed."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(x).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """A step for each seed."""
    for seed in steps:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def assert_same_parameters(actual: nn.Module, expected: nn.Module, exact: bool = False) -> None:
    """Equal parameters: to the last bit, or to the rounding of a dozen steps of 0.02."""
    tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


# -- schedulers ------------------------------------------------------------------------------------------


def _sequential(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.2, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 8)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


def _chained(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.3, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.4),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 7], 0.3),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, total_iters=5),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=8),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": _sequential,
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9, eta_min=1e-3),
    "ChainedScheduler": _chained,
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.3, patience=1),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 0.03, step_size_up=4, base_momentum=0.6),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 5),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.04, total_steps=14, base_momentum=0.6),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 10, power=2.0),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 1e-3, anneal_epochs=6),
}
CYCLE_BETA1 = ("CyclicLR", "OneCycleLR")


def _two_groups(make: Make, model: nn.Sequential, tensor_lr: bool) -> Optimizer:
    rates = [torch.tensor(lr) if tensor_lr else lr for lr in (0.02, 0.005)]
    return make(
        [{"params": model[0].parameters(), "lr": rates[0]}, {"params": model[2].parameters(), "lr": rates[1]}],
        lr=rates[0],
    )


def _scheduled(model: nn.Module, optimizer: Optimizer, scheduler: Any, steps: range) -> list[tuple[float, float]]:
    """Train under a scheduler; returns learning rate and beta1 of each step and group."""
    seen = []
    for seed in steps:
        seen += [(float(group["lr"]), float(group["betas"][0])) for group in optimizer.param_groups]
        train(model, optimizer, range(seed, seed + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return seen


def test_every_scheduler_of_torch_is_here() -> None:
    assert set(SCHEDULERS) == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduled_training_is_adamws(name: str, tensor_lr: bool) -> None:
    runs = []
    for make in (adamw, slim(None)):
        model = network()
        optimizer = _two_groups(make, model, tensor_lr)
        seen = _scheduled(model, optimizer, SCHEDULERS[name](optimizer), range(12))
        kept = isinstance(optimizer.param_groups[0]["lr"], Tensor)
        assert kept == tensor_lr or (TORCH < (2, 7) and name == "ReduceLROnPlateau")  # makes it a float there
        runs.append((model, seen))
    (theirs, expected), (ours, seen) = runs
    assert seen == expected
    assert len({lr for lr, _ in seen[::2]}) > 1
    assert (len({beta1 for _, beta1 in seen}) > 2) == (name in CYCLE_BETA1)
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduled_training_resumes(name: str) -> None:
    make = slim("factored")
    model = network()
    optimizer = _two_groups(make, model, False)
    scheduler = SCHEDULERS[name](optimizer)
    _scheduled(model, optimizer, scheduler, range(5))
    resumed = copy.deepcopy(model)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    _scheduled(model, optimizer, scheduler, range(5, 12))

    resumed_optimizer = _two_groups(make, resumed, False)
    resumed_scheduler = SCHEDULERS[name](resumed_optimizer)
    resumed_optimizer.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    _scheduled(resumed, resumed_optimizer, resumed_scheduler, range(5, 12))
    assert_same_parameters(resumed, model, exact=True)


# -- weight averaging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_avg_fn", [swa_utils.get_swa_multi_avg_fn(), swa_utils.get_ema_multi_avg_fn(0.7)])
def test_averaged_weights_are_adamws(multi_avg_fn: Any) -> None:
    averages = []
    for make in (adamw, slim(None)):
        model = network()
        average = swa_utils.AveragedModel(model, multi_avg_fn=multi_avg_fn)
        optimizer = make(model.parameters())
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.005, anneal_epochs=3)
        for step in range(6):
            _scheduled(model, optimizer, scheduler, range(step, step + 1))
            average.update_parameters(model)
        assert average.n_averaged == 6
        averages.append(average)
    assert_same_parameters(averages[1], averages[0])
    assert not torch.equal(averages[1].module[0].weight, model[0].weight)


# -- gradients: scaled, clipped, accumulated, used at once -----------------------------------------------


def _state(optimizer: Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict()["state"])


def assert_same_state(optimizer: Optimizer, expected: Any) -> None:
    """State bit by bit."""
    equal(_state(optimizer), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps_before", [0, 2])
@every_plan
def test_grad_scaler_skips_infinite_steps_and_changes_no_others(
    plan: Any, steps_before: int, dtype: torch.dtype
) -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = slim(plan)(model.named_parameters())
    train(model, optimizer, range(steps_before))
    plain = copy.deepcopy(model)
    plain_optimizer = slim(plan)(plain.named_parameters())
    plain_optimizer.load_state_dict(optimizer.state_dict())

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(torch.linspace(-1, 1, 20).reshape(4, 5)).float().square().mean()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    before, state = copy.deepcopy(model), _state(optimizer)
    scaled_step(float("inf"))
    assert_same_parameters(model, before, exact=True)
    assert_same_state(optimizer, state)
    assert scaler.get_scale() == 2.0**7

    scaled_step(1.0)
    assert scaler.get_scale() == 2.0**7
    for param, unscaled in zip(plain.parameters(), model.parameters(), strict=True):
        assert unscaled.grad is not None
        param.grad = unscaled.grad.clone()
    plain_optimizer.step()
    assert_same_parameters(plain, model, exact=True)
    assert_same_state(plain_optimizer, _state(optimizer))
    assert not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("maximize", [False, True])
@every_plan
def test_accumulated_gradients_are_left_as_they_are(plan: Any, maximize: bool) -> None:
    model = network()
    optimizer = slim(plan)(model.named_parameters(), maximize=maximize)
    for seed in range(3):
        for micro_batch in range(2):
            backward(model, 10 * seed + micro_batch)
        before = [(param.grad, copy.deepcopy(param.grad)) for param in model.parameters()]
        optimizer.step()
        for param, (grad, value) in zip(model.parameters(), before, strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)


def test_clipped_and_accumulated_training_is_adamws() -> None:
    models = []
    for make in (adamw, slim(None)):
        model = network()
        optimizer = make(model.parameters())
        for seed in range(8):
            optimizer.zero_grad()
            for micro_batch in range(3):
                backward(model, 10 * seed + micro_batch)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            assert norm > 0.05
            optimizer.step()
        models.append(model)
    assert_same_parameters(models[1], models[0])


@every_plan
def test_one_optimizer_per_parameter_in_backward_equals_one_for_all(plan: Any) -> None:
    together, apart = network(), network()
    train(together, slim(plan)(together), range(6))

    def step_and_free(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    optimizers = {param: slim(plan)([param], model=apart) for param in apart.parameters()}
    for param in apart.parameters():
        param.register_post_accumulate_grad_hook(step_and_free)
    for seed in range(6):
        backward(apart, seed)
        assert all(param.grad is None for param in apart.parameters())
    assert_same_parameters(apart, together, exact=True)
    assert [form for optimizer in optimizers.values() for form in _forms(optimizer)] == _forms(slim(plan)(together))


def _forms(optimizer: Optimizer) -> list[Any]:
    assert isinstance(optimizer, SlimAdam)
    return [(rule.form, rule.dims) for rule in optimizer.plan.values()]


# -- parameters of unusual kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@every_plan
def test_views_into_a_flat_buffer_step_as_separate_parameters(plan: Any, transposed: bool) -> None:
    apart, flat = network(), network()
    sizes = [param.numel() for param in flat.parameters()]
    weights, grads = torch.zeros(2, sum(sizes) + 3).unbind()
    offset = 3
    for module in (flat[0], flat[2]):
        for name, param in list(module.named_parameters()):
            shape = param.shape[::-1] if transposed else param.shape
            views = [flat_one[offset : offset + param.numel()].view(shape) for flat_one in (weights, grads)]
            weight, grad = (view.t() if transposed and param.dim() == 2 else view for view in views)
            weight.copy_(param.detach())
            setattr(module, name, nn.Parameter(weight))
            getattr(module, name).grad = grad
            offset += param.numel()
    apart_optimizer, optimizer = slim(plan)(apart), slim(plan)(flat)
    for seed in range(5):
        train(apart, apart_optimizer, range(seed, seed + 1))
        optimizer.zero_grad(set_to_none=False)
        backward(flat, seed)
        optimizer.step()
    assert_same_parameters(flat, apart)
    assert not weights[:3].any()
    in_order = [param.t() if transposed and param.dim() == 2 else param for param in apart.parameters()]
    torch.testing.assert_close(weights[3:], torch.cat([param.flatten() for param in in_order]), rtol=1e-5, atol=1e-6)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


def _parametrized(name: str) -> nn.Sequential:
    model = network()
    PARAMETRIZATIONS[name](model[0])
    return model


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_layers_train_as_with_adamw(name: str) -> None:
    theirs, ours = _parametrized(name), _parametrized(name)
    train(theirs, adamw(theirs.parameters()), range(8))
    train(ours, slim(None)(ours), range(8))
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("plan", ["rules", "factored"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_layers_train_with_a_plan(name: str, plan: str) -> None:
    model = _parametrized(name)
    optimizer = slim(plan)(model)
    before = backward(model, 0).item()
    train(model, optimizer, range(20))
    assert backward(model, 0).item() < 0.7 * before
    originals = [rule for key, rule in optimizer.plan.items() if "original" in key and len(rule.shape) == 2]
    assert originals
    if plan == "factored":
        assert {rule.form for rule in originals if min(rule.shape) > 1} == {"factored"}


class Tied(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(6, 5), nn.Linear(5, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``x`` deciding how much of each row of the embedding is used."""
        logits: Tensor = self.head(x + self.embedding(torch.tensor([0, 2, 2, 5])))
        return logits


def test_tied_weights_train_as_with_adamw() -> None:
    theirs, ours = Tied(), Tied()
    train(theirs, adamw(theirs.parameters()), range(8))
    optimizer = slim(None)(ours)
    train(ours, optimizer, range(8))
    assert_same_parameters(ours, theirs)
    assert ours.head.weight is ours.embedding.weight
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_plan_may_call_a_tied_weight_by_either_name(name: str) -> None:
    model = Tied()
    optimizer = slim(CompressionPlan({name: Rule((1,), "mean")}))(model)
    train(model, optimizer, range(2))
    assert optimizer.state[model.head.weight]["exp_avg_sq"].shape == (6, 1)


# -- parameters that come and go -------------------------------------------------------------------------


def _freezing_run(make: Make) -> tuple[nn.Sequential, Optimizer]:
    """12 steps; the first layer is frozen for the first four and the last for the last four."""
    model = network()
    optimizer = make(model.named_parameters())
    for step in range(12):
        model[0].requires_grad_(step >= 4)
        model[2].requires_grad_(step < 8)
        train(model, optimizer, range(step, step + 1))
    return model, optimizer


def test_freezing_and_unfreezing_is_adamws() -> None:
    (theirs, _), (ours, optimizer) = _freezing_run(adamw), _freezing_run(slim(None))
    assert_same_parameters(ours, theirs)
    assert [optimizer.state[param]["step"].item() for param in ours.parameters()] == [8, 8, 8, 8]


@every_plan
def test_a_run_with_frozen_layers_resumes(plan: Any) -> None:
    def start(model: nn.Sequential) -> Optimizer:
        model[0].requires_grad_(False)
        return slim(plan)(model.named_parameters())

    def go_on(model: nn.Sequential, optimizer: Optimizer) -> None:
        model[0].requires_grad_(True)
        train(model, optimizer, range(3, 8))

    model = network()
    optimizer = start(model)
    train(model, optimizer, range(3))
    resumed, saved = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    assert sorted(saved["state"]) == [2, 3]
    go_on(model, optimizer)
    resumed_optimizer = start(resumed)
    resumed_optimizer.load_state_dict(saved)
    go_on(resumed, resumed_optimizer)
    assert_same_parameters(resumed, model, exact=True)


@every_plan
def test_parameters_never_used_cost_nothing_and_stay(plan: Any) -> None:
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.randn(6, 4)))
    before = model.unused.clone()
    optimizer = slim(plan)(model.named_parameters())
    train(model, optimizer, range(4))
    assert torch.equal(model.unused, before)
    assert model.unused not in optimizer.state or not optimizer.state[model.unused]
    again = slim(plan)(model.named_parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(again, _state(optimizer))


# -- torch.compile ---------------------------------------------------------------------------------------


def _compiled_run(make: Make, backend: str | None, tensor_lr: bool, scheduler: str) -> tuple[nn.Module, int, int]:
    """10 scheduled steps; returns the model, how many graphs were compiled, and how often tracing broke off."""
    torch._dynamo.reset()
    counters.clear()
    model = network()
    optimizer = make(model.named_parameters(), lr=torch.tensor(0.02) if tensor_lr else 0.02)
    steps = SCHEDULERS[scheduler](optimizer)
    step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
    for seed in range(10):
        optimizer.zero_grad()
        backward(model, seed)
        step()
        steps.step()
    return model, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.fixture(scope="module")
def adamw_compiled() -> Callable[..., tuple[int, int]]:
    """How many graphs and breaks AdamW's step has, each case counted once."""
    counted: dict[tuple[Any, ...], tuple[int, int]] = {}

    def count(*case: Any) -> tuple[int, int]:
        if case not in counted:
            counted[case] = _compiled_run(adamw, *case)[1:]
        return counted[case]

    return count


@pytest.mark.parametrize(
    ("backend", "tensor_lr", "scheduler"),
    [("aot_eager", False, "ExponentialLR"), ("aot_eager", True, "ExponentialLR"), ("eager", True, "OneCycleLR")],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile
@every_plan
def test_compiled_step_is_the_eager_one_and_compiles_no_more_often_than_adamws(
    adamw_compiled: Callable[..., tuple[int, int]], plan: Any, backend: str, tensor_lr: bool, scheduler: str
) -> None:
    allowed = adamw_compiled(backend, tensor_lr, scheduler)
    eager, *_ = _compiled_run(slim(plan), None, tensor_lr, scheduler)
    compiled, graphs, breaks = _compiled_run(slim(plan), backend, tensor_lr, scheduler)
    assert_same_parameters(compiled, eager)
    assert 1 <= graphs <= allowed[0]
    assert breaks <= allowed[1]


# -- distributed checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("plan", [*PLANS.values(), PARTS], ids=[*PLANS, "parts"])
def test_distributed_checkpoint_state_dicts_resume(plan: Any, flat: bool, momentum_dtype: Any) -> None:
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = network()
    optimizer = slim(plan)(model.named_parameters(), momentum_dtype=momentum_dtype)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, range(3, 6))
    resumed_optimizer = slim(plan)(resumed.named_parameters(), momentum_dtype=momentum_dtype)
    dcp.set_optimizer_state_dict(resumed, resumed_optimizer, saved, options=options)
    train(resumed, resumed_optimizer, range(3, 6))
    assert_same_parameters(resumed, model, exact=True)
