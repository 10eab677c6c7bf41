"""Bootstrap resamples of sums: rows are put into blocks once, and blocks are drawn.

A measure that follows from sums over rows (of outcomes, losses, members of a bin) follows, in a
resample, from sums over the blocks drawn. All resamples of all sums are one matrix product,
(resamples, blocks) by (blocks, sums).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .order import cells
from .predictions import chunks
from .ranking import risk_sums
from .table import bin_index, log_loss, squared_error

BLOCKS = 2000
CELLS = 512
_BATCH = 250  # resamples at a time


class BlockSums(NamedTuple):
    """Sums over the rows of each of R blocks.

    Attributes:
        total: Rows, and right answers, (R, 2) float64.
        right: Right answers in each of K cells of the score, ascending, (R, K) float32.
        wrong: Wrong answers in each cell, (R, K) float32.
        binned: Rows, right answers, confidence, in each of B bins, (R, 3, B) float64; B is 0 for
            scores that are no probabilities.
        loss: Squared error, and log loss, (R, 2) float64, or (R, 0).
    """

    total: Tensor
    right: Tensor
    wrong: Tensor
    binned: Tensor
    loss: Tensor


def assign_blocks(units: int, generator: torch.Generator) -> Tensor:
    """Return the block of each unit, (units,) int16: at most `BLOCKS`, of equal size to within one unit."""
    if units <= BLOCKS:
        return torch.arange(units, dtype=torch.int16)
    shuffled = torch.randperm(units, generator=generator, dtype=torch.int32)
    return shuffled.remainder_(BLOCKS).to(torch.int16)


def sum_blocks(score: Tensor, correct: Tensor, block: Tensor, edges: Tensor | None) -> BlockSums:
    """Return the sums of checked columns (N,), given the block of each row; `edges` of bins, if any."""
    blocks, bins = int(block.max()) + 1, 0 if edges is None else len(edges) - 1
    cuts = cells(score, CELLS)

    # In float32 counts below 2^24 are exact.
    right, count = torch.zeros(2, blocks, len(cuts) + 1)
    binned = torch.zeros(blocks, 3, bins, dtype=torch.float64)
    loss = torch.zeros(blocks, 2 if bins else 0, dtype=torch.float64)
    for s, y, b in chunks(score, correct, block):
        b = b.long()
        cell = torch.bucketize(s, cuts, right=True)
        _count(count, b, cell)
        _count(right, b[y], cell[y])
        if edges is not None:
            index = bin_index(s, edges)
            _count(binned[:, 0], b, index)
            _count(binned[:, 1], b[y], index[y])
            _count(binned[:, 2], b, index, s)
            zero = torch.zeros_like(b)
            _count(loss[:, :1], b, zero, squared_error(s, y))
            _count(loss[:, 1:], b, zero, log_loss(s, y))
    total = torch.stack([count.sum(1), right.sum(1)], 1).double()
    return BlockSums(total, right, count.sub_(right), binned, loss)


def draw(blocks: int, resamples: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield how often each resample draws each block, (resamples, blocks) float32, some at a time."""
    for begin in range(0, resamples, _BATCH):
        batch = min(_BATCH, resamples - begin)
        drawn = torch.randint(blocks, (batch, blocks), generator=generator)
        drawn += torch.arange(batch)[:, None] * blocks
        yield torch.bincount(drawn.flatten(), minlength=batch * blocks).view(batch, -1).float()


def resampled_metrics(weight: Tensor, sums: BlockSums) -> dict[str, Tensor]:
    """Return every measure of each resample, (S,) float64, given its weights (S, R) of the blocks."""
    exact = weight.double()
    count, right = (exact @ sums.total).unbind(1)
    # Counts below 2^24 are exact in float32, which takes half the time.
    cells = (weight @ sums.right).double(), (weight @ sums.wrong).double()
    found = {"accuracy": right / count, "auroc": _auroc(*cells), "aurc": _aurc(*cells)}
    if sums.loss.shape[1]:
        in_bin = (exact @ sums.binned.flatten(1)).view(len(weight), 3, -1)
        confidence = in_bin[:, 2].sum(1) / count
        brier, nll = (exact @ sums.loss).div(count[:, None]).unbind(1)
        found |= {"mean_confidence": confidence, "gap": confidence - found["accuracy"]}
        found |= {"brier": brier, "nll": nll} | _calibration_errors(*in_bin.unbind(1))
    return found


def _count(into: Tensor, row: Tensor, column: Tensor, value: Tensor | None = None) -> None:
    """Add 1, or the value, at each (row, column)."""
    value = into.new_ones(()) if value is None else value
    into.index_put_((row, column), value, accumulate=True)


def _calibration_errors(count: Tensor, right: Tensor, confidence: Tensor) -> dict[str, Tensor]:
    weight = count / count.sum(1, keepdim=True)
    gap = torch.where(count > 0, (right - confidence) / count, 0.0).abs()
    return {
        "ece": (weight * gap).sum(1),
        "rms": (weight * gap.square()).sum(1).sqrt(),
        "mce": gap.amax(1),
    }


def _auroc(right: Tensor, wrong: Tensor) -> Tensor:
    below = wrong.cumsum(1) - wrong
    wins = (right * (below + wrong / 2)).sum(1)
    return wins / (right.sum(1) * wrong.sum(1))  # 0 / 0, NaN, where there is no pair


def _aurc(right: Tensor, wrong: Tensor) -> Tensor:
    count = right + wrong
    total = count.sum(1, keepdim=True)
    above = total - count.cumsum(1)
    wrong_above = wrong.sum(1, keepdim=True) - wrong.cumsum(1)
    return risk_sums(right, wrong, above, wrong_above).sum(1) / total.squeeze(1)
