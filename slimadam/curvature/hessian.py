"""Curvature from Hessian-vector products: along the pending update, and the Hessian's top eigenvalue.

A product takes a second backward pass through the graph of the loss, so every operation in it must have a second
derivative. The critical sharpness needs forward passes only; this is the ground truth beside it for small models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import pending_directions, unwrapped
from slimadam.kernels.interface import second_moment_dtype
from slimadam.optim.slimadam import SlimAdam
from slimadam.state import second_moment
from slimadam.utils.dtensor import is_dtensor
from slimadam.utils.errors import shown

_Vector = NDArray[np.float64]

_REMEDIES = {
    "backward through the graph a second time": (
        "the graph of the loss is freed; compute the loss again, or call loss.backward(retain_graph=True)"
    ),
    "_attention": (
        "fused attention has no second derivative; compute the loss under "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    ),
    "CuDNN RNN": (
        "cuDNN's recurrent layers have no second derivative; compute the loss under "
        "torch.backends.cudnn.flags(enabled=False)"
    ),
    "aot_autograd": (
        "a compiled model has no second derivative; compute the loss with the model as it was before torch.compile"
    ),
    "is not implemented": "an operation in the loss has no second derivative; compute the loss without it",
    # Nodes behind which autograd sees constants, without a word.
    "torch::autograd::Error": (
        "a custom autograd function in the loss is marked once_differentiable: it has no second derivative; "
        "compute the loss without it"
    ),
    "CheckpointFunctionBackward": (
        "reentrant activation checkpointing hides parameters from second derivatives; checkpoint with "
        "use_reentrant=False"
    ),
}
"""Remedies by a part of autograd's error message, the first that fits, or by the name of a node."""


class HessianSharpness(float):
    """The top eigenvalue of a Hessian, with its accuracy.

    Attributes:
        residual: ``||H x - eigenvalue x||`` for the unit vector ``x`` that was found. The Hessian has an eigenvalue
            no further than this from the number; NaN where nothing was found.
        converged: Whether the iteration reached its tolerance; if not, the number is a lower bound, up to rounding.
        hessian_products: Hessian-vector products taken.
        eigenvector: ``x`` over all parameters in their order, flat, float64, on the CPU: a ``start`` for the next.
    """

    residual: float
    converged: bool
    hessian_products: int
    eigenvector: Tensor


def directional_sharpness(optimizer: Optimizer, loss: Tensor) -> float:
    """Return the loss's curvature along the pending update, ``D^T H D / D^T g``, by one Hessian-vector product.

    A quadratic loss falls for every step ``theta - eta D`` with ``eta < 2 / sharpness`` (arXiv 2601.16979). Call it
    after ``loss.backward(retain_graph=True)`` and before the step. Takes memory for ``D`` and for the graph of
    the gradient beside that of the loss. Parameters, their gradients and the optimizer's state do not change.

    Args:
        optimizer: :class:`~slimadam.SlimAdam` or any torch optimizer, with gradients pending in ``p.grad``. ``D`` is
            the direction of its next step, weight decay included; see
            :func:`~slimadam.curvature.probe.directions.pending_directions`.
        loss: A scalar with its graph; ``g`` and ``H`` are its derivatives. It need not be that of the gradients.

    Returns:
        The sharpness, in units of one over the learning rate. NaN where ``D^T g <= 0``: the step does not descend
        to first order, so that no learning rate is critical.

    Raises:
        RuntimeError: No gradient is pending, the graph is freed or not twice differentiable, or a parameter is sharded.
        TypeError: The optimizer is none of torch, or the loss is no tensor.
        ValueError: The loss is not one real number with a graph, or depends on none of the parameters.
    """
    _check(loss, [param for group in unwrapped(optimizer).param_groups for param in group["params"]])
    params, directions = zip(*pending_directions(optimizer), strict=True)
    grads = _gradients(loss, params)
    slope = _dot(grads, directions)
    if not slope.item() > 0:
        return math.nan
    return (_dot(_hessian_product(grads, params, directions), directions) / slope).item()


def hessian_sharpness(
    params: Iterable[Tensor],
    loss: Tensor,
    *,
    preconditioner: Optimizer | Iterable[Tensor] | None = None,
    tol: float = 1e-5,
    max_iterations: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
) -> HessianSharpness:
    """Return the largest (most positive) eigenvalue of the Hessian of a loss, by SciPy's Lanczos iteration.

    Vectors are kept in float64, Hessian-vector products are computed in the parameters' precision. Takes memory for
    20 vectors of 8 bytes per parameter on the host, and the graph of the gradient.

    Args:
        params: Tensors to differentiate by, such as ``model.parameters()``.
        loss: A scalar with its graph.
        preconditioner: For the eigenvalue of ``P**(-1/2) H P**(-1/2)``, to which the stability of Adam refers
            (arXiv 2207.14484): an optimizer that keeps ``exp_avg_sq``, whose ``P = sqrt(v_hat) + eps`` is that of the
            last step, SlimAdam's averages broadcast; or the positive diagonal of ``P``, a tensor a parameter.
        tol: Relative residual at which the iteration stops; the eigenvalue's error is of second order in it.
        max_iterations: Most restarts of the iteration, of about ten Hessian-vector products each.
        seed: Of the random vector to start from.
        start: A vector to start from, as ``eigenvector`` of an earlier result.

    Returns:
        A float, with its residual and whether it converged; NaN where Hessian-vector products are not finite.

    Raises:
        ImportError: SciPy is missing.
        RuntimeError: The graph is freed, an operation has no second derivative, or a parameter is sharded.
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or does not fit the parameters.
    """
    params = _checked_params(params)
    _check(loss, params)
    if not 0 <= tol < 1:
        raise ValueError(f"tol={tol} must be in [0, 1); 0 stands for machine precision")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations} must be at least 1")
    scales = None if preconditioner is None else _scales_of(preconditioner, params)
    first = _starting_vector(sum(_real(param).numel() for param in params), seed, start)
    grads = _gradients(loss, params)
    count = 0

    def scaled(vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        return vectors if scales is None else [vector * scale for vector, scale in zip(vectors, scales, strict=True)]

    def product(flat: _Vector) -> _Vector:
        nonlocal count
        count += 1
        images = scaled(_hessian_product(grads, params, scaled(_unflattened(flat, params))))
        image: _Vector = torch.cat([_real(part.detach()).flatten().to("cpu", torch.float64) for part in images]).numpy()
        if not np.isfinite(image).all():
            raise FloatingPointError
        return image

    try:
        vector, converged = _top_eigenvector(product, first, tol, max_iterations)
        image = product(vector)
    except FloatingPointError:
        vector, converged, value, residual = first, False, math.nan, math.nan
    else:
        value = float(vector @ image)
        residual = float(np.linalg.norm(image - value * vector))
    found = HessianSharpness(value)
    found.residual = residual
    found.converged = converged
    found.hessian_products = count
    found.eigenvector = torch.from_numpy(vector)
    return found


def _top_eigenvector(
    product: Callable[[_Vector], _Vector], start: _Vector, tol: float, max_iterations: int
) -> tuple[_Vector, bool]:
    """Return a unit vector, and whether the iteration converged to it."""
    try:
        from scipy.sparse import linalg
    except ImportError as missing:
        raise ImportError("hessian_sharpness needs SciPy: pip install 'slimadam[curvature]'") from missing
    # ARPACK takes neither a start in the null space, where a random vector lies only if the matrix is zero, nor size 1.
    if not product(start).any():
        return start, True
    if start.size == 1:
        return np.ones(1), True
    operator = linalg.LinearOperator((start.size, start.size), matvec=product, dtype=np.float64)
    converged = True
    try:
        vectors = linalg.eigsh(operator, k=1, which="LA", v0=start, tol=tol, maxiter=max_iterations)[1]
    except linalg.ArpackNoConvergence:
        # ARPACK does not return its best vector; a few iterations of LOBPCG do.
        converged = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it did not converge either
            vectors = linalg.lobpcg(operator, start[:, None], maxiter=20)[1]
    return vectors[:, 0] / np.linalg.norm(vectors[:, 0]), converged


@torch.no_grad()
def _scales_of(preconditioner: Optimizer | Iterable[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return ``P**(-1/2)`` for each parameter, broadcastable to it."""
    if isinstance(preconditioner, Optimizer):
        diagonals = _diagonals_of(unwrapped(preconditioner), params)
    elif isinstance(preconditioner, Tensor) or not isinstance(preconditioner, Iterable):
        raise TypeError(f"preconditioner={shown(preconditioner)} must be an optimizer or a list of tensors")
    else:
        diagonals = list(preconditioner)
    if len(diagonals) != len(params):
        raise ValueError(f"preconditioner has {len(diagonals)} tensors for {len(params)} parameters; give one for each")
    scales = []
    for index, (diagonal, param) in enumerate(zip(diagonals, params, strict=True)):
        if not isinstance(diagonal, Tensor):
            raise TypeError(f"preconditioner[{index}]={shown(diagonal)} must be a tensor")
        try:
            diagonal.expand_as(param)
        except RuntimeError:
            raise ValueError(
                f"preconditioner[{index}] has shape {tuple(diagonal.shape)}; it must broadcast to the parameter's, "
                f"{tuple(param.shape)}"
            ) from None
        if diagonal.is_complex() or not (diagonal.isfinite() & (diagonal > 0)).all():
            raise ValueError(
                f"preconditioner[{index}] has elements that are not positive numbers: an optimizer needs eps > 0 for "
                "elements whose gradient was always zero"
            )
        scales.append(diagonal.to(param.device).rsqrt())
    return scales


def _diagonals_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    """Return ``sqrt(v / (1 - beta2**t)) + eps`` of each parameter; with amsgrad ``v`` is the maximum."""
    name = type(optimizer).__name__
    if not all({"betas", "eps"} <= group.keys() for group in optimizer.param_groups):
        raise TypeError(f"preconditioner: {name} is not Adam-like: it has no betas and eps")
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    rules: dict[Tensor, Any] = {}
    if isinstance(optimizer, SlimAdam):
        rules = dict(zip(groups, optimizer.plan.by_parameter().values(), strict=True))
    diagonals = []
    for index, param in enumerate(params):
        group: dict[str, Any] = groups.get(param, {})
        kind = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        state = optimizer.state.get(param, {})
        moment = state.get(kind)
        if param in rules:
            stored = second_moment.moments_of(state, rules[param], kind)
            moment = second_moment.expand(stored, rules[param], tuple(param.shape)) if stored else None
        if moment is None or not group:
            raise ValueError(
                f"params[{index}], of shape {tuple(param.shape)}, has no second moment in {name}; take a step first, "
                "and leave out what the optimizer does not hold or what never had a gradient"
            )
        correction = 1 - float(group["betas"][1]) ** float(state["step"])
        diagonals.append((moment.to(second_moment_dtype(moment.dtype)) / correction).sqrt() + group["eps"])
    return diagonals


def _gradients(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    _check_nothing_hidden([loss])
    grads = _grad(loss, params, create_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError("loss depends on none of the parameters; compute it with the model that holds them")
    found = [torch.zeros_like(param) if grad is None else grad for grad, param in zip(grads, params, strict=True)]
    _check_nothing_hidden(found)
    return found


def _check_nothing_hidden(roots: Iterable[Tensor]) -> None:
    """Raise for graphs with nodes behind which autograd sees constants without a word."""
    waiting = [root.grad_fn for root in roots]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() in _REMEDIES:
                raise RuntimeError(_REMEDIES[node.name()])
            waiting += [following for following, _ in node.next_functions]


def _hessian_product(grads: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ``H v``, in the parameters' precision."""
    with torch.enable_grad():
        slope = _dot(grads, vectors)
    if not slope.requires_grad:  # the loss is linear
        return [torch.zeros_like(param) for param in params]
    return _grad(slope, params, retain_graph=True, materialize_grads=True)


def _grad(output: Tensor, params: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Differentiate; autograd's errors about second derivatives are replaced by their remedies."""
    try:
        return torch.autograd.grad(output, params, **options)
    except RuntimeError as error:
        for sign, remedy in _REMEDIES.items():
            if sign in str(error):
                raise RuntimeError(remedy) from error
        raise


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the sum over all tensors of their inner products as real vectors, in at least float32."""
    total = torch.zeros(())
    for one, other in zip(map(_real, left), map(_real, right), strict=True):
        dtype = torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)
        total = total.to(one.device) + (one.to(dtype) * other.to(dtype)).sum()
    return total


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _unflattened(flat: _Vector, params: Sequence[Tensor]) -> list[Tensor]:
    shapes = [_real(param).shape for param in params]
    reals = torch.split(torch.from_numpy(flat.reshape(-1)), [shape.numel() for shape in shapes])
    vectors = []
    for param, shape, real in zip(params, shapes, reals, strict=True):
        vector = torch.view_as_complex(real.view(shape)) if param.is_complex() else real.view(shape)
        vectors.append(vector.to(param.device, param.dtype))
    return vectors


def _starting_vector(size: int, seed: int, start: Tensor | None) -> _Vector:
    """Return a unit vector: that of an earlier result, or a random one."""
    flat = noise = np.random.default_rng(seed).standard_normal(size)
    if isinstance(start, Tensor) and start.shape == (size,):
        flat = start.detach().to("cpu", torch.float64).numpy()
        flat = flat + 1e-3 * np.linalg.norm(flat) / np.linalg.norm(noise) * noise  # to leave a block of the Hessian
    elif start is not None:
        found = f"a tensor of shape {tuple(start.shape)}" if isinstance(start, Tensor) else shown(start)
        raise ValueError(f"start is {found}; give the eigenvector of an earlier result, of shape ({size},)")
    norm = float(np.linalg.norm(flat))
    if not 0 < norm < math.inf:
        raise ValueError(f"start has norm {norm}; leave it out to start from a random vector")
    unit: _Vector = flat / norm
    return unit


def _check(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Raise for a loss that is not one real number with a graph, and for parameters that are sharded."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss={shown(loss)} must be a tensor with its graph, as the model's loss before item()")
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(f"loss has shape {tuple(loss.shape)} and dtype {loss.dtype}; give one real number")
    if not loss.requires_grad:
        raise ValueError("loss has no graph; compute it outside torch.no_grad() and do not detach it")
    if any(map(is_dtensor, params)):
        raise RuntimeError(
            "parameters are sharded (DTensors), and what shards them has no second backward pass; measure the critical "
            "sharpness, slimadam.CriticalSharpness(optimizer).measure(closure), which needs forward passes only"
        )


def _checked_params(params: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, (Tensor, torch.nn.Module)):
        raise TypeError(f"params is a {type(params).__name__}; give a list of tensors, such as model.parameters()")
    found = list(params)
    if not found:
        raise ValueError("params is empty; a generator such as model.parameters() can be used once only")
    for index, param in enumerate(found):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{index}]={shown(param)} must be a tensor")
        if not param.requires_grad:
            raise ValueError(f"params[{index}] does not require a gradient; leave frozen parameters out")
    if not any(param.numel() for param in found):
        raise ValueError("params have no elements")
    return found
