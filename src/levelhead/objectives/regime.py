"""Whether a model can be calibrated at the accuracy it has: the two regimes of calibration-aware fine-tuning.

References:
    Xiao et al. 2025, https://arxiv.org/abs/2505.01997.
    Wilson 1927, JASA 22(158), for the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..calibration import reliability
from ..calibration.predictions import as_number

_NORMAL = 1.959963984540054  # quantile of 0.975


@dataclass(frozen=True)
class Regime:
    """Accuracy and confidence of a model, what they say about its calibration, and what the paper would do.

    Attributes:
        questions: N.
        accuracy: share of right answers, in [0, 1].
        accuracy_low: lower end of its 95% interval (Wilson).
        accuracy_high: upper end.
        confidence: mean confidence, in [0, 1].
        ece: expected calibration error; for any bins, |confidence - accuracy| <= ece <= rms <= mce.
        rms: root mean squared calibration error.
        mce: the largest of the bins.
        critical_accuracy: a*, the accuracy up to which a model can be calibrated; None: not known.
        regime: "calibratable" if the interval of the accuracy lies at or below a*, "non-calibratable" if
            it lies above, "undetermined" if a* lies inside or is not known.
    """

    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    confidence: float
    ece: float
    rms: float
    mce: float
    critical_accuracy: float | None
    regime: Literal["calibratable", "non-calibratable", "undetermined"]

    @property
    def least_ece(self) -> float:
        """Return what the calibration error is at least, whatever the bins: |mean confidence - accuracy|."""
        return abs(self.confidence - self.accuracy)

    @property
    def method(self) -> Literal["cft", "rcft"]:
        """Return what the paper would fine-tune with: RCFT above a*, CFT otherwise, which it begins with."""
        return "rcft" if self.regime == "non-calibratable" else "cft"

    @property
    def numbers(self) -> str:
        """Return accuracy, confidence and errors, on one line."""
        over = "over" if self.confidence > self.accuracy else "under"
        return (
            f"accuracy {self.accuracy:.3f} ({self.accuracy_low:.3f} to {self.accuracy_high:.3f}), mean "
            f"confidence {self.confidence:.3f}: {over}-confident by {self.least_ece:.3f}, the least that "
            f"the ECE can be; ECE {self.ece:.3f}, RMS {self.rms:.3f}, largest {self.mce:.3f}"
        )

    @property
    def verdict(self) -> str:
        """Return the regime, why, and what the paper would do, on one line."""
        return f"{self.regime}: {self._reason()}"

    def _reason(self) -> str:
        if self.critical_accuracy is None:
            return (
                "which regime it is depends on a*, the mean largest probability of the true "
                "answers, which no data with one label a question shows. The paper begins with CFT, and "
                "takes RCFT where accuracy is trained beyond a*"
            )
        a = f"a* = {self.critical_accuracy:.3f}"
        if self.regime == "undetermined":
            return f"{a} lies within the interval of the accuracy; the paper begins with CFT"
        if self.regime == "calibratable":
            return f"the accuracy is at most {a}, so it need not be given up; the paper uses CFT"
        return (
            f"the accuracy is above {a}, so these labels were learnt by heart, or {a} is of other "
            "questions; the paper uses RCFT"
        )


def calibration_regime(
    confidence: Any, correct: Any, *, critical_accuracy: float | None = None, bins: int = 10
) -> Regime:
    """Say whether a model could be calibrated without losing accuracy, as far as that can be known.

    If the answer to a question x is drawn from p*(y | x), no model answers more questions right, on
    average over new draws, than a* = E[max_y p*(y | x)], and the model p* itself is calibrated and
    gets that many. So up to a* calibration costs no accuracy; a model above it has seen the very
    labels it is measured on. That is the paper's divide with p* as its target model; the constants
    with which it bounds the ECE further are not used.

    Labels of which each question has one do not show a*. Give it where p* is known: from several
    annotators (the mean share of the commonest label), or the construction of the data. On questions
    that a model was not trained on, "non-calibratable" speaks against the a* that was given.

    Args:
        confidence: probability of the model's own answer, in [0, 1], any shape (...).
        correct: whether that answer was right, (...).
        critical_accuracy: a*, in [0, 1]; None: not known.
        bins: of equal width, for the errors.

    Returns:
        Regime.

    Raises:
        TypeError: as `levelhead.calibration.reliability`, or `critical_accuracy` is no number.
        ValueError: the same, or `critical_accuracy` is outside [0, 1].

    Example:
        >>> regime = calibration_regime([0.9] * 100, [True] * 60 + [False] * 40, critical_accuracy=0.8)
        >>> regime.regime, regime.method, round(regime.least_ece, 3)
        ('calibratable', 'cft', 0.3)
    """
    if critical_accuracy is not None:
        critical_accuracy = as_number("critical_accuracy", critical_accuracy)
    if critical_accuracy is not None and not 0 <= critical_accuracy <= 1:
        raise ValueError(
            f"critical_accuracy must lie in [0, 1], got {critical_accuracy}; it is the mean largest "
            "probability of the true answers, or None where that is not known"
        )
    table = reliability(confidence, correct, bins=bins)
    total, n = table.pooled(), int(table.count.sum())
    accuracy = total.accuracy.item()
    low, high = _wilson(accuracy, n)
    return Regime(
        questions=n,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        confidence=min(total.confidence.item(), 1.0),
        ece=table.error(),
        rms=table.error(norm="l2"),
        mce=table.error(norm="max"),
        critical_accuracy=critical_accuracy,
        regime=_regime(low, high, critical_accuracy),
    )


def _regime(
    low: float, high: float, critical: float | None
) -> Literal["calibratable", "non-calibratable", "undetermined"]:
    if critical is not None and high <= critical:
        return "calibratable"
    if critical is not None and low > critical:
        return "non-calibratable"
    return "undetermined"


def _wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of n."""
    z = _NORMAL
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
