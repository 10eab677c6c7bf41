"""What it pays to withhold unsure answers, with a threshold learned from a few labelled ones."""

import math
import random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from levelhead.calibration import abstention_threshold, payoff

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
    base = fmean(payoff(*stratum, -math.inf, wrong=wrong)[0] for stratum in strata)
    points, withheld = [], []
    for _ in range(SPLITS):
        picks = [choose.sample(range(len(score)), each) for score, _ in strata]
        labelled = [
            (score[pick], correct[pick])
            for (score, correct), pick in zip(strata, picks, strict=True)
        ]
        threshold = abstention_threshold(
            torch.cat([score for score, _ in labelled]),
            torch.cat([correct for _, correct in labelled]),
            wrong=wrong,
        )
        rest = [
            _rest(
                payoff(*whole, threshold, wrong=wrong),
                len(whole[0]),
                payoff(*part, threshold, wrong=wrong),
                each,
            )
            for whole, part in zip(strata, labelled, strict=True)
        ]
        points.append(fmean(mean for mean, _ in rest))
        withheld.append(fmean(share for _, share in rest))
    return {
        "wrong": wrong,
        "labels": each * len(strata),
        "answer_all": base,
        "with_threshold": fmean(points),
        "lowest": min(points),
        "highest": max(points),
        "withheld": fmean(withheld),
    }


def _rest(
    whole: tuple[float, float], count: int, part: tuple[float, float], labelled: int
) -> tuple[float, float]:
    """Means over the answers that are not labelled, from those over all and over the labelled."""
    points, share = (
        (count * over_all - labelled * over_part) / (count - labelled)
        for over_all, over_part in zip(whole, part, strict=True)
    )
    return points, share
