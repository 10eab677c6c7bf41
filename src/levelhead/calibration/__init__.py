"""Does a model's confidence mean what it says? Measures of calibration; torch is all they need."""

from .capacity import (
    Capacity,
    HeadGeometry,
    head_capacity,
    head_geometry,
    smoothed_loss_floor,
    smoothed_margin,
)
from .metrics import ReliabilityTable, calibration_error, reliability

__all__ = [
    "Capacity",
    "HeadGeometry",
    "ReliabilityTable",
    "calibration_error",
    "head_capacity",
    "head_geometry",
    "reliability",
    "smoothed_loss_floor",
    "smoothed_margin",
]
