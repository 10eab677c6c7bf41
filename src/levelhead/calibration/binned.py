"""The reliability table of a set of predictions, and the calibration error that sums it up.

A model is calibrated if, of the answers it gives with confidence 0.8, eight in ten are right. The
table sorts predictions into bins of confidence and compares, bin by bin, how sure the model was
with how often it was right; the calibration error is one norm of the differences.

References:
    Naeini, Cooper, Hauskrecht. Obtaining well calibrated probabilities using Bayesian binning.
    AAAI 2015.
    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017.
    Nixon, Dusenberry, Zhang, Jerfel, Tran. Measuring calibration in deep learning. CVPR workshops
    2019. Bins of equal count, norms, classwise errors.
    Roelofs, Cain, Shlens, Mozer. Mitigating bias in calibration error estimation. AISTATS 2022.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .order import ascending, quantile_edges
from .predictions import as_classes, as_predictions, as_tensor, check_choice
from .table import Bins, Norm, ReliabilityTable, check_norm, fixed_edges, tabulate

Binning = Literal["uniform", "quantile", "sweep"]


def reliability(
    confidence: Any, correct: Any, *, bins: Bins = 10, binning: Binning = "uniform"
) -> ReliabilityTable:
    """Sort predictions into bins of confidence; return the mean confidence and the accuracy of each.

    Computed on the CPU in float64, whatever the input.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]: a tensor, an array or a
            list of any shape (...).
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.
        bins: Number of bins B, or their edges in ascending order, (B + 1,), as `numpy.histogram`
            takes them: half-open, the last one closed.
        binning: How a number of bins cuts. "uniform" cuts [0, 1] into bins of equal width.
            "quantile" lets every bin hold the same number of predictions, to within one; equal
            confidences always share a bin, so ties can make bins uneven or empty. "sweep" cuts by
            quantiles as often as the data bears, and does not read `bins`: into 1, 2, 3, ... bins
            of equal count for as long as their accuracies do not fall.

    Returns:
        The table, B rows on the CPU. Tables over the same edges merge.

    Raises:
        TypeError: `confidence` or `correct` does not hold numbers, or `bins` is neither an int nor
            edges.
        ValueError: Shapes differ, nothing was given, a value is out of range or outside the edges,
            `bins` is below 1 or not ascending, or `binning` is unknown.

    Example:
        >>> table = reliability([0.95, 1.0, 0.75], [True, False, True])
        >>> table.count.tolist()
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 2]
        >>> table.accuracy[-1].item()
        0.5
    """
    confidence, correct = as_predictions(confidence, correct)  # (N,), (N,)
    return tabulate(confidence, correct, bin_edges(confidence, correct, bins, binning))


def calibration_error(
    confidence: Any,
    correct: Any,
    *,
    bins: Bins = 10,
    binning: Binning = "uniform",
    norm: Norm = "l1",
    weighted: bool = True,
) -> float:
    """Return how far confidence and accuracy lie apart, over the bins of the reliability table.

    With gap_b = accuracy_b - confidence_b and w_b = count_b / N, the defaults give the expected
    calibration error, ECE = sum_b w_b |gap_b|. Empty bins are skipped. Computed on the CPU in
    float64, whatever the input.

    The default of ten equal bins is the field's, and does not depend on the data: runs compare, and
    tables merge. It is biased upward when bins are thin: noise in a bin's accuracy counts as
    error, some sqrt(accuracy (1 - accuracy) / count_b) a bin. With a few hundred predictions, or
    confidences crowded at 1, let the data choose: `binning="sweep"` is ECE_sweep, the least biased
    of the binned estimates (Roelofs et al. 2022); `smooth_calibration_error` needs no bins.

    Args:
        confidence: As in `reliability`.
        correct: As in `reliability`.
        bins: As in `reliability`.
        binning: As in `reliability`.
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
    check_norm(norm)
    table = reliability(confidence, correct, bins=bins, binning=binning)
    return table.error(norm=norm, weighted=weighted)


def classwise_calibration_error(
    probabilities: Any,
    target: Any,
    *,
    bins: Bins = 10,
    binning: Binning = "uniform",
    norm: Norm = "l1",
    weighted: bool = True,
) -> float:
    """Return the calibration error of every class's probability, averaged over the C classes.

    For class c, the predictions are all N probabilities of c, and an outcome is whether the target
    was c: (1 / C) sum_c calibration_error(probabilities[:, c], target == c).

    Args:
        probabilities: Of each class, (N, C), in [0, 1]; rows need not sum to 1. For letters of a
            multiple choice, the softmax over their logits.
        target: The right class of each row, (N,), integers in [0, C).
        bins: As in `calibration_error`, within a class.
        binning: As in `calibration_error`, within a class.
        norm: As in `calibration_error`, within a class.
        weighted: As in `calibration_error`, within a class.

    Returns:
        The error, in [0, 1].

    Raises:
        TypeError: As `calibration_error`, or the target does not hold numbers.
        ValueError: As `calibration_error`, shapes do not fit, or a target is no class.

    Example:
        >>> round(classwise_calibration_error([[0.9, 0.1], [0.6, 0.4]], [0, 1]), 3)
        0.35

    References:
        Kull et al. Beyond temperature scaling. NeurIPS 2019.
    """
    probabilities = as_tensor("probabilities", probabilities)
    target = as_classes("probabilities", probabilities, target)
    errors = [
        calibration_error(
            column, target == c, bins=bins, binning=binning, norm=norm, weighted=weighted
        )
        for c, column in enumerate(probabilities.unbind(1))
    ]
    return sum(errors) / len(errors)


def bin_edges(confidence: Tensor, correct: Tensor, bins: Bins, binning: Binning) -> Tensor:
    """Return the edges that the options of `reliability` ask for, (B + 1,) float64."""
    check_choice("binning", binning, get_args(Binning))
    edges = fixed_edges(bins)
    if not isinstance(bins, int):
        if binning != "uniform":
            raise ValueError(
                f"binning={binning!r} cuts a number of bins, but bins holds their edges; "
                "leave one of them out"
            )
        _check_inside(confidence, edges)
    if binning == "uniform":
        return edges
    quantiles = len(edges) - 1 if binning == "quantile" else _sweep(confidence, correct)
    return quantile_edges(confidence, quantiles)


def _sweep(confidence: Tensor, correct: Tensor) -> int:
    """Return the last number of quantile bins before accuracy falls (Roelofs et al., algorithm 1)."""
    pieces = [(ties.right, ties.right + ties.wrong) for ties in ascending(confidence, correct)]
    right, count = (torch.cat(column).cumsum(0) for column in zip(*pieces, strict=True))
    bins = 1
    while bins < len(confidence) and _accuracy_rises(right, count, bins + 1):
        bins += 1
    return bins


def _accuracy_rises(right: Tensor, count: Tensor, bins: int) -> bool:
    total = int(count[-1])
    rank = torch.arange(1, bins) * total // bins  # where bins begin, after the first
    # A bin begins at the lowest row of the tie that its first rank falls into, as quantile_edges.
    tie = torch.searchsorted(count, rank, right=True)
    begin = torch.unique(torch.cat([tie.new_zeros(1), tie, tie.new_full((1,), len(count))]))
    zero = count.new_zeros(1)
    of_bin = torch.cat([zero, count])[begin].diff(), torch.cat([zero, right])[begin].diff()
    accuracy = of_bin[1] / of_bin[0].double()
    return bool((accuracy.diff() >= 0).all())


def _check_inside(confidence: Tensor, edges: Tensor) -> None:
    low, high = confidence.aminmax()
    if low < edges[0] or high > edges[-1]:
        outside = int(((confidence < edges[0]) | (confidence > edges[-1])).sum())
        raise ValueError(
            f"{outside} of {len(confidence)} confidences lie outside the edges "
            f"[{edges[0]:g}, {edges[-1]:g}], which go from {low:g} to {high:g}; "
            "widen the edges, or leave those predictions out"
        )
