"""When to say "I don't know": a threshold on the score, and what it earns.

References:
    Plaut, Nguyen, Trinh. Probabilities of chat LLMs are miscalibrated but still predict correctness
    on multiple-choice Q&A. TMLR 2025, arXiv 2402.13213, section on abstention.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .order import ascending
from .predictions import as_number, as_scores


class Abstention(NamedTuple):
    """What answering from a threshold on earns.

    Attributes:
        threshold: Questions with this score or a higher one are answered; -inf answers all, +inf none.
        points: Per question, in [-wrong, 1]: 1 for a right answer, 0 for none, -wrong for a wrong
            one.
        abstained: Share of questions not answered, in [0, 1].
    """

    threshold: float
    points: float
    abstained: float


def abstention(
    score: Any, correct: Any, *, threshold: float | None = None, wrong: float = 1.0
) -> Abstention:
    """Return what a threshold earns, by default the one that earns the most on these answers.

    A right answer earns 1, a wrong one costs `wrong`, abstaining 0. All thresholds that make a
    difference are tried: -inf, every score, +inf. Of those that earn the same, the lowest is taken:
    the one that answers most. Choose on a few labelled questions, then judge the threshold on
    others: on its own questions it looks better than it is.

    Args:
        score: Any finite number that grows with trust, probability or not: a tensor, an array or a
            list of any shape (...).
        correct: Whether the answer was right, same shape (...): booleans, or zeros and ones.
        threshold: Answer from this score on; -inf answers all, +inf none; None: the best.
        wrong: Points that a wrong answer costs, at least 0. With 0 one never abstains; a calibrated
            confidence should answer from wrong / (1 + wrong) on.

    Returns:
        The threshold, points per question (abstentions included), and the share abstained.

    Raises:
        TypeError: As `auroc`, or `wrong` or the threshold is no number.
        ValueError: As `auroc`, a score is infinite, `wrong` is negative or not finite, or the
            threshold is NaN.

    Example:
        >>> score, correct = [0.9, 0.8, 0.6, 0.4], [True, True, False, False]
        >>> abstention(score, correct)
        Abstention(threshold=0.8, points=0.5, abstained=0.5)
        >>> abstention(score, correct, threshold=0.5, wrong=2).points
        0.0
    """
    wrong = as_number("wrong", wrong)
    if not (math.isfinite(wrong) and wrong >= 0):
        raise ValueError(
            f"wrong must be a finite number of points, at least 0, got {wrong}; "
            "pass wrong=1 for a payoff of -1"
        )
    score, correct = as_scores(score, correct)
    if not all(map(math.isfinite, map(float, score.aminmax()))):
        raise ValueError("score holds infinities, which no threshold divides; pass finite scores")
    if threshold is None:
        threshold = _best(score, correct, wrong)
    threshold = as_number("threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan; -inf answers all, +inf none")
    answered = score >= threshold
    right = int(torch.count_nonzero(answered & correct))
    misses = int(torch.count_nonzero(answered)) - right
    points = (right - wrong * misses) / len(score)
    return Abstention(threshold, points, 1 - (right + misses) / len(score))


def _best(score: Tensor, correct: Tensor, wrong: float) -> float:
    right_left = int(torch.count_nonzero(correct))
    wrong_left = len(correct) - right_left
    best, threshold = right_left - wrong * wrong_left, -math.inf
    for scores, right, misses in ascending(score, correct):
        # What is left to answer from each score on, this one included.
        right_from = right_left - right.cumsum(0) + right
        wrong_from = wrong_left - misses.cumsum(0) + misses
        points = right_from.double() - wrong * wrong_from.double()
        first = int(points.argmax())
        if points[first] > best:
            best, threshold = points[first].item(), scores[first].item()
        right_left, wrong_left = right_left - int(right.sum()), wrong_left - int(misses.sum())
    return math.inf if best < 0 else threshold
