"""Predictions counted into bins of confidence: sums that merge, and what follows from them.

References:
    Guo, Pleiss, Sun, Weinberger. On calibration of modern neural networks. ICML 2017: the table.
    Murphy. A new vector partition of the probability score. Journal of Applied Meteorology 12, 1973:
    the decomposition.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from .predictions import as_tensor, check_choice, chunks

Norm = Literal["l1", "l2", "max"]
Bins = int | Sequence[float] | Tensor


class BrierDecomposition(NamedTuple):
    """Brier score = reliability - resolution + uncertainty + within_bins.

    Attributes:
        reliability: Mean over predictions of the squared gap of their bin; 0 is calibrated.
        resolution: How far the bins' accuracies lie from the overall accuracy; higher is better.
        uncertainty: accuracy (1 - accuracy), which no forecast can change.
        within_bins: What bins hide: the variance of confidence inside bins, less twice its
            covariance with the outcome. 0 where all confidences in a bin are equal.
    """

    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


@dataclass(frozen=True, eq=False)
class ReliabilityTable:
    """Predictions sorted into B bins of confidence.

    Bin b holds the confidences in [edges[b], edges[b + 1]); the last bin holds its upper edge too.
    A table keeps counts and sums, so tables over the same edges merge: those of shards, of ranks, of
    batches of a stream. Counts merge exactly, sums to the rounding of float64.

    Attributes:
        edges: Bounds of the bins, ascending, (B + 1,) float64.
        count: Predictions in each bin, (B,) int64.
        right: Those that were correct, (B,) int64.
        confidence_sum: Sum of their confidences, (B,) float64.
        squared_error_sum: Sum of (confidence - correct)^2, (B,) float64.
        log_loss_sum: Sum of -log(confidence) where correct, -log(1 - confidence) where not, in
            nats, (B,) float64; see `negative_log_likelihood`.

    Example:
        >>> table = ReliabilityTable.empty(bins=2)
        >>> for confidence, correct in [([0.9, 0.6], [1, 0]), ([0.8], [1])]:
        ...     table = table.merge(reliability(confidence, correct, bins=2))
        >>> table.count.tolist()
        [0, 3]
        >>> round(table.error(), 3)
        0.1
    """

    edges: Tensor
    count: Tensor
    right: Tensor
    confidence_sum: Tensor
    squared_error_sum: Tensor
    log_loss_sum: Tensor

    @classmethod
    def empty(cls, bins: Bins = 10) -> Self:
        """The table of no predictions: merged with another, it changes nothing.

        Args:
            bins: Number of bins of equal width, or edges, as in `reliability`.

        Returns:
            A table whose counts and sums are 0.

        Raises:
            TypeError: `bins` is neither an int nor edges.
            ValueError: `bins` is below 1 or not ascending.
        """
        edges = fixed_edges(bins)
        zeros = torch.zeros(len(edges) - 1, dtype=torch.float64)
        return cls(edges, zeros.long(), zeros.long(), zeros, zeros, zeros)

    @property
    def confidence(self) -> Tensor:
        """Mean confidence in each bin, (B,) float64; NaN where the bin is empty."""
        return self.confidence_sum / self.count

    @property
    def accuracy(self) -> Tensor:
        """Fraction of correct predictions in each bin, (B,) float64; NaN where it is empty."""
        return self.right / self.count.double()

    @property
    def gap(self) -> Tensor:
        """Confidence less accuracy, (B,) float64: above 0 is over-confident; NaN where empty."""
        return self.confidence - self.accuracy

    @property
    def brier_score(self) -> Tensor:
        """Mean squared error of the confidence in each bin, (B,) float64; NaN where empty."""
        return self.squared_error_sum / self.count

    @property
    def negative_log_likelihood(self) -> Tensor:
        """Mean log loss in each bin, nats, (B,) float64; NaN where it is empty."""
        return self.log_loss_sum / self.count

    def merge(self, other: "ReliabilityTable") -> "ReliabilityTable":
        """The table of both tables' predictions.

        Args:
            other: A table over the same edges.

        Returns:
            A new table; neither of the two changes.

        Raises:
            TypeError: `other` is no table.
            ValueError: The edges differ.
        """
        if not isinstance(other, ReliabilityTable):
            raise TypeError(f"a table merges with a ReliabilityTable, got {type(other).__name__}")
        if not torch.equal(self.edges, other.edges):
            raise ValueError(
                f"tables merge over the same edges, got {_span(self.edges)} and "
                f"{_span(other.edges)}; make both with the same bins"
            )
        return ReliabilityTable(
            self.edges,
            self.count + other.count,
            self.right + other.right,
            self.confidence_sum + other.confidence_sum,
            self.squared_error_sum + other.squared_error_sum,
            self.log_loss_sum + other.log_loss_sum,
        )

    def pooled(self) -> "ReliabilityTable":
        """All bins as one: its accuracy, gap, Brier score, ... are those of all predictions.

        Returns:
            A table of one bin, from the lowest edge to the highest.
        """
        return ReliabilityTable(
            self.edges[[0, -1]],
            self.count.sum(0, keepdim=True),
            self.right.sum(0, keepdim=True),
            self.confidence_sum.sum(0, keepdim=True),
            self.squared_error_sum.sum(0, keepdim=True),
            self.log_loss_sum.sum(0, keepdim=True),
        )

    def error(self, *, norm: Norm = "l1", weighted: bool = True) -> float:
        """The calibration error, as `calibration_error` defines it; NaN if the table is empty.

        Args:
            norm: "l1" (ECE), "l2" (RMS) or "max" (MCE).
            weighted: Whether bins weigh by their counts. Means nothing to "max".

        Returns:
            The error, in [0, 1], or NaN.

        Raises:
            ValueError: `norm` is unknown.
        """
        check_norm(norm)
        filled = self.count > 0
        if not bool(filled.any()):
            return math.nan
        gap = self.gap[filled].abs()
        if norm == "max":
            return gap.max().item()
        weight = self.count[filled].double() if weighted else torch.ones_like(gap)
        weight = weight / weight.sum()
        if norm == "l1":
            return (weight * gap).sum().item()
        return math.sqrt((weight * gap.square()).sum().item())

    def brier_decomposition(self) -> BrierDecomposition:
        """Return the Brier score as reliability - resolution + uncertainty + what bins hide.

        With o the overall accuracy and w_b = count_b / N: reliability = sum_b w_b (confidence_b -
        accuracy_b)^2, the square of the weighted "l2" error; resolution = sum_b w_b
        (accuracy_b - o)^2; uncertainty = o (1 - o).

        Returns:
            The four terms; all NaN if the table is empty.

        Example:
            >>> table = reliability([0.2, 0.2, 0.8, 0.8], [0, 1, 1, 1])
            >>> [round(term, 4) for term in table.brier_decomposition()]
            [0.065, 0.0625, 0.1875, 0.0]

        References:
            Murphy. A new vector partition of the probability score. Journal of Applied Meteorology
            12, 1973.
            Stephenson, Coelho, Jolliffe. Two extra components in the Brier score decomposition.
            Weather and Forecasting 23, 2008.
        """
        total = self.pooled()
        if not int(total.count):
            return BrierDecomposition(math.nan, math.nan, math.nan, math.nan)
        base = total.accuracy
        weight = self.count.double() / total.count
        reliability = (weight * self.gap.square()).nansum()
        resolution = (weight * (self.accuracy - base).square()).nansum()
        uncertainty = base * (1 - base)
        within = total.brier_score - (reliability - resolution + uncertainty)
        return BrierDecomposition(
            reliability.item(), resolution.item(), uncertainty.item(), within.item()
        )


def tabulate(confidence: Tensor, correct: Tensor, edges: Tensor) -> ReliabilityTable:
    """Return the table of checked columns, (N,) float64 and (N,) bool, all within the edges."""
    table = ReliabilityTable.empty(edges)
    for c, y in chunks(confidence, correct):
        table = table.merge(_tabulate(c, y, edges))
    return table


def squared_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return (confidence - correct)^2 of each prediction."""
    return (confidence - correct.double()).square()


def log_loss(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return -log of the probability that each outcome was given, nats."""
    tiny = torch.finfo(torch.float64).eps
    confidence = confidence.clamp(tiny, 1 - tiny)
    return -torch.where(correct, confidence, 1 - confidence).log()


def fixed_edges(bins: Bins) -> Tensor:
    """Return the edges that were given, or those of so many equal bins of [0, 1]; (B + 1,) float64."""
    if isinstance(bins, bool | float | str):
        raise TypeError(
            f"bins must be an int, got {bins!r}; pass a number of bins such as 10, or their edges"
        )
    if isinstance(bins, int):
        if bins < 1:
            raise ValueError(
                f"bins must be at least 1, got {bins}; pass a number of bins such as 10"
            )
        # i / bins is rounded once, so the edge 3/10 is the float 0.3 itself; linspace misses it.
        return torch.arange(bins + 1, dtype=torch.float64) / bins
    edges = as_tensor("bins", bins).double()
    if edges.dim() != 1 or len(edges) < 2 or not bool((edges[1:] >= edges[:-1]).all()):
        raise ValueError(
            f"bins must be an int or two or more edges in ascending order, got {bins!r}"
        )
    return edges


def check_norm(norm: str) -> None:
    """Refuse an unknown norm."""
    check_choice("norm", norm, get_args(Norm))


def bin_index(confidence: Tensor, edges: Tensor) -> Tensor:
    """Return the bin of each confidence, (N,) int64, all within the edges."""
    # Only the inner edges decide, so what equals the topmost edge stays in the last bin. A softmax
    # in float32 is exactly 1.0 from a logit gap of about 17 on: a half-open top bin would lose the
    # most confident predictions.
    return torch.bucketize(confidence, edges[1:-1], right=True)


def _tabulate(confidence: Tensor, correct: Tensor, edges: Tensor) -> ReliabilityTable:
    index, bins = bin_index(confidence, edges), len(edges) - 1
    return ReliabilityTable(
        edges,
        torch.bincount(index, minlength=bins),
        torch.bincount(index[correct], minlength=bins),
        torch.bincount(index, confidence, minlength=bins),
        torch.bincount(index, squared_error(confidence, correct), minlength=bins),
        torch.bincount(index, log_loss(confidence, correct), minlength=bins),
    )


def _span(edges: Tensor) -> str:
    return f"{len(edges) - 1} bins on [{edges[0]:g}, {edges[-1]:g}]"
