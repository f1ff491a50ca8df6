"""Directional and Hessian sharpness against dense Hessians in float64."""

from __future__ import annotations

import itertools
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import slimadam
from benchmarks.workloads.uv_model import UVModel
from slimadam import SlimAdam, directional_sharpness, hessian_sharpness
from slimadam.curvature.probe.directions import pending_directions

pytest.importorskip("scipy")

# torch.func brings functorch in, which scripts functions in the deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
DOUBLE = torch.float64
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "AdamW, amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.5), amsgrad=True),
    "SlimAdam, full": lambda params: SlimAdam(params, lr=0.01, plan=None),
    "SlimAdam, rules": lambda params: SlimAdam(params, lr=0.01, plan="rules", weight_decay=0.1),
    "SlimAdam, factored": lambda params: SlimAdam(params, lr=0.01, plan="factored"),
}
ADAM_LIKE = sorted(set(OPTIMIZERS) - {"SGD"})


class Net(nn.Module):
    """A small network with odd shapes and a parameter that the loss does not need."""

    def __init__(self, *sizes: int, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(*pair, dtype=dtype) for pair in pairs)
        self.register_buffer("inputs", torch.randn(9, sizes[0], dtype=dtype))
        self.register_buffer("targets", torch.randn(9, sizes[-1], dtype=dtype))

    def loss(self) -> Tensor:
        x = self.inputs
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return (self.layers[-1](x) - self.targets).square().mean()


def dense_hessian(model: nn.Module) -> Tensor:
    """By torch.func, in float64, over the parameters in their order."""
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    shapes = [param.shape for param in model.parameters()]
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        params = {f"model.{name}": part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self) -> Tensor:
                return self.model.loss()

        return torch.func.functional_call(Loss(), params, ())

    return torch.func.hessian(loss)(flat)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def top(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh(matrix)[-1].item()


def stepped(model: nn.Module, make: Callable[[Any], Optimizer], steps: int = 3) -> tuple[Optimizer, Tensor]:
    """An optimizer after some steps with gradients pending, and the loss with its graph."""
    optimizer = make(model.named_parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
    optimizer.zero_grad()
    loss = model.loss()
    loss.backward(retain_graph=True)
    return optimizer, loss


def uv(dtype: torch.dtype = DOUBLE, seed: int = 0) -> UVModel:
    return UVModel.random(width=7, inputs=3, target=2.0, seed=seed, dtype=dtype)


# -- Hessian ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_written_hessian_of_the_uv_model_is_autograds(seed: int) -> None:
    model = uv(seed=seed)
    torch.testing.assert_close(model.hessian(), dense_hessian(model), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_uv_model(seed: int) -> None:
    model = uv(seed=seed)
    found = hessian_sharpness(model.parameters(), model.loss())
    assert found.converged
    assert found == pytest.approx(top(model.hessian()), rel=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 5, 2), (7, 13, 1), (5, 3, 3, 11)], ids=str)
def test_networks(sizes: tuple[int, ...]) -> None:
    model = Net(*sizes)
    found = hessian_sharpness(model.parameters(), model.loss(), tol=1e-8)
    assert found.converged
    assert found == pytest.approx(top(dense_hessian(model)), rel=1e-10)
    assert found.residual <= 1e-6 * found


def test_float32_network_to_the_precision_of_its_products() -> None:
    model = Net(3, 5, 2, dtype=torch.float32)
    found = hessian_sharpness(model.parameters(), model.loss())
    # A product is some hundred float32 operations of the Hessian's size; the eigenvalue averages their rounding.
    assert found == pytest.approx(top(dense_hessian(model)), rel=100 * torch.finfo(torch.float32).eps)


def test_bfloat16_network_to_the_precision_of_its_products() -> None:
    model = Net(3, 5, 2, dtype=torch.bfloat16)
    found = hessian_sharpness(model.parameters(), model.loss(), tol=1e-2)
    assert found == pytest.approx(top(dense_hessian(model)), rel=20 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    "eigenvalues", [(3.0, -8.0, 1.0), (-1.0, -2.0, -5.0), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), (4.0,)]
)
def test_the_largest_algebraic_eigenvalue_of_a_quadratic(eigenvalues: tuple[float, ...]) -> None:
    diagonal = torch.tensor(eigenvalues, dtype=DOUBLE)
    theta = torch.randn(len(diagonal), dtype=DOUBLE, requires_grad=True)
    found = hessian_sharpness([theta], (diagonal * theta**2).sum() / 2)
    assert found.converged
    assert found == pytest.approx(max(eigenvalues), rel=1e-12)
    assert found.residual == pytest.approx(0, abs=1e-6)


def test_a_linear_loss_has_no_curvature() -> None:
    theta = torch.randn(4, requires_grad=True)
    assert hessian_sharpness([theta], theta.sum()) == 0


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    theta = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    scale = torch.tensor([1.0, 5.0, 2.0], dtype=DOUBLE)
    loss = (scale * theta.real**2).sum() / 2 + (3 * theta.imag**2).sum() / 2
    found = hessian_sharpness([theta], loss)
    assert found == pytest.approx(5, rel=1e-10)
    assert found.eigenvector.shape == (6,)


def test_what_is_said_of_the_result() -> None:
    model = Net(5, 7, 3)
    found = hessian_sharpness(model.parameters(), model.loss())
    hessian = dense_hessian(model)
    vector = found.eigenvector
    assert vector.norm().item() == pytest.approx(1)
    assert found == pytest.approx((vector @ hessian @ vector).item(), rel=1e-12)
    assert found.residual == pytest.approx((hessian @ vector - found * vector).norm().item(), rel=1e-6, abs=1e-13)
    assert (torch.linalg.eigvalsh(hessian) - found).abs().min() <= found.residual + 1e-14
    again = pickle.loads(pickle.dumps(found))
    assert (float(again), again.residual, again.converged) == (float(found), found.residual, True)


def test_the_same_seed_gives_the_same_number_and_a_warm_start_takes_fewer_products() -> None:
    model = Net(16, 24, 10)
    loss = model.loss()
    cold, same, other = (hessian_sharpness(model.parameters(), loss, seed=seed) for seed in (1, 1, 2))
    assert (float(cold), cold.hessian_products) == (float(same), same.hessian_products)
    assert not torch.equal(cold.eigenvector, other.eigenvector)
    warm = hessian_sharpness(model.parameters(), loss, start=cold.eigenvector, tol=1e-3)
    assert warm.hessian_products < hessian_sharpness(model.parameters(), loss, tol=1e-3).hessian_products
    assert warm == pytest.approx(float(cold), rel=1e-6)


def test_what_did_not_converge_is_said_and_kept() -> None:
    eigenvalues = torch.linspace(1, 2, 500, dtype=DOUBLE)
    theta = torch.zeros(500, dtype=DOUBLE, requires_grad=True)
    found = hessian_sharpness([theta], (eigenvalues * theta**2).sum() / 2, tol=1e-12, max_iterations=1)
    assert not found.converged
    assert 1.9 < found <= 2
    assert 1e-12 * found < found.residual < 0.1
    assert (eigenvalues - found).abs().min() <= found.residual


def test_products_that_are_not_finite_are_nan() -> None:
    theta = torch.tensor([0.0, 1.0], requires_grad=True)
    found = hessian_sharpness([theta], (theta.abs() ** 1.5).sum() * math.inf)
    assert math.isnan(found)
    assert math.isnan(found.residual)
    assert not found.converged


# -- preconditioned -----------------------------------------------------------------------------------


def adam_preconditioner(optimizer: Optimizer, params: Sequence[Tensor]) -> Tensor:
    """From a state dict that torch's AdamW would have, in float64."""
    state = (optimizer.adamw_state_dict() if isinstance(optimizer, SlimAdam) else optimizer.state_dict())["state"]
    group = optimizer.param_groups[0]
    key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    diagonal = [(state[i][key].double() / (1 - group["betas"][1] ** 3)).sqrt() for i in range(len(params))]
    return flat(diagonal) + group["eps"]


@pytest.mark.parametrize("name", ADAM_LIKE)
@pytest.mark.parametrize("build", [lambda: Net(3, 5, 2), uv], ids=["network", "UV model"])
def test_preconditioned_by_an_optimizer(name: str, build: Callable[[], Any]) -> None:
    model = build()
    optimizer, loss = stepped(model, OPTIMIZERS[name])
    params = list(model.parameters())
    found = hessian_sharpness(params, loss, preconditioner=optimizer)
    root = adam_preconditioner(optimizer, params).rsqrt()
    expected = top(root[:, None] * dense_hessian(model) * root)
    assert found == pytest.approx(expected, rel=1e-6)


def test_preconditioned_by_tensors_that_broadcast() -> None:
    diagonal = torch.tensor([[2.0, 12.0, 30.0], [2.0, 12.0, 30.0]], dtype=DOUBLE)
    theta = torch.randn(2, 3, dtype=DOUBLE, requires_grad=True)
    loss = (diagonal * theta**2).sum() / 2
    found = hessian_sharpness([theta], loss, preconditioner=[torch.tensor([[1.0, 2.0, 10.0]])])
    assert found == pytest.approx(6, rel=1e-6)


def test_preconditioned_while_slimadam_still_measures() -> None:
    model = Net(3, 5, 2)
    optimizer, loss = stepped(model, lambda params: SlimAdam(params, lr=0.01))
    root = adam_preconditioner(optimizer, list(model.parameters())).rsqrt()
    found = hessian_sharpness(model.parameters(), loss, preconditioner=optimizer)
    assert found == pytest.approx(top(root[:, None] * dense_hessian(model) * root), rel=1e-6)


# -- directional --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("build", [lambda: Net(3, 5, 2), lambda: Net(7, 13, 1), uv], ids=["wide", "tall", "UV model"])
def test_directional(name: str, build: Callable[[], Any]) -> None:
    model = build()
    optimizer, loss = stepped(model, OPTIMIZERS[name])
    before = [param.grad.clone() for param in model.parameters()]
    found = directional_sharpness(optimizer, loss)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), before, strict=True))
    direction, grad = flat([d for _, d in pending_directions(optimizer)]), flat(before)
    expected = direction @ dense_hessian(model) @ direction / (direction @ grad)
    assert found == pytest.approx(expected.item(), rel=1e-6)  # D holds float32 where bias corrections do


def test_directional_in_float32() -> None:
    model = Net(3, 5, 2, dtype=torch.float32)
    optimizer, loss = stepped(model, OPTIMIZERS["AdamW"])
    found = directional_sharpness(optimizer, loss)
    direction, grad = (flat(each) for each in ([d for _, d in pending_directions(optimizer)],
                                               [param.grad for param in model.parameters()]))  # fmt: skip
    expected = direction @ dense_hessian(model) @ direction / (direction @ grad)
    assert found == pytest.approx(expected.item(), rel=200 * torch.finfo(torch.float32).eps)


def test_directional_on_a_quadratic_of_its_own_eigenvector() -> None:
    theta = nn.Parameter(torch.tensor([0.0, 2.0], dtype=DOUBLE))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    loss = (torch.tensor([5.0, 3.0]) * theta**2).sum() / 2
    loss.backward(retain_graph=True)
    assert directional_sharpness(optimizer, loss) == pytest.approx(3, rel=1e-12)


def test_directional_of_a_parameter_that_the_loss_does_not_need() -> None:
    used, unused = (nn.Parameter(torch.tensor([1.0])) for _ in range(2))
    optimizer = torch.optim.SGD([used, unused], lr=0.1)
    (used.square() + unused).sum().backward()
    assert directional_sharpness(optimizer, used.square().sum() * 2) == pytest.approx(2 * 4 * 2 / (2 * 4))


def test_no_descent_is_nan() -> None:
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([theta], lr=0.1, maximize=True)
    loss = theta.square().sum()
    loss.backward(retain_graph=True)
    assert math.isnan(directional_sharpness(optimizer, loss))


def test_a_linear_loss_has_no_directional_curvature() -> None:
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    loss = 3 * theta.sum()
    loss.backward(retain_graph=True)
    assert directional_sharpness(optimizer, loss) == 0


# -- wrong uses ---------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def _freed(theta: Tensor) -> Tensor:
    loss = theta.pow(3).sum()
    loss.backward()
    return loss


def _flash(theta: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        heads = theta[:, None, None, None].expand(4, 1, 3, 8).contiguous()
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).pow(2).sum()


def _checkpointed(theta: Tensor, use_reentrant: bool) -> Tensor:
    inputs = torch.ones(4, requires_grad=True)
    return checkpoint(lambda x: (x * theta).pow(2).sum(), inputs, use_reentrant=use_reentrant)


def test_checkpointing_that_is_not_reentrant_changes_nothing() -> None:
    theta = nn.Parameter(torch.arange(4.0))
    assert hessian_sharpness([theta], _checkpointed(theta, use_reentrant=False)) == pytest.approx(2)


@pytest.mark.parametrize(
    ("make_loss", "error", "message"),
    [
        (lambda theta: 1.0, TypeError, r"loss=1.0 must be a tensor"),
        (lambda theta: theta * 2, ValueError, r"loss has shape \(4,\).*one real number"),
        (lambda theta: theta.sum().detach(), ValueError, r"loss has no graph; compute it outside torch.no_grad"),
        (_freed, RuntimeError, r"the graph of the loss is freed; .*retain_graph=True"),
        (_flash, RuntimeError, r"fused attention has no second derivative; .*SDPBackend.MATH"),
        (lambda theta: _checkpointed(theta, use_reentrant=True), RuntimeError, r"use_reentrant=False"),
        (lambda theta: torch.ones(1, requires_grad=True).sum(), ValueError, r"depends on none of the parameters"),
        (lambda theta: _Once.apply(theta).pow(2).sum(), RuntimeError, r"once_differentiable"),
    ],
)
def test_losses_that_do_not_serve(make_loss: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    theta = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([theta], lr=0.1)
    loss = make_loss(theta)
    theta.grad = torch.ones(4)
    with pytest.raises(error, match=message):
        directional_sharpness(optimizer, loss)
    with pytest.raises(error, match=message):
        hessian_sharpness([theta], loss)
    assert torch.equal(theta.grad, torch.ones(4))


def test_nothing_pending() -> None:
    theta = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match=r"has a gradient"):
        directional_sharpness(torch.optim.SGD([theta], lr=0.1), theta.pow(2).sum())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": -1e-3}, ValueError, r"tol=-0.001 must be in"),
        ({"max_iterations": 0}, ValueError, r"max_iterations=0 must be at least 1"),
        ({"start": torch.ones(3)}, ValueError, r"start is a tensor of shape \(3,\).*\(4,\)"),
        ({"start": torch.zeros(4)}, ValueError, r"start has norm 0.0; leave it out"),
        ({"preconditioner": torch.ones(4)}, TypeError, r"must be an optimizer or a list of tensors"),
        ({"preconditioner": [torch.ones(4)] * 2}, ValueError, r"2 tensors for 1 parameters"),
        ({"preconditioner": [torch.ones(3)]}, ValueError, r"shape \(3,\); it must broadcast.*\(4,\)"),
        ({"preconditioner": [torch.zeros(4)]}, ValueError, r"preconditioner\[0\] has elements that are not positive"),
        ({"preconditioner": [1.0]}, TypeError, r"preconditioner\[0\]=1.0 must be a tensor"),
        ({"params": []}, ValueError, r"params is empty"),
        ({"params": nn.Linear(2, 2)}, TypeError, r"params is a Linear; give a list of tensors"),
        ({"params": ["weight"]}, TypeError, r"params\[0\]='weight' must be a tensor"),
        ({"params": [torch.ones(2)]}, ValueError, r"params\[0\] does not require a gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    theta = nn.Parameter(torch.ones(4))
    with pytest.raises(error, match=message):
        hessian_sharpness(**{"params": [theta], "loss": theta.pow(2).sum(), **options})


def test_optimizers_that_are_no_preconditioner() -> None:
    theta = nn.Parameter(torch.ones(4))
    loss = theta.pow(2).sum()
    with pytest.raises(TypeError, match=r"SGD is not Adam-like"):
        hessian_sharpness([theta], loss, preconditioner=torch.optim.SGD([theta], lr=0.1))
    with pytest.raises(ValueError, match=r"params\[0\].*has no second moment in AdamW; take a step first"):
        hessian_sharpness([theta], loss, preconditioner=torch.optim.AdamW([theta], lr=0.1))


def test_scipy_is_asked_for_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    theta = nn.Parameter(torch.ones(4))
    with pytest.raises(ImportError, match=r"needs SciPy: pip install 'slimadam\[curvature\]'"):
        slimadam.hessian_sharpness([theta], theta.pow(2).sum())
