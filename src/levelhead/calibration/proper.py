"""Proper scores of confidence: negative log-likelihood and Brier score.

A proper score is lowest, on average, for the true probability; unlike a calibration error it cannot
be made small by saying the base rate of everything. For probabilities over C classes,
`torch.nn.functional.nll_loss` is the same measure.
"""

from typing import Any

from .binned import reliability


def negative_log_likelihood(confidence: Any, correct: Any) -> float:
    """Return the mean of -log(confidence) where the answer was right, -log(1 - confidence) where it was wrong.

    A confidence of exactly 1 for a wrong answer has no finite likelihood; as in scikit-learn's
    `log_loss`, confidences are kept 2.2e-16 away from 0 and 1, so it costs 36 nats. A softmax in
    float32 says 1 from a logit gap of about 17 on.

    Args:
        confidence: As in `reliability`.
        correct: As in `reliability`.

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
    """Return the mean of (confidence - correct)^2.

    Args:
        confidence: As in `reliability`.
        correct: As in `reliability`.

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
