"""What it pays to withhold unsure answers, with a threshold learned from a few labelled ones."""

import math
import random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from levelhead import calibration
from levelhead.calibration import Abstention

_ROWS = 1 << 18  # at a time
SPLITS = 20
PAYOFFS = (1.0, 2.0)  # what a wrong answer costs: "balanced" and "conservative"


def abstention(
    strata: list[tuple[Tensor, Tensor]], *, labels: int, wrong: float, seed: int
) -> dict[str, Any] | None:
    """Mean points per question over the strata, over random choices of the labelled answers.

    Args:
        strata: Scores and outcomes of each.
        labels: Labelled answers in all, spread evenly over the strata.
        wrong: Points that a wrong answer costs; a right one earns 1.
        seed: Of the choices.

    Returns:
        None if there are fewer than twice as many answers in a stratum as labels are wanted.
    """
    each = max(1, labels // len(strata))
    if any(len(score) < 2 * each for score, _ in strata):
        return None
    choose = random.Random(seed)
    thresholds, labelled = [-math.inf], []  # the first answers everything
    for _ in range(SPLITS):
        picks = [choose.sample(range(len(score)), each) for score, _ in strata]
        parts = [
            (score[pick], correct[pick])
            for (score, correct), pick in zip(strata, picks, strict=True)
        ]
        pooled = (torch.cat(column) for column in zip(*parts, strict=True))
        thresholds.append(calibration.abstention(*pooled, wrong=wrong).threshold)
        labelled.append(parts)
    whole = [_payoffs(*stratum, thresholds, wrong) for stratum in strata]
    points, withheld = [], []
    for split, (threshold, parts) in enumerate(zip(thresholds[1:], labelled, strict=True), 1):
        rest = [
            _rest(
                of_all[split],
                len(score),
                calibration.abstention(*part, threshold=threshold, wrong=wrong),
                each,
            )
            for of_all, (score, _), part in zip(whole, strata, parts, strict=True)
        ]
        points.append(fmean(mean for mean, _ in rest))
        withheld.append(fmean(share for _, share in rest))
    return {
        "wrong": wrong,
        "labels": each * len(strata),
        "answer_all": fmean(of_all[0].points for of_all in whole),
        "with_threshold": fmean(points),
        "lowest": min(points),
        "highest": max(points),
        "withheld": fmean(withheld),
    }


def _payoffs(
    score: Tensor, correct: Tensor, thresholds: list[float], wrong: float
) -> list[Abstention]:
    """`levelhead.calibration.abstention` at each of the thresholds, in one pass over the answers."""
    ascending = torch.tensor(sorted(thresholds), dtype=score.dtype)
    right, answered = torch.zeros(2, len(ascending) + 1, dtype=torch.int64)
    for s, y in zip(torch.split(score, _ROWS), torch.split(correct, _ROWS), strict=True):
        reached = torch.bucketize(s, ascending, right=True)  # how many thresholds the score is at
        answered += reached.bincount(minlength=len(answered))
        right += reached[y].bincount(minlength=len(right))
    # Of the answers that reach j thresholds or more, j = 1 ...
    right, answered = (count.flip(0).cumsum(0).flip(0)[1:] for count in (right, answered))
    n = len(score)
    found = {
        threshold: Abstention(threshold, (hits - wrong * (given - hits)) / n, 1 - given / n)
        for threshold, hits, given in zip(
            sorted(thresholds), right.tolist(), answered.tolist(), strict=True
        )
    }
    return [found[threshold] for threshold in thresholds]


def _rest(whole: Abstention, count: int, part: Abstention, labelled: int) -> tuple[float, float]:
    """Means over the answers that are not labelled, from those over all and over the labelled."""
    points, share = (
        (count * over_all - labelled * over_part) / (count - labelled)
        for over_all, over_part in zip(whole[1:], part[1:], strict=True)
    )
    return points, share
