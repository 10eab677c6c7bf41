"""Training losses beyond label smoothing, each made of statistics of the logits."""

from .distillation import Distillation, distillation_loss
from .rcft import CalibrationAware
from .recalibration import Recalibration, recalibrate

__all__ = [
    "CalibrationAware",
    "Distillation",
    "Recalibration",
    "distillation_loss",
    "recalibrate",
]
