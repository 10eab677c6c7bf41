"""Does a model's confidence mean what it says? Measures of calibration; torch is all they need.

Inputs are tensors, arrays or lists of any shape, computed on the CPU in float64. `confidence` is the
probability a model gave to its own answer, `score` any number that grows with trust, `correct`
whether the answer was right.
"""

from .abstention import Payoff, abstention_threshold, payoff
from .binned import (
    adaptive_bins,
    calibration_error,
    classwise_calibration_error,
    reliability,
)
from .bootstrap import METRICS, RANKING_METRICS, Interval, compare, summarise
from .capacity import (
    Capacity,
    HeadGeometry,
    head_capacity,
    head_geometry,
    smoothed_loss_floor,
    smoothed_margin,
)
from .proper import brier_decomposition, brier_score, negative_log_likelihood
from .ranking import RiskCoverage, auroc, mann_whitney_p, risk_coverage
from .smooth import smooth_calibration_error
from .table import BrierDecomposition, ReliabilityTable
from .temperature import fit_temperature

__all__ = [
    "METRICS",
    "RANKING_METRICS",
    "BrierDecomposition",
    "Capacity",
    "HeadGeometry",
    "Interval",
    "Payoff",
    "ReliabilityTable",
    "RiskCoverage",
    "abstention_threshold",
    "adaptive_bins",
    "auroc",
    "brier_decomposition",
    "brier_score",
    "calibration_error",
    "classwise_calibration_error",
    "compare",
    "fit_temperature",
    "head_capacity",
    "head_geometry",
    "mann_whitney_p",
    "negative_log_likelihood",
    "payoff",
    "reliability",
    "risk_coverage",
    "smooth_calibration_error",
    "smoothed_loss_floor",
    "smoothed_margin",
    "summarise",
]
