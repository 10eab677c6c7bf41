"""Every measure with a bootstrap interval, at a cost that hardly grows with the number of rows.

The rows go at random into at most 2,000 blocks of equal size, which the resamples draw. With
2,000 rows or fewer a block is a row: the ordinary bootstrap. With more, blocks of rows picked at
random vary as rows do, and so does the interval, up to its own noise.

Estimates come from all rows, exactly. Only the intervals of AUROC and AURC see cells of the score,
in which answers count as ties, and are shifted by what that changes; 512 distinct scores or fewer
have a cell each.

References:
    Efron, Tibshirani. An introduction to the bootstrap. Chapman & Hall 1993.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .binned import Binning, bin_edges
from .predictions import (
    as_number,
    as_predictions,
    as_scores,
    as_tensor,
    check_choice,
    check_int,
)
from .ranking import rank
from .resampling import assign_blocks, draw, resampled_metrics, sum_blocks
from .smooth import smooth_error
from .table import Bins, tabulate

METRICS = (
    "accuracy",
    "mean_confidence",
    "gap",
    "ece",
    "rms",
    "mce",
    "smooth_ece",
    "brier",
    "nll",
    "auroc",
    "aurc",
)
RANKING_METRICS = ("accuracy", "auroc", "aurc")


class Interval(NamedTuple):
    """A measure, or a difference of measures, and its confidence interval.

    Attributes:
        estimate: From all rows.
        low: Lower end; NaN where there is no interval.
        high: Upper end; NaN where there is no interval.
    """

    estimate: float
    low: float
    high: float


def summarise(
    confidence: Any,
    correct: Any,
    *,
    bins: Bins = 10,
    binning: Binning = "uniform",
    metrics: Sequence[str] = METRICS,
    cluster: Any = None,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return measures of calibration and of ranking, each with a percentile bootstrap interval.

    | name | what |
    |---|---|
    | accuracy | share of right answers |
    | mean_confidence | mean confidence |
    | gap | mean confidence less accuracy: above 0 is over-confident |
    | ece, rms, mce | `calibration_error` with norm "l1", "l2", "max", weighted |
    | smooth_ece | `smooth_calibration_error`; no interval |
    | brier, nll | `brier_score`, `negative_log_likelihood` |
    | auroc, aurc | `auroc`, and the area of `risk_coverage` |

    Intervals hold the bins fixed. Noise biases a calibration error upward, and a resample is
    noisier than its sample: the interval of a small error leans upward, and may miss the estimate.

    Args:
        confidence: Probability the model gave to its own answer, in [0, 1]: a tensor, an array or a
            list of any shape (...). Any score will do if all `metrics` are of accuracy, auroc and aurc.
        correct: Whether that answer was right, same shape (...): booleans, or zeros and ones.
        bins: As in `reliability`.
        binning: As in `reliability`.
        metrics: Which measures; all that the table above names by default.
        cluster: What each row belongs to, numbers of the same shape, where rows are not
            independent: the question, if each was asked in two phrasings. Whole clusters are drawn.
        resamples: Number of bootstrap resamples.
        confidence_level: Of the intervals, in (0, 1).
        seed: Of blocks and resamples. Equal input and seed give equal intervals.

    Returns:
        The measures by name, in the order of `metrics`. A measure that is undefined (AUROC, if all
        answers are right) is NaN, and so is its interval; resamples in which it is undefined are
        left out of the interval.

    Raises:
        TypeError: As `reliability`, or an option has the wrong type.
        ValueError: As `reliability`, a metric is unknown, `cluster` has another length or holds NaN, or
            an option is out of range.

    Example:
        >>> found = summarise([0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], metrics=["accuracy", "gap"])
        >>> found["accuracy"]
        Interval(estimate=0.75, low=0.25, high=1.0)
    """
    confidence_level = _check_options(metrics, resamples, confidence_level, seed)
    sample = _sample(confidence, correct, cluster, metrics, bins, binning)
    estimates = _estimates(sample, metrics)
    resampled = _resample(sample, estimates, resamples, seed)
    return {
        name: _interval(estimates[name], resampled.get(name), confidence_level) for name in metrics
    }


def compare(
    first: tuple[Any, Any],
    second: tuple[Any, Any],
    *,
    paired: bool = False,
    bins: Bins = 10,
    binning: Binning = "uniform",
    metrics: Sequence[str] = METRICS,
    cluster: Any = None,
    resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return differences between two runs, second less first, each with a percentile bootstrap interval.

    Args:
        first: (confidence, correct) of one run, each as in `summarise`.
        second: (confidence, correct) of the other.
        paired: Whether row i is the same question in both. The same rows are then drawn for both,
            so what makes a question hard cancels and intervals narrow. If not, each run is drawn by
            itself.
        bins: As in `reliability`, for each run by itself.
        binning: As in `reliability`, for each run by itself.
        cluster: As in `summarise`, of the rows of both runs; wants `paired`.
        metrics: As in `summarise`.
        resamples: As in `summarise`.
        confidence_level: As in `summarise`.
        seed: As in `summarise`.

    Returns:
        The differences by name, in the order of `metrics`. An "ece" below 0, its interval too, says
        that the second run is better calibrated.

    Raises:
        TypeError: As `summarise`, or a run is no pair.
        ValueError: As `summarise`, paired runs differ in length, or `cluster` comes without
            `paired`.

    Example:
        >>> before, after = ([0.9, 0.9, 0.8], [1, 0, 0]), ([0.7, 0.5, 0.4], [1, 0, 1])
        >>> change = compare(before, after, paired=True, metrics=["accuracy", "gap"])
        >>> round(change["gap"].estimate, 3)
        -0.667
    """
    confidence_level = _check_options(metrics, resamples, confidence_level, seed)
    if cluster is not None and not paired:
        raise ValueError("cluster names the rows of both runs: pass paired=True, or leave it out")
    for name, run in (("first", first), ("second", second)):
        if not isinstance(run, list | tuple) or len(run) != 2:
            raise TypeError(
                f"{name} must be a pair (confidence, correct), got {type(run).__name__}"
            )
    samples = [_sample(*run, cluster, metrics, bins, binning) for run in (first, second)]
    lengths = [len(sample.correct) for sample in samples]
    if paired and lengths[0] != lengths[1]:
        raise ValueError(
            f"paired runs have one row per question each, got {lengths[0]} and {lengths[1]} rows; "
            "keep the questions that both answered, in one order, or pass paired=False"
        )
    estimates = [_estimates(sample, metrics) for sample in samples]
    seeds = (seed, seed) if paired else (seed, seed + 1)
    resampled = [
        _resample(sample, estimate, resamples, of_run)
        for sample, estimate, of_run in zip(samples, estimates, seeds, strict=True)
    ]
    return {
        name: _interval(
            estimates[1][name] - estimates[0][name],
            resampled[1][name] - resampled[0][name] if name in resampled[0] else None,
            confidence_level,
        )
        for name in metrics
    }


class _Sample(NamedTuple):
    """Checked columns, what is drawn as one, and the bins if scores are probabilities."""

    score: Tensor  # (N,)
    correct: Tensor  # (N,)
    unit: Tensor | None  # (N,): the unit of each row; None if each row is its own
    units: int
    edges: Tensor | None


def _sample(
    confidence: Any,
    correct: Any,
    cluster: Any,
    metrics: Sequence[str],
    bins: Bins,
    binning: Binning,
) -> _Sample:
    ranking = set(metrics) <= set(RANKING_METRICS)
    score, correct = (as_scores if ranking else as_predictions)(confidence, correct)
    edges = None if ranking else bin_edges(score, correct, bins, binning)
    if cluster is None:
        return _Sample(score, correct, None, len(score), edges)
    cluster = as_tensor("cluster", cluster).flatten()
    if len(cluster) != len(score):
        raise ValueError(
            f"cluster has {len(cluster)} entries for {len(score)} rows; pass one a row"
        )
    if bool(cluster.isnan().any()):  # NaN is not equal to itself: each would be a cluster
        raise ValueError(
            f"cluster holds NaN in {int(cluster.isnan().sum())} of {len(cluster)} rows; number all clusters"
        )
    distinct, unit = cluster.unique(return_inverse=True)
    return _Sample(score, correct, unit, len(distinct), edges)


def _estimates(sample: _Sample, metrics: Sequence[str]) -> dict[str, float]:
    score, correct, _, _, edges = sample
    found = {"accuracy": int(torch.count_nonzero(correct)) / len(correct)}
    if {"auroc", "aurc"} & set(metrics):
        ranking = rank(score, correct)
        found |= {"auroc": ranking.auroc, "aurc": ranking.aurc}
    if edges is None:
        return found
    table = tabulate(score, correct, edges)
    pooled = table.pooled()
    if "smooth_ece" in metrics:
        found["smooth_ece"] = smooth_error(score, correct)
    return found | {
        "mean_confidence": pooled.confidence.item(),
        "gap": pooled.gap.item(),
        "ece": table.error(),
        "rms": table.error(norm="l2"),
        "mce": table.error(norm="max"),
        "brier": pooled.brier_score.item(),
        "nll": pooled.negative_log_likelihood.item(),
    }


def _resample(
    sample: _Sample, estimates: dict[str, float], resamples: int, seed: int
) -> dict[str, Tensor]:
    """Return each measure of each resample, (resamples,); units and seed alone decide what is drawn."""
    generator = torch.Generator().manual_seed(seed)
    block = assign_blocks(sample.units, generator)
    block = block if sample.unit is None else block[sample.unit]
    sums = sum_blocks(sample.score, sample.correct, block, sample.edges)
    blocks = len(sums.total)
    batches = [resampled_metrics(w, sums) for w in draw(blocks, resamples, generator)]
    found = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    once = resampled_metrics(torch.ones(1, blocks), sums)
    for name in {"auroc", "aurc"} & set(estimates):
        found[name] += estimates[name] - once[name]  # what cells, as ties, change
    return found


def _interval(estimate: float, resampled: Tensor | None, level: float) -> Interval:
    if resampled is None:
        return Interval(estimate, math.nan, math.nan)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = resampled.nanquantile(ends).tolist()
    return Interval(estimate, low, high)


def _check_options(metrics: Sequence[str], resamples: int, level: float, seed: int) -> float:
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise TypeError(f"metrics must be a list of names, got {metrics!r}; leave it out for all")
    for name in metrics:
        check_choice("metric", name, METRICS)
    check_int("resamples", resamples, 1000)
    check_int("seed", seed, 0)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; pass one such as 1000")
    level = as_number("confidence_level", level)
    if not 0 < level < 1:
        raise ValueError(f"confidence_level must be in (0, 1), got {level}; pass 0.95 for 95 %")
    return level
