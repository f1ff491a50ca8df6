"""SlimAdam: AdamW that stores second moments only as finely as a measurement says each layer needs."""

from slimadam.automatic import AutoPlan
from slimadam.calibration import SNRRecorder, calibrate, every, paper_schedule
from slimadam.errors import PlanError
from slimadam.history import SNRHistory
from slimadam.optimizer import SlimAdam
from slimadam.parts import Parts
from slimadam.plan import CompressionPlan
from slimadam.rules import Rule
from slimadam.sharpness.critical import CriticalSharpness, SharpnessMeasurement
from slimadam.sharpness.logger import SharpnessLogger
from slimadam.sharpness.mix_advice import MixAdvice
from slimadam.sharpness.mixing import advise_mix
from slimadam.sharpness.rows import SharpnessRow
from slimadam.snr import snr
from slimadam.state import convert_state_dict

__version__ = "0.1.0"

__all__ = [
    "AutoPlan",
    "CompressionPlan",
    "CriticalSharpness",
    "MixAdvice",
    "Parts",
    "PlanError",
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
    "every",
    "paper_schedule",
    "snr",
]
