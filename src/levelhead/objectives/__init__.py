"""Training losses beyond label smoothing, each made of statistics of the logits."""

from .distillation import Distillation, distillation_loss

__all__ = ["Distillation", "distillation_loss"]
