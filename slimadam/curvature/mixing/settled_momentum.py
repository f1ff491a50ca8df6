"""First moments as they would be if the pending gradient stayed: a direction without the memory of other data."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from slimadam.curvature.probe.directions import LINEAR_IN_LR, coupled_decay, unwrapped
from slimadam.kernels.reference import scale_grad
from slimadam.optim.slimadam import SlimAdam

Momentum = Literal["settled", "kept"]


class SettledMomentum:
    """Sets first moments to where they settle under the pending gradient, and puts the real ones back.

    Of ``exp_avg`` (Adam and its kin, SlimAdam, Lion) that is the gradient, of the ``momentum_buffer`` of SGD the
    gradient over ``1 - momentum``; weight decay that is part of the gradient, and clipping by SlimAdam, included.

    Raises:
        ValueError: Its first moments are kept in another way.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer = unwrapped(optimizer)
        self._kept: list[tuple[Tensor, dict[str, Any], Tensor, Tensor]] = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                moment = self._moment(optimizer.state.get(param, {}))
                if moment is not None:
                    self._kept.append((param, group, moment, moment.clone()))

    def _moment(self, state: dict[str, Any]) -> Tensor | None:
        found = next((state[key] for key in ("exp_avg", "exp_avg_codes", "momentum_buffer") if key in state), None)
        is_known = "exp_avg" in state or isinstance(self._optimizer, SGD)
        is_float = isinstance(found, Tensor) and (found.is_floating_point() or found.is_complex())
        if found is not None and not (is_known and is_float):
            raise ValueError(
                f"momentum='settled' knows exp_avg in floating point and the momentum_buffer of SGD, not what "
                f"{type(self._optimizer).__name__} keeps here; use momentum='kept'"
            )
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Overwrite the first moments of parameters that have a gradient."""
        optimizer = self._optimizer
        factor = optimizer.clip_factor() if isinstance(optimizer, SlimAdam) else None
        for param, group, moment, _ in self._kept:
            if param.grad is not None:
                grad = scale_grad(param.grad, factor)
                settled = -grad if group.get("maximize", False) else grad
                decay = coupled_decay(optimizer, group) if type(optimizer) in LINEAR_IN_LR else 0.0
                if decay:
                    settled = settled + decay * param
                if isinstance(optimizer, SGD):
                    settled = settled * ((1 - group["dampening"]) / (1 - group["momentum"]))
                moment.copy_(settled)

    @torch.no_grad()
    def restore(self) -> None:
        """Put all first moments back, bit for bit."""
        for _, _, moment, original in self._kept:
            moment.copy_(original)
