"""The reliability table of a set of predictions, and the calibration error that sums it up.

A model is calibrated if, of the answers it gives with confidence 0.8, eight in ten are right. The
table sorts predictions into bins of confidence and compares, bin by bin, how sure the model was
with how often it was right; the calibration error is one norm of the differences.

References:
    Naeini, Cooper, Hauskrecht. Obtaining well calibrated probabilities using Bayesian binning.
    AAAI 2015.
    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Binning = Literal["uniform", "quantile"]
Norm = Literal["l1", "l2", "max"]


@dataclass(frozen=True, eq=False)
class ReliabilityTable:
    """Predictions sorted into B bins of confidence.

    Bin b holds the confidences in [edges[b], edges[b + 1]); the last bin holds its upper edge too.

    Attributes:
        edges: Bounds of the bins, ascending, (B + 1,) float64.
        count: Predictions in each bin, (B,) int64.
        confidence: Mean confidence in each bin, (B,) float64; NaN where the bin is empty.
        accuracy: Fraction of correct predictions in each bin, (B,) float64; NaN where it is empty.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(
    confidence: Any, correct: Any, *, bins: int = 10, binning: Binning = "uniform"
) -> ReliabilityTable:
    """Sorts predictions into bins of confidence, with the mean confidence and the accuracy of each.

    Computed on the CPU in float64, whatever the input.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]: a tensor, an array or a
            list of any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.
        bins: Number of bins B.
        binning: "uniform" cuts [0, 1] into bins of equal width. "quantile" lets every bin hold the
            same number of predictions, to within one; equal confidences always share a bin, so ties
            can make bins uneven or empty.

    Returns:
        The table, B rows on the CPU.

    Raises:
        TypeError: `confidence` or `correct` does not hold numbers, or `bins` is not an int.
        ValueError: Shapes differ, nothing was given, a value is out of range, `bins` is below 1, or
            `binning` is unknown.

    Example:
        >>> table = reliability([0.95, 1.0, 0.75], [True, False, True])
        >>> table.count.tolist()
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 2]
        >>> table.accuracy[-1].item()
        0.5
    """
    _check_choice("binning", binning, get_args(Binning))
    _check_bins(bins)
    confidence, correct = _as_predictions(confidence, correct)  # (N,), (N,)
    edges = _uniform_edges(bins) if binning == "uniform" else _quantile_edges(confidence, bins)
    # Only the inner edges decide, so what equals the topmost edge stays in the last bin. A softmax
    # in float32 is exactly 1.0 from a logit gap of about 17 on: a half-open top bin would lose the
    # most confident predictions.
    index = torch.bucketize(confidence, edges[1:-1], right=True)  # (N,)
    count = torch.bincount(index, minlength=bins)
    return ReliabilityTable(
        edges=edges,
        count=count,
        confidence=torch.bincount(index, confidence, minlength=bins) / count,
        accuracy=torch.bincount(index, correct, minlength=bins) / count,
    )


def calibration_error(
    confidence: Any,
    correct: Any,
    *,
    bins: int = 10,
    binning: Binning = "uniform",
    norm: Norm = "l1",
    weighted: bool = True,
) -> float:
    """How far confidence and accuracy lie apart, over the bins of the reliability table.

    With gap_b = accuracy_b - confidence_b and w_b = count_b / N, the defaults give the expected
    calibration error, ECE = sum_b w_b |gap_b|. Empty bins are skipped. Computed on the CPU in
    float64, whatever the input.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]: a tensor, an array or a
            list of any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.
        bins: Number of bins.
        binning: "uniform" (bins of equal width) or "quantile" (of equal count); see `reliability`.
        norm: "l1", the mean of |gap_b| (ECE); "l2", the root of the mean of gap_b squared (RMS
            calibration error); "max", the largest |gap_b| (MCE).
        weighted: Whether the mean weighs bins by their counts; if not, every bin that is not empty
            counts the same. Means nothing to "max".

    Returns:
        The error, in [0, 1]: 0.05 says that confidence misses accuracy by five percentage points.

    Raises:
        TypeError: As `reliability`.
        ValueError: As `reliability`, or `norm` is unknown.

    Example:
        >>> round(calibration_error([0.95, 1.0], [True, False]), 3)
        0.475
    """
    _check_choice("norm", norm, get_args(Norm))
    table = reliability(confidence, correct, bins=bins, binning=binning)
    filled = table.count > 0
    gap = (table.accuracy - table.confidence)[filled].abs()
    if norm == "max":
        return gap.max().item()
    weight = table.count[filled].double() if weighted else torch.ones_like(gap)
    weight = weight / weight.sum()
    if norm == "l1":
        return (weight * gap).sum().item()
    return math.sqrt((weight * gap.square()).sum().item())


def _uniform_edges(bins: int) -> Tensor:
    # i / bins is rounded once, so the edge 3/10 is the float 0.3 itself; linspace misses it.
    return torch.arange(bins + 1, dtype=torch.float64) / bins


def _quantile_edges(confidence: Tensor, bins: int) -> Tensor:
    """The lowest confidence of each bin by rank, then the highest of all; no interpolation."""
    ascending = confidence.sort().values
    rank = torch.arange(bins + 1) * len(ascending) // bins
    return ascending[rank.clamp(max=len(ascending) - 1)]


def _as_predictions(confidence: Any, correct: Any) -> tuple[Tensor, Tensor]:
    confidence, correct = _as_float64("confidence", confidence), _as_float64("correct", correct)
    if confidence.shape != correct.shape:
        raise ValueError(
            f"confidence and correct must have the same shape, got {tuple(confidence.shape)} and "
            f"{tuple(correct.shape)}; pass one confidence and one outcome per prediction"
        )
    if confidence.numel() == 0:
        raise ValueError(
            "no predictions: confidence and correct are empty; pass at least one of each"
        )
    confidence, correct = confidence.flatten(), correct.flatten()
    _check_values(
        "confidence",
        confidence,
        valid=(confidence >= 0) & (confidence <= 1),
        expected="a probability in [0, 1]; take the softmax of logits, divide percentages by 100",
    )
    _check_values(
        "correct",
        correct,
        valid=(correct == 0) | (correct == 1),
        expected="a boolean, 0 or 1; compare the predicted ids with the target ids first",
    )
    return confidence, correct


def _as_float64(name: str, values: Any) -> Tensor:
    try:
        # Straight to float64: a list of Python floats would pass through float32 and change bins.
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, an array or a list of numbers, "
            f"got {type(values).__name__} ({error})"
        ) from error
    return tensor.detach().to("cpu", torch.float64)


def _check_values(name: str, values: Tensor, *, valid: Tensor, expected: str) -> None:
    if not bool(valid.all()):
        first = int((~valid).nonzero()[0])
        raise ValueError(
            f"{name} holds {values[first].item():g} at position {first} "
            f"({int((~valid).sum())} such of {len(values)}); each value must be {expected}"
        )


def _check_bins(bins: int) -> None:
    if not isinstance(bins, int) or isinstance(bins, bool):
        raise TypeError(f"bins must be an int, got {bins!r}; pass a number of bins such as 10")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}; pass a number of bins such as 10")


def _check_choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(map(repr, valid))}")
