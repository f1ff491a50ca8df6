"""SlimAdam: AdamW that stores second moments only as finely as a measurement says each layer needs."""

from slimadam.automatic import AutoPlan
from slimadam.calibration import SNRRecorder, calibrate, every, paper_schedule
from slimadam.conversion import convert_state_dict
from slimadam.errors import PlanError
from slimadam.history import SNRHistory
from slimadam.optimizer import SlimAdam
from slimadam.parts import Parts
from slimadam.plan import CompressionPlan
from slimadam.rules import Rule
from slimadam.sharpness.critical import CriticalSharpness, SharpnessMeasurement
from slimadam.sharpness.hessian import HessianSharpness, directional_sharpness, hessian_sharpness
from slimadam.sharpness.logger import SharpnessLogger
from slimadam.sharpness.mix_advice import MixAdvice
from slimadam.sharpness.mixing import advise_mix
from slimadam.sharpness.regimes import Regime, regimes
from slimadam.sharpness.rows import SharpnessRow
from slimadam.sharpness.thresholds import edge_of_stability
from slimadam.snr import snr
from slimadam.warmup import CatapultWarmup, PersistentCatapultWarmup, critical_lr

__version__ = "0.1.0"

__all__ = [
    "AutoPlan",
    "CatapultWarmup",
    "CompressionPlan",
    "CriticalSharpness",
    "HessianSharpness",
    "MixAdvice",
    "Parts",
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
