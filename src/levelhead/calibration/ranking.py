"""Does confidence tell right answers from wrong ones? Measures that see only the order of scores.

All follow from how many answers were right and wrong at each distinct score, and treat ties alike:
what equal scores cannot tell apart counts half, or is averaged over the orders they might stand in.

References:
    Mann, Whitney. On a test of whether one of two random variables is stochastically larger than
    the other. Annals of Mathematical Statistics 18, 1947.
    Geifman, El-Yaniv. Selective classification for deep neural networks. NeurIPS 2017.
    Plaut, Nguyen, Trinh. Probabilities of chat LLMs are miscalibrated but still predict correctness
    on multiple-choice Q&A. TMLR 2025, arXiv 2402.13213.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .order import Ties, ascending
from .predictions import as_scores, check_int

_EXACT = 8  # scipy's bound on the smaller group
_EXACT_PAIRS = 10**6


class Ranking(NamedTuple):
    """What one pass over the ordered scores finds.

    Attributes:
        right: How many answers were right.
        wrong: How many answers were wrong.
        wins: Mann-Whitney's U: pairs (right, wrong) in which the right answer scored higher, ties counted half.
        ties: Sum over distinct scores of t^3 - t, t being how many answers have it.
        aurc: Area under the risk-coverage curve.
    """

    right: int
    wrong: int
    wins: float
    ties: float
    aurc: float

    @property
    def auroc(self) -> float:
        """Return the share of the pairs (right, wrong) that are in order; NaN if there are none."""
        pairs = self.right * self.wrong
        return self.wins / pairs if pairs else math.nan


class RiskCoverage(NamedTuple):
    """The risk-coverage curve, a row per distinct score, from the highest down.

    Attributes:
        threshold: Answer if the score is at least this, (D,) float64, descending.
        coverage: Share of questions answered, in (0, 1], (D,) float64.
        risk: Share of the answers that are wrong, in [0, 1], (D,) float64.
        area: Area under the curve (AURC), in [0, 1]; lower is better.
    """

    threshold: Tensor
    coverage: Tensor
    risk: Tensor
    area: float


def auroc(score: Any, correct: Any) -> float:
    """Return the probability that a right answer scores higher than a wrong one, ties counted half.

    The area under the ROC curve of the score as a predictor of correctness, in Mann-Whitney form:
    the share of all pairs (right, wrong) that are in order. Exact: pairs are counted.

    Args:
        score: Any number that grows with trust, probability or not, infinities included: a tensor,
            an array or a list of any shape (...).
        correct: Whether the answer was right, same shape (...): booleans, or zeros and ones.

    Returns:
        In [0, 1]: 0.5 says nothing (all scores equal, for one), 1 separates perfectly. NaN if all
        answers are right or all are wrong: there is no pair.

    Raises:
        TypeError: `score` or `correct` does not hold numbers.
        ValueError: Shapes differ, nothing was given, a score is NaN or an outcome not 0 or 1.

    Example:
        >>> auroc([0.9, 0.7, 0.7, 0.2], [True, True, False, False])
        0.875
    """
    return rank(*as_scores(score, correct)).auroc


def mann_whitney_p(score: Any, correct: Any) -> float:
    """Return the two-sided p-value of the Mann-Whitney U test: do right and wrong answers score alike?

    As `scipy.stats.mannwhitneyu` chooses by itself: exact if no scores tie and the smaller group has
    at most 8 answers, else the normal approximation with tie and continuity corrections. (With more
    than a million pairs the approximation serves too, where scipy would count for hours.)

    Args:
        score: As in `auroc`.
        correct: As in `auroc`.

    Returns:
        In [0, 1]; 1 if all scores are equal, NaN if all answers are right or all are wrong.

    Raises:
        TypeError: As `auroc`.
        ValueError: As `auroc`.

    Example:
        >>> mann_whitney_p([0.1, 0.2, 0.3, 0.8, 0.9], [0, 0, 0, 1, 1])
        0.2
    """
    found = rank(*as_scores(score, correct))
    right, wrong = found.right, found.wrong
    if not right or not wrong:
        return math.nan
    lower = min(found.wins, right * wrong - found.wins)
    if found.ties == 0 and min(right, wrong) <= _EXACT and right * wrong <= _EXACT_PAIRS:
        return min(1.0, 2 * _share_of_orders(int(lower), min(right, wrong), max(right, wrong)))
    n = right + wrong
    variance = right * wrong / 12 * ((n + 1) - found.ties / (n * (n - 1)))
    above = right * wrong / 2 - lower - 0.5
    if variance <= 0:
        return 1.0
    return min(1.0, math.erfc(above / math.sqrt(2 * variance)))


def risk_coverage(score: Any, correct: Any, *, points: int | None = None) -> RiskCoverage:
    """Return risk against coverage, if only the answers with the highest scores are given.

    The area is the mean, over k = 1 ... N, of the share of wrong answers among the k highest scores
    (AURC); among equal scores it takes the mean over all orders, so it does not depend on the order
    of the input. A perfect order of a model with accuracy a has an area of about 1 - a + a log(a), not 0.

    Args:
        score: As in `auroc`.
        correct: As in `auroc`.
        points: To draw millions of scores: keep about this many rows, evenly spaced in coverage
            (at most one more). The area is exact either way.

    Returns:
        The curve at every distinct score, or at `points` of them, and its area. The risk is 0
        everywhere if all answers are right, 1 if all are wrong.

    Raises:
        TypeError: As `auroc`, or `points` is not an int.
        ValueError: As `auroc`, or `points` is below 1.

    Example:
        >>> curve = risk_coverage([0.9, 0.8, 0.3, 0.1], [True, False, True, True])
        >>> curve.coverage.tolist(), [round(risk, 3) for risk in curve.risk.tolist()]
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 0.333, 0.25])
        >>> round(curve.area, 4)
        0.2708

    References:
        Geifman, Uziel, El-Yaniv. Bias-reduced uncertainty estimation for deep neural classifiers.
        ICLR 2019.
    """
    score, correct = as_scores(score, correct)
    if points is not None:
        check_int("points", points, 1000)
    if points is not None and points < 1:
        raise ValueError(f"points must be at least 1, got {points}; leave it out to keep all")
    total, area = len(score), 0.0
    kept = []
    for ties, right_above, wrong_above in _with_those_above(score, correct):
        above = right_above + wrong_above
        area += risk_sums(ties.right, ties.wrong, above, wrong_above).sum().item() / total
        rows = ties.score, above + ties.right + ties.wrong, wrong_above + ties.wrong
        kept.append(_thinned(*rows, total, points))
    scores, answered, errors = (torch.cat(column) for column in zip(*kept, strict=True))
    kept = [_thinned(scores, answered, errors, total, points)]  # pieces met between two steps
    threshold, answered, errors = (column.flip(0) for column in kept[0])
    return RiskCoverage(threshold, answered.double() / total, errors.double() / answered, area)


def rank(score: Tensor, correct: Tensor) -> Ranking:
    """Return everything that the order of checked scores says, in one pass over them."""
    all_right, total = int(torch.count_nonzero(correct)), len(score)
    all_wrong = total - all_right
    twice_wins, ties_term, risk = 0, 0.0, 0.0
    for ties, right_above, wrong_above in _with_those_above(score, correct):
        wrong_below = all_wrong - wrong_above - ties.wrong
        twice_wins += int((ties.right * (2 * wrong_below + ties.wrong)).sum())
        count = (ties.right + ties.wrong).double()
        ties_term += (count.pow(3) - count).sum().item()
        above = right_above + wrong_above
        risk += risk_sums(ties.right, ties.wrong, above, wrong_above).sum().item()
    return Ranking(all_right, all_wrong, twice_wins / 2, ties_term, risk / total)


def risk_sums(right: Tensor, wrong: Tensor, above: Tensor, wrong_above: Tensor) -> Tensor:
    """Return the sum of the risks at the k that fall into each group of equal scores.

    With n answers and w errors above the group, and m answers and e errors in it, the expected risk
    at its j-th answer is (w + e j / m) / (n + j), whose sum over j = 1 ... m is
    e + (w - e n / m) (H(n + m) - H(n)), H being the harmonic numbers.
    """
    count = (right + wrong).double()
    above, wrong_above, wrong = above.double(), wrong_above.double(), wrong.double()
    harmonic = torch.where(count > 0, 1 / (above + 1), 0.0)
    several = count > 1
    n = above[several]
    harmonic[several] = torch.digamma(n + count[several] + 1) - torch.digamma(n + 1)
    share = torch.where(count > 0, wrong / count, 0.0)
    return wrong + (wrong_above - share * above) * harmonic


def _with_those_above(score: Tensor, correct: Tensor) -> Iterator[tuple[Ties, Tensor, Tensor]]:
    """Yield distinct scores, ascending, with how many higher ones were right, and wrong."""
    right_left = int(torch.count_nonzero(correct))
    wrong_left = len(correct) - right_left
    for ties in ascending(score, correct):
        right_above = right_left - ties.right.cumsum(0)
        wrong_above = wrong_left - ties.wrong.cumsum(0)
        yield ties, right_above, wrong_above
        right_left, wrong_left = int(right_above[-1]), int(wrong_above[-1])


def _thinned(
    score: Tensor, answered: Tensor, errors: Tensor, total: int, points: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep, of ascending scores, the highest, and those whose coverage is the next of `points` steps."""
    if points is None:
        return score, answered, errors
    step = answered * points // total
    keep = torch.ones_like(step, dtype=torch.bool)
    torch.ne(step[:-1], step[1:], out=keep[:-1])
    return score[keep], answered[keep], errors[keep]


def _share_of_orders(u: int, few: int, many: int) -> float:
    """Return the probability that U <= u if all orders of `few` and `many` distinct scores are as likely.

    The orders with U = j are counted by the coefficient of q^j in the Gaussian binomial
    prod_i (1 - q^(many + i)) / (1 - q^i), i = 1 ... few; each factor is a shift or a running sum.
    """
    orders = torch.zeros(u + 1, dtype=torch.float64)
    orders[0] = 1
    for i in range(1, few + 1):
        columns = -(-(u + 1) // i)
        padded = torch.nn.functional.pad(orders, (0, columns * i - u - 1))
        orders = padded.view(columns, i).cumsum(0).flatten()[: u + 1]
        orders[many + i :] -= orders[: -(many + i)].clone()
    return (orders.sum() / math.comb(few + many, few)).item()
