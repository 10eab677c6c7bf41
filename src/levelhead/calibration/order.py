"""Scores in ascending order, ties together, without sorting all of them at once."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .predictions import CHUNK, chunks

PIECE = 1 << 17  # rows sorted at a time


class Ties(NamedTuple):
    """Distinct scores, ascending, and how many answers with that score were right and wrong.

    Attributes:
        score: (D,) float64.
        right: (D,) int64.
        wrong: (D,) int64.
    """

    score: Tensor
    right: Tensor
    wrong: Tensor


def ascending(score: Tensor, correct: Tensor) -> Iterator[Ties]:
    """Yield all distinct scores in order, in pieces; equal scores never part.

    Sorting N float64 at once takes 24 N bytes or more. Scores are cut into ranges of some `PIECE`
    rows, each found by one more pass over the scores. A cut is a score, and has a piece to itself:
    of a softmax in float32, half may be exactly 1.0.
    """
    if len(score) <= PIECE:
        yield _sorted(score, correct)
        return
    pieces = 1 + len(score) // PIECE
    sample = _sample(score)
    inner = sample[torch.arange(1, pieces) * len(sample) // pieces]
    cuts = torch.unique(torch.cat([inner, torch.stack(score.aminmax())])).tolist()
    yield _equal(score, correct, cuts[0])
    for low, high in pairwise(cuts):
        inside = _between(score, low, high)
        if len(inside):
            yield _sorted(score[inside], correct[inside])
        yield _equal(score, correct, high)


def quantile_edges(score: Tensor, bins: int) -> Tensor:
    """Return the lowest score of each bin by rank, then the highest of all; no interpolation. (B + 1,)."""
    rank = torch.arange(bins + 1) * len(score) // bins
    rank = rank.clamp(max=len(score) - 1)
    edges = torch.empty(bins + 1, dtype=torch.float64)
    seen = 0
    for ties in ascending(score, torch.ones_like(score, dtype=torch.bool)):
        upto = seen + ties.right.cumsum(0)  # rows with this score or a lower one
        here = (rank >= seen) & (rank < upto[-1])
        edges[here] = ties.score[torch.searchsorted(upto, rank[here], right=True)]
        seen = int(upto[-1])
    return edges


def cells(score: Tensor, count: int) -> Tensor:
    """Return the inner edges of at most `count` cells with about as many scores each, (K - 1,) ascending.

    A cell holds its lower edge. `count` distinct scores or fewer have a cell each, as far as a
    sample of 65,536 to 131,072 evenly spaced rows sees them all.
    """
    sample = _sample(score)
    distinct: Tensor = torch.unique(sample)
    if len(distinct) > count:
        distinct = torch.unique(sample[torch.arange(count) * len(sample) // count])
    return distinct[1:]


def _sample(score: Tensor) -> Tensor:
    return score[:: max(1, len(score) >> 16)].sort().values


def _between(score: Tensor, low: float, high: float) -> Tensor:
    """Return the positions of the scores above `low` and below `high`."""
    found = [
        ((part > low) & (part < high)).nonzero().flatten().add_(CHUNK * i)
        for i, (part,) in enumerate(chunks(score))
    ]
    return torch.cat(found)


def _equal(score: Tensor, correct: Tensor, value: float) -> Ties:
    right = wrong = 0
    for part, outcome in chunks(score, correct):
        equal = part == value
        found = int(torch.count_nonzero(equal & outcome))
        right, wrong = right + found, wrong + int(torch.count_nonzero(equal)) - found
    return Ties(score.new_tensor([value]), torch.tensor([right]), torch.tensor([wrong]))


def _sorted(score: Tensor, correct: Tensor) -> Ties:
    score, order = score.sort()
    last = torch.ones_like(correct)  # whether the row is the last of its score
    torch.ne(score[1:], score[:-1], out=last[:-1])
    count = _differences(last.nonzero().flatten() + 1)
    right = _differences(correct[order].cumsum(0)[last])
    return Ties(score[last], right, count - right)


def _differences(cumulative: Tensor) -> Tensor:
    return torch.diff(cumulative, prepend=cumulative.new_zeros(1))
