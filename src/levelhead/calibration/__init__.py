"""Does a model's confidence mean what it says? Measures of calibration; torch is all they need."""

from .metrics import ReliabilityTable, calibration_error, reliability

__all__ = ["ReliabilityTable", "calibration_error", "reliability"]
