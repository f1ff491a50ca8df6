"""SlimAdam: AdamW that stores second moments only as finely as a measurement says each layer needs."""

from typing import TYPE_CHECKING

from slimadam.curvature.critical import CriticalSharpness, SharpnessMeasurement
from slimadam.curvature.hessian import HessianSharpness, directional_sharpness, hessian_sharpness
from slimadam.curvature.logger import SharpnessLogger
from slimadam.curvature.mixing.advice import MixAdvice
from slimadam.curvature.mixing.advise import advise_mix
from slimadam.curvature.records import SharpnessRow
from slimadam.curvature.stability import Regime, edge_of_stability, regimes
from slimadam.layers import splits
from slimadam.layers.splits import Split
from slimadam.lr_scheduler import CatapultWarmup, PersistentCatapultWarmup, critical_lr
from slimadam.measurement.history import SNRHistory
from slimadam.measurement.recorder import SNRRecorder, every, paper_schedule
from slimadam.measurement.snr import snr
from slimadam.optim.checkpoint.conversion import convert_state_dict
from slimadam.optim.slimadam import SlimAdam
from slimadam.plans.auto import AutoPlan
from slimadam.plans.calibrate import calibrate
from slimadam.plans.plan import CompressionPlan
from slimadam.state.rule import Rule
from slimadam.utils.errors import PlanError
from slimadam.utils.moved_modules import find_moved_modules
from slimadam.utils.version import __version__ as __version__

__all__ = [
    "AutoPlan",
    "CatapultWarmup",
    "CompressionPlan",
    "CriticalSharpness",
    "HessianSharpness",
    "MixAdvice",
    "PersistentCatapultWarmup",
    "PlanError",
    "Regime",
    "Rule",
    "SNRHistory",
    "SNRRecorder",
    "SharpnessLogger",
    "SharpnessMeasurement",
    "SharpnessRow",
    "SlimAdam",
    "Split",
    "advise_mix",
    "calibrate",
    "convert_state_dict",
    "critical_lr",
    "directional_sharpness",
    "edge_of_stability",
    "every",
    "hessian_sharpness",
    "paper_schedule",
    "regimes",
    "snr",
]

find_moved_modules()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Split]:
        if name == "Parts":
            return splits.__getattr__(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
