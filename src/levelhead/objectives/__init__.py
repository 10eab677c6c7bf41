"""Training losses beyond label smoothing, each made of statistics of the logits."""

from .distillation import Distillation, distillation_loss
from .rcft import CalibrationAware
from .recalibration import Recalibration, recalibrate, scale_probabilities, smooth_probabilities

__all__ = [
    "CalibrationAware",
    "Distillation",
    "Recalibration",
    "distillation_loss",
    "recalibrate",
    "scale_probabilities",
    "smooth_probabilities",
]
