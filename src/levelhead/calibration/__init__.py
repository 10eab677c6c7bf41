"""Does a model's confidence mean what it says? Measures of calibration; torch is all they need.

Inputs are tensors, arrays or lists of any shape, computed on the CPU in float64. `confidence` is the
probability a model gave to its own answer, `score` any number that grows with trust, `correct`
whether the answer was right.
"""

from .binned import calibration_error, classwise_calibration_error, reliability
from .bootstrap import Interval, compare, summarise
from .capacity import Capacity, head_capacity
from .proper import brier_score, negative_log_likelihood
from .ranking import RiskCoverage, auroc, mann_whitney_p, risk_coverage
from .smooth import smooth_calibration_error
from .table import ReliabilityTable
from .temperature import fit_temperature
from .threshold import Abstention, abstention

__all__ = [
    "Abstention",
    "Capacity",
    "Interval",
    "ReliabilityTable",
    "RiskCoverage",
    "abstention",
    "auroc",
    "brier_score",
    "calibration_error",
    "classwise_calibration_error",
    "compare",
    "fit_temperature",
    "head_capacity",
    "mann_whitney_p",
    "negative_log_likelihood",
    "reliability",
    "risk_coverage",
    "smooth_calibration_error",
    "summarise",
]
