"""The sharpness at which an optimizer stops being stable: the edge of stability."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from slimadam.curvature.probe.directions import reference_lr, unwrapped
from slimadam.optim.slimadam import SlimAdam


def edge_of_stability(optimizer: Optimizer) -> float | None:
    r"""The largest curvature at which the optimizer converges on a quadratic loss, its preconditioner held still.

    With learning rate ``lr``, momentum or first decay rate ``b``, dampening ``d`` and weight decay ``w``:

    ==============================  ===============================================
    gradient descent                ``2 / lr - w``
    SGD with momentum               ``(2 + 2 b) / ((1 - d) lr) - w``
    SGD with Nesterov's momentum    ``(2 + 2 b) / ((1 + 2 b) lr) - w``
    Adam                            ``(2 + 2 b) / ((1 - b) lr)``
    AdamW, SlimAdam                 ``(2 + 2 b) / ((1 - b) lr) - w``
    ==============================  ===============================================

    Those of SGD are for the top eigenvalue of the Hessian ``H`` (arXiv 2103.00065), those of Adam for that of
    ``P**(-1/2) H P**(-1/2)`` with ``P = sqrt(v_hat) + eps`` (arXiv 2207.14484):
    :func:`~slimadam.hessian_sharpness` with the optimizer as preconditioner. The critical and the directional
    sharpness, which look one step ahead, compare with ``2 / lr`` (arXiv 2601.16979).

    The last is arXiv 2601.16979's. Decoupled weight decay shrinks parameters beside the momentum, not through it, so
    that strictly it counts ``(1 + b) / (1 - b)`` times: on ``h / 2 theta**2`` with ``a = 1 - lr w`` the update
    ``theta' = a theta - lr m'``, ``m' = b m + (1 - b) h theta`` has the characteristic polynomial
    ``z**2 - (a + b - lr (1 - b) h) z + a b``, and the root ``z = -1`` at ``lr (1 - b) h = (1 + a) (1 + b)``. The
    difference is ``lr w b / (1 + b)`` of the threshold: 5e-5 of it at ``lr = 1e-3``, ``w = 0.1``.

    Args:
        optimizer: Any torch optimizer; its parameter group with the largest learning rate counts.

    Returns:
        The threshold, in units of one over the learning rate; infinity at ``lr = 0``. None where no formula is known
        (NAdam, RAdam, ...). Adam's own weight decay goes through the preconditioner and has no term.

    Raises:
        TypeError: It is no torch optimizer.
        ValueError: A group has no learning rate.
    """
    optimizer = unwrapped(optimizer)
    lr = reference_lr(optimizer)
    group = next(group for group in optimizer.param_groups if float(group["lr"]) == lr)
    if isinstance(optimizer, torch.optim.SGD):
        return _of_sgd(group, lr)
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, SlimAdam)):
        coupled = type(optimizer) is torch.optim.Adam and not group.get("decoupled_weight_decay", False)
        return _of_adam(group, lr, 0.0 if coupled else float(group["weight_decay"]))
    return None


def _of_sgd(group: dict[str, Any], lr: float) -> float:
    momentum, decay = float(group["momentum"]), float(group["weight_decay"])
    if lr == 0:
        return math.inf
    if momentum == 0:
        return 2 / lr - decay
    factor = 1 + 2 * momentum if group["nesterov"] else 1 - float(group["dampening"])
    return (2 + 2 * momentum) / (factor * lr) - decay if factor > 0 else math.inf


def _of_adam(group: dict[str, Any], lr: float, decay: float) -> float:
    beta1 = float(group["betas"][0])
    return (2 + 2 * beta1) / ((1 - beta1) * lr) - decay if lr > 0 else math.inf
