"""``AutoPlan(start="slim")``: little memory from the first step, decided by grids of a few rows by a few columns."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimadam import AutoPlan, CompressionPlan, Rule, SlimAdam, Split
from slimadam.kernels.float8 import decode
from slimadam.measurement.grid import SMALLEST_GRID, Grid
from slimadam.measurement.snr import measure
from slimadam.state.rule import Source
from slimadam.state.second_moment import by_key
from tests.reference import second_moments

STEPS = 6
SLIM = AutoPlan(calibration_steps=STEPS, measurements=2, start="slim")
BETA2 = 0.99


class Network(nn.Module):
    """Matrices that average well or badly, one of three parts, one too small for a grid, a convolution, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(90, 60)
        self.qkv = nn.Linear(60, 330, bias=False)
        self.norm = nn.LayerNorm(64)
        self.narrow = nn.Linear(64, 8)
        self.image = nn.Conv2d(40, 48, 3)
        self.head = nn.Linear(64, 70, bias=False)


PARTS = {"qkv.weight": Split({"query": 110, "key": 110, "value": 110})}


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def scale(name: str, param: Tensor) -> Tensor:
    """Return the standard deviations of a parameter's gradients: those of the head are of one size each."""
    generator = torch.Generator().manual_seed(len(name))
    if name == "head.weight":
        return torch.rand(param.shape, generator=generator).pow(8)
    rows = torch.rand(param.shape[0], *[1] * (param.dim() - 1), generator=generator) + 0.1
    return rows * (torch.rand(param.shape[1:], generator=generator) + 0.1)


def give_gradients(model: nn.Module, step: int, factor: float = 1.0) -> None:
    for number, (name, param) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        size = 1 + 0.3 * torch.rand(param.shape, generator=generator)
        sign = torch.randint(0, 2, param.shape, generator=generator) * 2 - 1
        param.grad = (sign * size * scale(name, param) * factor).to(param.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def make(model: nn.Module, settings: AutoPlan | None = SLIM, **options: Any) -> SlimAdam:
    if settings is not None:
        settings = AutoPlan(**{**vars(settings), "parts": PARTS})
    return SlimAdam(model, lr=1e-2, betas=(0.9, BETA2), plan=settings, **options)


def held(optimizer: SlimAdam) -> int:
    """Return the bytes of second moments and grids that are there, counted from the tensors themselves."""
    moments = [moment for state in optimizer.state.values() for moment in second_moments(state)]
    measuring = optimizer._registry.measuring
    grids = [] if measuring is None else [grid.moment for grid in measuring.grids.values() if grid.moment is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *grids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("forms", ["closest", "best", "mean"])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_no_step_needs_more_than_the_end_and_a_share_of_adamw(dtype: torch.dtype, forms: Any, share: float) -> None:
    model = network(dtype)
    settings = AutoPlan(**{**vars(SLIM), "forms": forms, "calibration_memory": share})
    optimizer = make(model, settings)
    promised = optimizer.memory()
    seen = []
    for step in range(STEPS + 2):
        train(model, optimizer, range(step, step + 1))
        seen.append(held(optimizer))
        if step == 0:
            assert seen[0] == promised.exp_avg_sq + promised.monitor
    adamw = sum(param.numel() * param.element_size() for param in model.parameters())
    assert max(seen) <= seen[-1] + share * adamw
    assert seen[-1] == optimizer.memory().exp_avg_sq
    assert max(seen) < 0.9 * adamw or forms != "closest"
    assert optimizer._registry.measuring is None


@pytest.mark.parametrize("fused", [None, False])
def test_steps_until_the_decision_are_those_of_row_and_column_averages(fused: bool | None) -> None:
    ours, theirs = network(), network()
    optimizer = make(ours, fused=fused)
    forms = {key: rule.form for key, rule in optimizer.plan.items()}
    assert forms["embedding.weight"] == forms["qkv.weight[key]"] == forms["image.weight"] == "factored"
    assert forms["narrow.weight"] == "float8"
    assert forms["norm.weight"] == forms["narrow.bias"] == "full"
    fixed = SlimAdam(theirs, lr=1e-2, betas=(0.9, BETA2), plan=optimizer.plan, fused=fused)
    train(ours, optimizer, range(STEPS))
    train(theirs, fixed, range(STEPS))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def full_moments(steps: int, factor: Callable[[int], float] = lambda step: 1.0) -> dict[str, Tensor]:
    """Return AdamW's second moments in float64."""
    model = network()
    moments = {name: torch.zeros(param.shape, dtype=torch.float64) for name, param in model.named_parameters()}
    for step in range(steps):
        give_gradients(model, step)
        for name, param in model.named_parameters():
            assert param.grad is not None
            moments[name].lerp_((param.grad.double() * factor(step)).square(), 1 - BETA2)
    return moments


def reference_snr(grid: Grid, full: Tensor) -> float:
    """Return the SNR of the residual ``f = v mean(v) / (r c)`` in a grid, from its definition."""
    rows = full.mean(tuple(range(1, full.dim())), keepdim=True)
    columns = full.mean(0, keepdim=True)
    residual = (full * full.mean() / (rows * columns))[grid.index]
    return float(residual.mean() ** 2 / residual.var(correction=0))


def test_grids_hold_adamws_moments_and_measure_by_the_definition() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(STEPS - 1))
    grids = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    assert set(grids) == {"embedding.weight", *(f"qkv.weight[{part}]" for part in ("query", "key", "value")),
                          "image.weight", "head.weight"}  # fmt: skip
    moments = full_moments(STEPS - 1)
    for key, grid in grids.items():
        full = grid.rule.take(moments[key.partition("[")[0]])
        wanted = full[grid.index].float()
        assert grid.moment is not None
        torch.testing.assert_close(grid.moment, wanted, rtol=STEPS * 2e-7, atol=0)
        state = by_key(grid.rule.stored_as.compress(full), [grid.rule])
        found = grid.measured(state)["factored"]
        assert found == pytest.approx(reference_snr(grid, full), rel=1e-4)
        assert grid.measured(optimizer.state[dict(model.named_parameters())[key.partition("[")[0]]])[
            "factored"
        ] == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("shape", [(600, 500), (64, 48, 3, 3), (6, 90, 110)])
def test_estimates_from_grids_are_close_to_the_whole(shape: tuple[int, ...]) -> None:
    """Entries of known spread: the sampling error of a variance from n entries of kurtosis k is about sqrt(k / n)."""
    torch.manual_seed(0)
    batch_dims = 1 if len(shape) == 3 else 0
    dims = range(batch_dims, len(shape))
    factors = [torch.rand(*shape[:batch_dims], *(shape[d] if d == dim else 1 for d in dims)) + 0.5 for dim in dims]
    noise = torch.rand(shape) + 0.5
    full = math.prod(factors, start=noise)  # type: ignore[call-overload]
    rule = Rule((), "factored", shape, batch_dims=batch_dims)
    grid = Grid.of(torch.empty(shape), rule, 0.05)
    assert isinstance(grid, Grid)
    grid.moment = full[grid.index].clone()
    found = grid.measured(by_key(rule.stored_as.compress(full), [rule]))
    wanted = measure(full, batch_dims)
    for candidate, value in found.items():
        if candidate != "factored" and math.prod(shape[dim] for dim in candidate) < 30:
            continue  # its mean over slices is that of a few slices that are nearly constant
        assert value == pytest.approx(wanted[candidate], rel=0.3), candidate
    assert {"factored", (batch_dims,)} <= set(found)


def test_the_decision_is_that_of_the_measurements_and_converts_what_is_stored() -> None:
    model = network()
    optimizer = make(model, fused=False)
    train(model, optimizer, range(STEPS - 1))
    before = copy.deepcopy(optimizer)
    give_gradients(model, STEPS - 1)
    optimizer.step()
    plan = optimizer.plan
    assert plan["embedding.weight"].form == plan["qkv.weight[value]"].form == plan["image.weight"].form == "factored"
    assert plan["head.weight"].form == "float8"
    assert plan["head.weight"].snr["factored"] < 3 < plan["embedding.weight"].snr["factored"]
    assert "too small to measure within calibration_memory=0.05" in plan["narrow.weight"].reason
    assert plan["narrow.weight"].form == "float8"
    # The head: its codes are those of the product of averages after the same step.
    twins = zip(optimizer.param_groups[0]["params"], before.param_groups[0]["params"], strict=True)
    state = before.state[next(twin for param, twin in twins if param is model.head.weight)]
    grad = model.head.weight.grad
    assert grad is not None
    rows = state["exp_avg_sq_row"].lerp(grad.square().mean(1, keepdim=True), 1 - BETA2)
    columns = state["exp_avg_sq_col"].lerp(grad.square().mean(0, keepdim=True), 1 - BETA2)
    wanted = rows * columns / rows.mean()
    found = decode(optimizer.state[model.head.weight]["exp_avg_sq_codes"])
    assert found.shape == wanted.shape
    ratio = found / wanted
    assert ratio.min() > 1 / 1.51
    assert ratio.max() < 1.51
    assert ratio.mean() == pytest.approx(1, abs=4 * 0.25 / math.sqrt(ratio.numel()))
    assert "exp_avg_sq_row" not in optimizer.state[model.head.weight]


def test_averages_of_other_dimensions_are_those_of_the_product() -> None:
    model = network()
    optimizer = make(model, AutoPlan(**{**vars(SLIM), "forms": "mean", "cutoff": 1e-6}), fused=False)
    twin_model = network()
    twin = make(twin_model, AutoPlan(**{**vars(SLIM), "forms": "mean", "calibration_steps": 50}), fused=False)
    train(model, optimizer, range(STEPS))
    train(twin_model, twin, range(STEPS))
    checked = 0
    for (name, param), other in zip(model.named_parameters(), twin_model.parameters(), strict=True):
        rule = optimizer.plan.get(name)
        if rule is not None and rule.form == "mean":
            row, column = (twin.state[other][f"exp_avg_sq{suffix}"] for suffix in ("_row", "_col"))
            product = (row * column / row.mean()).double()
            torch.testing.assert_close(
                optimizer.state[param]["exp_avg_sq"], product.mean(rule.dims, keepdim=True).float(), rtol=1e-5, atol=0
            )
            checked += 1
    assert checked == 3


@pytest.mark.parametrize("copied", ["state dict", "file", "pickle", "deepcopy"])
@pytest.mark.parametrize("stopped_at", [1, 3, 5, 6, 8])
def test_resumes_bit_for_bit_in_every_phase(copied: str, stopped_at: int) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(stopped_at))
    if copied in ("pickle", "deepcopy"):
        twin, again = copy.deepcopy((model, optimizer)) if copied == "deepcopy" else pickle.loads(
            pickle.dumps((model, optimizer)))  # fmt: skip
    else:
        twin = copy.deepcopy(model)
        again = make(twin)
        saved: Any = optimizer.state_dict()
        if copied == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved)
    train(model, optimizer, range(stopped_at, 10))
    train(twin, again, range(stopped_at, 10))
    assert again.plan == optimizer.plan
    assert {key: rule.reason for key, rule in again.plan.items()} == {
        key: rule.reason for key, rule in optimizer.plan.items()
    }
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", ["int8", torch.bfloat16])
def test_goes_with_other_first_moments(momentum: Any) -> None:
    model, twin = network(), network()
    optimizer = make(model, momentum_dtype=momentum)
    other = make(twin)
    train(model, optimizer, range(STEPS))
    train(twin, other, range(STEPS))
    assert optimizer.plan == other.plan


def test_a_checkpoint_goes_on_as_it_began_whatever_the_optimizer_asks_for() -> None:
    model = network()
    slim = make(model)
    train(model, slim, range(3))
    twin = copy.deepcopy(model)
    full = make(twin, AutoPlan(**{**vars(SLIM), "start": "full"}))
    full.load_state_dict(slim.state_dict())
    train(model, slim, range(3, 10))
    train(twin, full, range(3, 10))
    assert full.plan == slim.plan
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_a_full_start_holds_full_moments_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    full = make(model, AutoPlan(**{**vars(SLIM), "start": "full"}))
    train(model, full, range(3))
    twin = copy.deepcopy(model)
    slim = make(twin)
    slim.load_state_dict(full.state_dict())
    assert "AdamW's second moments are held until the decision" in caplog.text
    train(model, full, range(3, 10))
    train(twin, slim, range(3, 10))
    assert slim.plan == full.plan
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_adamw_is_averaged_and_measured() -> None:
    model = network()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, BETA2))
    train(model, adamw, range(4))
    optimizer = make(model)
    optimizer.load_state_dict(adamw.state_dict())
    moment = adamw.state[model.head.weight]["exp_avg_sq"]
    torch.testing.assert_close(optimizer.state[model.head.weight]["exp_avg_sq_row"], moment.mean(1, keepdim=True))
    train(model, optimizer, range(4, 4 + STEPS))
    assert optimizer._registry.measuring is None
    assert optimizer.plan["embedding.weight"].form == "factored"


def test_grids_see_clipped_gradients() -> None:
    model = network()
    optimizer = make(model, max_grad_norm=0.5)
    norms = []
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
        assert optimizer.grad_norm is not None
        norms.append(float(optimizer.grad_norm))
    moments = full_moments(3, lambda step: min(1.0, 0.5 / (norms[step] + 1e-6)))
    grid = optimizer._registry.measuring.grids["embedding.weight"]  # type: ignore[union-attr]
    assert grid.moment is not None
    torch.testing.assert_close(grid.moment, moments["embedding.weight"][grid.index].float(), rtol=1e-5, atol=0)


def test_what_is_kept_stays_in_full_and_idle_patterns_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = make(model, AutoPlan(**{**vars(SLIM), "keep": ("head", "embed*", "nothing")}))
    assert optimizer.plan["embedding.weight"].form == "full"
    with caplog.at_level(logging.WARNING, "slimadam"):
        train(model, optimizer, range(STEPS))
    assert "'nothing'" in caplog.text
    assert optimizer.plan["embedding.weight"].reason == "kept in full as asked (keep='embed*')"


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"differentiable": True}])
def test_options_without_the_forms_start_in_full_and_say_so(
    options: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    with caplog.at_level(logging.WARNING, "slimadam"):
        optimizer = SlimAdam(model, betas=(0.9, BETA2), plan=SLIM, **options)  # type: ignore[arg-type]
    assert f"{next(iter(options))}=True" in caplog.text
    assert "narrow.weight starts in full" in caplog.text
    if "amsgrad" in options:
        train(model, optimizer, range(STEPS))
        assert all(rule.form in ("full", "mean") for rule in optimizer.plan.values())


@pytest.mark.parametrize("forms", ["closest", "best"])
@pytest.mark.parametrize("size", [60, 200])
def test_complex_parameters_are_measured_in_full(size: int, forms: Any, caplog: pytest.LogCaptureFixture) -> None:
    plans = []
    for start in ("full", "slim"):
        param = nn.Parameter(torch.randn(size, size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))
        settings = AutoPlan(**{**vars(SLIM), "start": start, "forms": forms})
        optimizer = SlimAdam([("weight", param)], betas=(0.9, BETA2), plan=settings)
        assert optimizer.plan["weight"].is_full
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(size, size, dtype=torch.complex64, generator=generator)
            optimizer.step()
        assert optimizer._registry.measuring is None
        plans.append(optimizer.plan)
    assert plans[0] == plans[1]
    assert "weight starts in full: grids measure real numbers, the parameter is complex" in caplog.text


def test_a_parameter_without_gradients_stays_as_it_started() -> None:
    model = network()
    optimizer = make(model)
    for step in range(STEPS):
        give_gradients(model, step)
        model.head.weight.grad = None
        optimizer.step()
    rule = optimizer.plan["head.weight"]
    assert (rule.form, rule.reason) == ("factored", "no gradient while plan='auto' measured")
    train(model, optimizer, range(STEPS, STEPS + 2))
    assert "exp_avg_sq_row" in optimizer.state[model.head.weight]


def test_parameters_that_come_or_go_are_tracked_or_forgotten() -> None:
    model, more = network(), nn.Linear(90, 80, bias=False)
    optimizer = make(model)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [("more.weight", more.weight)]})
    grids = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    assert "more.weight" in grids
    optimizer.param_groups[0]["params"] = [
        param for param in optimizer.param_groups[0]["params"] if param is not model.head.weight
    ]
    generator = torch.Generator().manual_seed(0)
    more.weight.grad = torch.randn(80, 90, generator=generator)
    train(model, optimizer, range(2, STEPS))
    assert "head.weight" not in grids
    assert optimizer.plan["more.weight"].snr
    assert "head.weight" not in optimizer.plan


def test_memory_tells_the_grids_and_the_phase_is_told() -> None:
    model = network()
    optimizer = make(model)
    grids = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    report = optimizer.memory()
    assert report.monitor == sum(math.prod(_counts(grid)) * 4 for grid in grids.values())
    assert all(math.prod(_counts(grid)) >= SMALLEST_GRID for grid in grids.values())
    assert "with row and column averages" in repr(optimizer)
    assert optimizer.snr_check() == {}


def _counts(grid: Grid) -> tuple[int, ...]:
    return tuple(len(range(one.start, one.stop, one.step)) for one in grid.index)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"start": "thin"}, "start='thin' must be 'full' or 'slim'"), ({"start": None}, "start=None"),
     ({"calibration_memory": 0}, "calibration_memory=0 must be a share"),
     ({"calibration_memory": 1.5}, "calibration_memory=1.5"), ({"calibration_memory": True}, "calibration_memory=True"),
     ({"calibration_memory": math.nan}, "calibration_memory=nan")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        AutoPlan(**settings)


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own["measuring"].update(grids=7),
        lambda own: own["measuring"].update(start="thin"),
        lambda own: own["measuring"].update(calibration_memory=0),
        lambda own: own["measuring"].update(calibration_memory="text"),
        lambda own: own["measuring"]["grids"].update({"head.weight": 3}),
        lambda own: own["measuring"]["grids"]["head.weight"].update(moment=torch.zeros(3)),
        lambda own: own["measuring"]["grids"]["head.weight"].update(moment="text"),
    ],
)
def test_damaged_grids_are_refused_and_change_nothing(damage: Callable[[dict[str, Any]], None]) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved["slimadam"])
    twin = copy.deepcopy(model)
    other = make(twin)
    train(twin, other, range(3, 4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"head\.weight|plan='auto'"):
        other.load_state_dict(saved)
    torch.testing.assert_close(other.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_the_plan_is_saved_and_used_again() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(STEPS))
    plan = CompressionPlan.from_dict(optimizer.plan.to_dict())
    assert plan == optimizer.plan
    again = SlimAdam(network(), plan=plan)
    assert again.memory().exp_avg_sq == optimizer.memory().exp_avg_sq


class Fused(nn.Module):
    """A fused weight and its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(60, 480)


def fused_parts(**sizes: int) -> dict[str, Split]:
    return {"qkv.*": Split(sizes or {"query": 160, "key": 160, "value": 160})}


def test_parts_that_stay_in_full_say_why(caplog: pytest.LogCaptureFixture) -> None:
    model = Fused()
    settings = AutoPlan(**{**vars(SLIM), "parts": fused_parts(), "keep": ("qkv.weight[key]",)})
    optimizer = SlimAdam(model, plan=settings)
    with caplog.at_level(logging.WARNING, "slimadam"):
        train(model, optimizer, range(STEPS))
    assert "keep:" not in caplog.text
    assert optimizer.plan["qkv.weight[key]"].reason == "kept in full as asked (keep='qkv.weight[key]')"
    assert "fewer than two dimensions" in optimizer.plan["qkv.bias[query]"].reason


def test_a_loaded_parameter_without_gradients_is_not_expanded() -> None:
    model = network()
    slim = make(model)
    train(model, slim, range(2))
    saved = slim.state_dict()
    del saved["slimadam"]  # as torch.distributed.checkpoint does
    other = make(model)
    other.load_state_dict(saved)
    for step in range(STEPS):
        give_gradients(model, step)
        model.head.weight.grad = None
        other.step()
    assert other.plan["head.weight"].form == "factored"
    assert other.plan["head.weight"].reason == "no gradient while plan='auto' measured"


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_grids_start_where_second_moments_do(max_grad_norm: float | None) -> None:
    model, twin = network(), network()
    optimizer = make(model, variance_init="gradient", max_grad_norm=max_grad_norm)
    full = make(
        twin, AutoPlan(**{**vars(SLIM), "start": "full"}), variance_init="gradient", max_grad_norm=max_grad_norm
    )
    train(model, optimizer, range(3))
    train(twin, full, range(3))
    grid = optimizer._registry.measuring.grids["head.weight"]  # type: ignore[union-attr]
    wanted = full.state[twin.head.weight]["exp_avg_sq"][grid.index]
    torch.testing.assert_close(grid.moment, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("forms", ["closest", "best"])
def test_decides_where_nothing_has_a_grid(forms: Any) -> None:
    layer = nn.Linear(20, 10, bias=False)
    optimizer = SlimAdam(layer, plan=AutoPlan(**{**vars(SLIM), "forms": forms}))
    started = optimizer.plan["weight"].form
    assert started == ("float8" if forms == "closest" else "full")
    train(layer, optimizer, range(STEPS - 1))
    assert f"{STEPS - 1} of them done" in repr(optimizer)
    train(layer, optimizer, range(STEPS - 1, STEPS + 1))
    assert optimizer._registry.measuring is None
    assert optimizer.plan["weight"].form == started
    optimizer.expand("weight")


@pytest.mark.parametrize("away", [1, STEPS])
def test_parts_that_left_and_come_back_are_measured_or_as_they_were(away: int) -> None:
    """The first part has no grid."""
    model = Fused()
    parts = fused_parts(query=20, key=230, value=230)
    optimizer = SlimAdam(model, betas=(0.9, BETA2), plan=AutoPlan(**{**vars(SLIM), "parts": parts}))
    started = {key: rule.form for key, rule in optimizer.plan.items()}
    assert [started[f"qkv.weight[{part}]"] for part in parts["qkv.*"].sizes] == ["float8", "factored", "factored"]
    train(model, optimizer, range(2))
    params = list(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"] = [other := nn.Parameter(torch.ones(3, 3))]
    other.grad = torch.ones(3, 3)
    train(model, optimizer, range(2, 2 + away))
    optimizer.param_groups[0]["params"] = [*params, other]
    train(model, optimizer, range(2 + away, 2 * STEPS))
    for part in ("key", "value"):
        rule = optimizer.plan[f"qkv.weight[{part}]"]
        assert rule.snr if away == 1 else rule.reason == "added after plan='auto' had decided"
        assert rule.source != Source.MEASURING
    assert optimizer.plan["qkv.weight[query]"].form == "float8"


def test_the_plan_of_a_measurement_is_followed_by_another_optimizer() -> None:
    parts = fused_parts(query=20, key=230, value=230)
    measuring = SlimAdam(Fused(), plan=AutoPlan(**{**vars(SLIM), "parts": parts}))
    other = SlimAdam(Fused(), plan=measuring.plan)
    for part in ("query", "key", "value"):
        assert other.plan[f"qkv.weight[{part}]"].form == measuring.plan[f"qkv.weight[{part}]"].form
    assert not any(rule.source == Source.MEASURING for rule in other.plan.values())


@pytest.mark.parametrize("index", [None, [3, 4, 5, 50]])
@pytest.mark.parametrize("variance_init", ["zeros", "gradient"])
def test_grids_are_reset_with_the_state(index: list[int] | None, variance_init: str) -> None:
    """Beside those of the same parameters measured in full, where rows of a grid are rows of the state."""
    model, twin = network(), network()
    optimizer = make(model, variance_init=variance_init)
    full = make(twin, AutoPlan(**{**vars(SLIM), "start": "full"}), variance_init=variance_init)
    for own, trained in ((model, optimizer), (twin, full)):
        train(own, trained, range(2))
        for name in ("head.weight", "qkv.weight"):
            trained.reset_state(name, index)
        train(own, trained, range(2, 4))
    grids = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    for name, param in (("head.weight", twin.head.weight), ("qkv.weight", twin.qkv.weight)):
        for key, grid in grids.items():
            if key.startswith(name):
                wanted = grid.rule.take(full.state[param]["exp_avg_sq"])[grid.index]
                torch.testing.assert_close(grid.moment, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("rows", "form"),
    [(70, "factored"), (67, "factored"), (300, "factored"), (10, "float8"), (1, "full")],
)
def test_a_parameter_that_is_replaced_while_measuring_is_measured_in_its_new_size(rows: int, form: str) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    kept = min(rows, 70)
    held = model.head.weight
    model.head.weight = nn.Parameter(torch.cat([held.detach()[:kept], torch.zeros(rows - kept, 64)]))
    optimizer.replace_param(held, model.head.weight, keep=range(kept), added=rows - kept)
    measuring = optimizer._registry.measuring
    assert measuring is not None
    assert optimizer.plan["head.weight"].form == form
    assert ("head.weight" in measuring.grids) == (form == "factored")
    train(model, optimizer, range(2, 3))
    again = make(copy.deepcopy(model))
    again.load_state_dict(optimizer.state_dict())
    assert again.plan == optimizer.plan
    train(model, optimizer, range(3, STEPS + 1))
    assert optimizer._registry.measuring is None
    assert bool(optimizer.plan["head.weight"].snr) == (form != "float8")


def test_a_fused_weight_that_is_replaced_is_one_matrix_from_then_on() -> None:
    model = Fused()
    optimizer = SlimAdam(model, plan=AutoPlan(**{**vars(SLIM), "parts": fused_parts()}))
    train(model, optimizer, range(2))
    old, model.qkv.weight = model.qkv.weight, nn.Parameter(model.qkv.weight.detach()[:300])
    optimizer.replace_param(old, model.qkv.weight, keep=range(300))
    assert list(optimizer._registry.measuring.grids) == ["qkv.weight"]  # type: ignore[union-attr]
    assert "exp_avg_sq_row" in optimizer.state[model.qkv.weight]
    model.qkv.bias.grad = None
    for _ in range(STEPS):
        model.qkv.weight.grad = torch.ones(300, 60)
        optimizer.step()
    assert optimizer.plan["qkv.weight"].snr


def test_a_replacement_that_fails_leaves_grids_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    before = dict(optimizer._registry.measuring.grids)  # type: ignore[union-attr]
    monkeypatch.setattr("slimadam.optim.slimadam.resized_state", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.replace_param("head.weight", nn.Parameter(torch.zeros(5, 64)), keep=range(5))
    after = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    assert all(after[key] is grid for key, grid in before.items())
    assert len(after) == len(before)


def test_grids_begin_at_the_second_moments_of_adamw() -> None:
    model, twin = network(), network()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, BETA2))
    train(model, adamw, range(9))
    optimizer, full = make(model), make(twin, AutoPlan(**{**vars(SLIM), "start": "full"}))
    train(model, optimizer, range(3))  # nothing of this is left
    before = {key: grid.moment for key, grid in optimizer._registry.measuring.grids.items()}  # type: ignore[union-attr]
    saved = adamw.state_dict()
    damaged = copy.deepcopy(saved)
    damaged["state"][0]["exp_avg"] = "text"
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(damaged)
    assert all(
        grid.moment is before[key]
        for key, grid in optimizer._registry.measuring.grids.items()  # type: ignore[union-attr]
    )
    for own, trained in ((model, optimizer), (twin, full)):
        trained.load_state_dict(saved)
        train(own, trained, range(9, 11))
    grids = optimizer._registry.measuring.grids  # type: ignore[union-attr]
    params = dict(twin.named_parameters())
    for key, grid in grids.items():
        wanted = grid.rule.take(full.state[params[key.partition("[")[0]]]["exp_avg_sq"])[grid.index]
        torch.testing.assert_close(grid.moment, wanted, rtol=1e-5, atol=0)


def test_a_state_dict_is_loaded_in_inference_mode() -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    other = make(model)
    with torch.inference_mode():
        other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2, STEPS))
    assert other._registry.measuring is None


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_a_checkpoint_goes_on_with_its_calibration_memory(share: float) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(2))
    other = make(model, AutoPlan(**{**vars(SLIM), "calibration_memory": share}))
    other.load_state_dict(optimizer.state_dict())
    ours, theirs = optimizer._registry.measuring, other._registry.measuring
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(theirs.to_dict()["grids"], ours.to_dict()["grids"], rtol=0, atol=0)


@pytest.mark.parametrize("start", ["full", "slim"])
@pytest.mark.parametrize(
    ("saved_parts", "parts"),
    [(fused_parts(), {}), ({}, fused_parts()), (fused_parts(), {"qkv.*": Split({"both": 320, "value": 160})})],
)
def test_a_checkpoint_of_other_parts_is_measured_and_decided(start: Any, saved_parts: Any, parts: Any) -> None:
    model = nn.Sequential()
    model.qkv = nn.Linear(100, 480)
    optimizer = SlimAdam(model, plan=AutoPlan(**{**vars(SLIM), "start": start, "parts": saved_parts}))
    train(model, optimizer, range(2))
    other = SlimAdam(model, plan=AutoPlan(**{**vars(SLIM), "start": start, "parts": parts}))
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2, STEPS + 1))
    assert other._registry.measuring is None
    assert all(rule.snr for key, rule in other.plan.items() if "weight" in key)
    assert not any(rule.source == Source.MEASURING for rule in other.plan.values())


@pytest.mark.parametrize("start", ["full", "slim"])
def test_a_checkpoint_that_measured_what_this_optimizer_does_not(start: Any) -> None:
    model = nn.Linear(200, 300)
    weight, bias = model.named_parameters()
    settings = AutoPlan(**{**vars(SLIM), "start": start})
    optimizer = SlimAdam([{"params": [weight]}, {"params": [bias]}], plan=settings)
    train(model, optimizer, range(2))
    other = SlimAdam([{"params": [weight], "plan": None}, {"params": [bias]}], plan=settings)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(2, STEPS + 1))
    assert other.plan["weight"].snr


def test_amsgrad_in_one_group_leaves_the_others_their_forms() -> None:
    model = network()
    groups = [{"params": [(name, param)], "amsgrad": name == "head.weight"} for name, param in model.named_parameters()]
    for settings in (SLIM, AutoPlan(**{**vars(SLIM), "start": "full"})):
        optimizer = SlimAdam(groups, betas=(0.9, BETA2), plan=settings)
        train(model, optimizer, range(STEPS))
        assert optimizer.plan["embedding.weight"].form == optimizer.plan["image.weight"].form == "factored"
        assert optimizer.plan["head.weight"].form in ("full", "mean")
        assert set(optimizer.state[model.head.weight]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def test_what_was_never_finite_stays_as_it_was_measured() -> None:
    model = network()
    optimizer = make(model)
    give_gradients(model, 0)
    model.image.weight.grad.fill_(math.nan)  # type: ignore[union-attr]
    optimizer.step()
    train(model, optimizer, range(1, STEPS))
    rule = optimizer.plan["image.weight"]
    assert rule.form == "factored"
    assert "as it was measured: nothing finite was measured" in rule.reason


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what torch itself imports to compile
def test_a_compiled_step_sees_grids_and_decides() -> None:
    runs = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(90, 80, bias=False), nn.Linear(80, 90))
        optimizer = SlimAdam(model, lr=1e-2, betas=(0.9, BETA2), plan=AutoPlan(STEPS, start="slim", forms="best"))
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for seed in range(STEPS + 2):
            give_gradients(model, seed)
            step()
        runs.append((model, optimizer))
    (eager, expected), (compiled, found) = runs
    assert found._registry.measuring is None
    assert [rule.form for rule in found.plan.values()] == [rule.form for rule in expected.plan.values()]
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_long_measurements_see_every_other_gradient() -> None:
    settings = AutoPlan(calibration_steps=200, start="slim")
    model = network()
    optimizer = SlimAdam(model, betas=(0.9, 0.999), plan=settings)
    moment = torch.zeros(model.head.weight.shape, dtype=torch.float64)
    for step in range(1, 21):
        give_gradients(model, step)
        optimizer.step()
        if step % 2 == 0:
            assert model.head.weight.grad is not None
            moment = 0.999**2 * moment + (1 - 0.999**2) * model.head.weight.grad.double().square()
    measuring = optimizer._registry.measuring
    assert measuring is not None
    assert measuring.steps == 20
    grid = measuring.grids["head.weight"]
    assert grid.moment is not None
    torch.testing.assert_close(grid.moment, moment[grid.index].float(), rtol=1e-5, atol=0)
    assert [measuring.looks_every(beta2) for beta2 in (0.9, 0.95, 0.99, 0.999, 0.9999)] == [1, 1, 2, 2, 2]
