"""Training losses beyond label smoothing, each made of statistics of the logits."""

from .distillation import Distillation, distillation_loss
from .rcft import CalibrationAware

__all__ = ["CalibrationAware", "Distillation", "distillation_loss"]
