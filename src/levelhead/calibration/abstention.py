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


class Payoff(NamedTuple):
    """What answering above a threshold earns.

    Attributes:
        points: Per question, in [-wrong, 1]: 1 for a right answer, 0 for none, -wrong for a wrong
            one.
        abstained: Share of questions not answered, in [0, 1].
    """

    points: float
    abstained: float


def abstention_threshold(score: Any, correct: Any, *, wrong: float = 1.0) -> float:
    """The threshold that would have earned the most on these labelled answers.

    A right answer earns 1, a wrong one costs `wrong`, abstaining 0; a question is answered if its
    score is at least the threshold. All thresholds that make a difference are tried: -inf (never
    abstain), every score, +inf (always abstain). Of those that earn the same, the lowest is taken:
    the one that answers most. Choose on a few labelled questions, then judge by `payoff` on others:
    on its own questions a threshold looks better than it is.

    Args:
        score: Any finite number that grows with trust, probability or not: a tensor, an array or a
            list of any shape (...).
        correct: Whether the answer was right, same shape (...): booleans, or zeros and ones.
        wrong: Points that a wrong answer costs, at least 0. With 0 one never abstains; a calibrated
            confidence should answer from wrong / (1 + wrong) on.

    Returns:
        The threshold: -inf, one of the scores, or +inf.

    Raises:
        TypeError: As `auroc`, or `wrong` is no number.
        ValueError: As `auroc`, a score is infinite, or `wrong` is negative or not finite.

    Example:
        >>> score, correct = [0.9, 0.8, 0.6, 0.4], [True, True, False, False]
        >>> abstention_threshold(score, correct)
        0.8
        >>> payoff(score, correct, 0.8)
        Payoff(points=0.5, abstained=0.5)

    References:
        Plaut, Nguyen, Trinh. Probabilities of chat LLMs are miscalibrated but still predict
        correctness on multiple-choice Q&A. TMLR 2025, arXiv 2402.13213, section on abstention.
    """
    score, correct, wrong = _checked(score, correct, wrong)
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


def payoff(score: Any, correct: Any, threshold: float, *, wrong: float = 1.0) -> Payoff:
    """Points per question, and the share abstained, if only scores >= threshold are answered.

    Args:
        score: As in `abstention_threshold`.
        correct: As in `abstention_threshold`.
        threshold: Answer from this score on; -inf answers all, +inf none.
        wrong: Points that a wrong answer costs, at least 0.

    Returns:
        The mean over all questions, abstentions included, and how many those are.

    Raises:
        TypeError: As `abstention_threshold`, or the threshold is no number.
        ValueError: As `abstention_threshold`, or the threshold is NaN.

    Example:
        >>> payoff([0.9, 0.8, 0.6, 0.4], [True, False, True, False], 0.5, wrong=2)
        Payoff(points=0.0, abstained=0.25)
    """
    score, correct, wrong = _checked(score, correct, wrong)
    threshold = as_number("threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan; -inf answers all, +inf none")
    answered = score >= threshold
    right = int(torch.count_nonzero(answered & correct))
    misses = int(torch.count_nonzero(answered)) - right
    return Payoff((right - wrong * misses) / len(score), 1 - (right + misses) / len(score))


def _checked(score: Any, correct: Any, wrong: float) -> tuple[Tensor, Tensor, float]:
    wrong = as_number("wrong", wrong)
    if not (math.isfinite(wrong) and wrong >= 0):
        raise ValueError(
            f"wrong must be a finite number of points, at least 0, got {wrong}; "
            "pass wrong=1 for a payoff of -1"
        )
    score, correct = as_scores(score, correct)
    if not all(map(math.isfinite, map(float, score.aminmax()))):
        raise ValueError("score holds infinities, which no threshold divides; pass finite scores")
    return score, correct, wrong
