"""A smaller learning rate during optimizer steps, invisible outside them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim import Optimizer


class _Scaled(NamedTuple):
    owner: Optimizer
    group: dict[str, Any]
    original: Any
    scaled: Any


class LearningRateScale:
    """Multiplies the learning rate of an optimizer's groups, and puts the very same object back.

    Args:
        factor: The factor.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._scaled: dict[int, _Scaled] = {}

    def apply(self, optimizer: Optimizer) -> None:
        """Scale the rate of each group that is not scaled yet (wrapping optimizers share their groups)."""
        if self._factor == 1.0:
            return
        self.restore(optimizer)  # its last step may have raised
        for group in optimizer.param_groups:
            if id(group) not in self._scaled:
                original = group["lr"]
                group["lr"] = original * self._factor
                self._scaled[id(group)] = _Scaled(optimizer, group, original, group["lr"])

    def restore(self, optimizer: Optimizer) -> None:
        """Put back the rates that :meth:`apply` scaled for this optimizer, unless set anew meanwhile."""
        for key, entry in list(self._scaled.items()):
            if entry.owner is optimizer:
                if entry.group["lr"] is entry.scaled:
                    entry.group["lr"] = entry.original
                del self._scaled[key]

    def restore_all(self) -> None:
        """:meth:`restore` for every optimizer."""
        for entry in list(self._scaled.values()):
            self.restore(entry.owner)
