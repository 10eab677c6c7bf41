"""Proper scores of confidence: negative log-likelihood and Brier score.

A proper score is lowest, on average, for the true probability; unlike a calibration error it cannot
be made small by saying the base rate of everything. For probabilities over C classes,
`torch.nn.functional.nll_loss` is the same measure.
"""

from typing import Any

from .binned import Binning, reliability
from .table import Bins, BrierDecomposition


def negative_log_likelihood(confidence: Any, correct: Any) -> float:
    """Mean of -log(confidence) where the answer was right, -log(1 - confidence) where it was wrong.

    A confidence of exactly 1 for a wrong answer has no finite likelihood; as in scikit-learn's
    `log_loss`, confidences are kept 2.2e-16 away from 0 and 1, so it costs 36 nats. A softmax in
    float32 says 1 from a logit gap of about 17 on.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]; any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.

    Returns:
        Nats per prediction, in [0, 36.1]. Computed on the CPU in float64.

    Raises:
        TypeError: As `reliability`.
        ValueError: As `reliability`.

    Example:
        >>> round(negative_log_likelihood([0.5, 0.75], [True, False]), 4)
        1.0397

    References:
        Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017,
        arXiv 1706.04599, where it stands beside the calibration error.
    """
    return reliability(confidence, correct, bins=1).negative_log_likelihood.item()


def brier_score(confidence: Any, correct: Any) -> float:
    """Mean of (confidence - correct)^2.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]; any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.

    Returns:
        The score, in [0, 1]; lower is better, and 0.25 is what always saying 0.5 gets. Computed on
        the CPU in float64.

    Raises:
        TypeError: As `reliability`.
        ValueError: As `reliability`.

    Example:
        >>> brier_score([0.5, 0.75], [True, False])
        0.40625

    References:
        Brier. Verification of forecasts expressed in terms of probability. Monthly Weather Review
        78, 1950.
    """
    return reliability(confidence, correct, bins=1).brier_score.item()


def brier_decomposition(
    confidence: Any, correct: Any, *, bins: Bins = 10, binning: Binning = "uniform"
) -> BrierDecomposition:
    """The Brier score as reliability - resolution + uncertainty + what bins hide.

    With o the overall accuracy and w_b = count_b / N: reliability = sum_b w_b (confidence_b -
    accuracy_b)^2, resolution = sum_b w_b (accuracy_b - o)^2, uncertainty = o (1 - o). The three add
    up where all confidences in a bin are equal; `within_bins` is the rest.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]; any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.
        bins: As in `reliability`.
        binning: As in `reliability`.

    Returns:
        The four terms. Reliability is the square of the weighted "l2" calibration error.

    Raises:
        TypeError: As `reliability`.
        ValueError: As `reliability`.

    Example:
        >>> terms = brier_decomposition([0.2, 0.2, 0.8, 0.8], [0, 1, 1, 1])
        >>> [round(term, 4) for term in terms]
        [0.065, 0.0625, 0.1875, 0.0]

    References:
        Murphy. A new vector partition of the probability score. Journal of Applied Meteorology 12,
        1973.
        Stephenson, Coelho, Jolliffe. Two extra components in the Brier score decomposition. Weather
        and Forecasting 23, 2008.
    """
    return reliability(confidence, correct, bins=bins, binning=binning).brier_decomposition()
