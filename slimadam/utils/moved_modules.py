"""Import paths of earlier versions, which keep working."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "slimadam.automatic": "slimadam.plans.auto",
    "slimadam.calibration": "slimadam.plans.calibrate",
    "slimadam.conversion": "slimadam.optim.checkpoint.conversion",
    "slimadam.errors": "slimadam.utils.errors",
    "slimadam.history": "slimadam.measurement.history",
    "slimadam.optimizer": "slimadam.optim.slimadam",
    "slimadam.parts": "slimadam.layers.splits",
    "slimadam.plan": "slimadam.plans.plan",
    "slimadam.rules": "slimadam.state.rule",
    "slimadam.sharpness": "slimadam.curvature",
    "slimadam.sharpness.critical": "slimadam.curvature.critical",
    "slimadam.sharpness.hessian": "slimadam.curvature.hessian",
    "slimadam.sharpness.logger": "slimadam.curvature.logger",
    "slimadam.sharpness.mix_advice": "slimadam.curvature.mixing.advice",
    "slimadam.sharpness.mixing": "slimadam.curvature.mixing.advise",
    "slimadam.sharpness.regimes": "slimadam.curvature.stability",
    "slimadam.sharpness.rows": "slimadam.curvature.records",
    "slimadam.sharpness.thresholds": "slimadam.curvature.stability",
    "slimadam.warmup": "slimadam.lr_scheduler",
}


class _Moved(Loader):
    """Finds and loads a module of an earlier version as the one that took its place."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a moved module, None for any other."""
        return ModuleSpec(name, cls(), is_package=name == "slimadam.sharpness") if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module in the place of the one that is being imported."""
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def find_moved_modules() -> None:
    """Let imports find modules under the names of earlier versions."""
    if not any(finder.__name__ == "_Moved" for finder in sys.meta_path if isinstance(finder, type)):
        sys.meta_path.insert(0, _Moved)  # before a folder that an earlier version left behind
