"""Graded answers with a score each, in one block of memory that groups are slices of."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .cells import Cell, Cells, Key


@dataclass(frozen=True)
class Answers:
    """Answers and their groups.

    Attributes:
        score: Of all answers in memory, (N,) float64.
        correct: (N,) bool.
        columns: Names of the groups.
        spans: Where the answers are that agree in every group.
        question: A number for the question of each, (N,) int64; None if they are not told apart.
    """

    score: Tensor
    correct: Tensor
    columns: Key
    spans: dict[Key, slice]
    question: Tensor | None

    def __len__(self) -> int:
        return sum(span.stop - span.start for span in self.spans.values())

    def values(self, column: str) -> list[str]:
        """The values of a group, in the order of their first answers."""
        index = self.columns.index(column)
        return list(dict.fromkeys(key[index] for key in self.spans))

    def split(self, columns: Iterable[str]) -> dict[Key, "Answers"]:
        """The answers for each combination of values that some groups take; nothing is copied."""
        indices = [self.columns.index(column) for column in columns]
        parts: dict[Key, Answers] = {}
        for key, span in self.spans.items():
            value = tuple(key[index] for index in indices)
            parts.setdefault(value, replace(self, spans={})).spans[key] = span
        return parts

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Scores (n,) and outcomes (n,) of these answers; a view where they lie side by side."""
        return self._joined(self.score), self._joined(self.correct)

    def _joined(self, column: Tensor) -> Tensor:
        spans = list(self.spans.values())
        if all(before.stop == after.start for before, after in pairwise(spans)):
            return column[spans[0].start : spans[-1].stop]
        return torch.cat([column[span] for span in spans])


def in_one_block(cells: Cells, first: Iterable[str]) -> Answers:
    """Moves answers out of their cells, so that they are never in memory twice.

    Args:
        cells: Empty afterwards.
        first: Groups to sort by, the most important first.
    """
    columns = [*first, *(column for column in cells.columns if column not in first)]
    cells.keep(columns)
    ranks = [{value: i for i, value in enumerate(cells.values(column))} for column in columns]
    keys = sorted(
        cells.cells, key=lambda key: [rank[v] for rank, v in zip(ranks, key, strict=True)]
    )
    if len(keys) == 1:
        score, correct, question = _columns(cells.cells.pop(keys[0]))
        return Answers(score, correct, cells.columns, {keys[0]: slice(0, len(score))}, question)
    total, start = len(cells), 0
    spans: dict[Key, slice] = {}
    numbered = any(cell.question for cell in cells.cells.values())
    score, correct = torch.empty(total, dtype=torch.float64), torch.empty(total, dtype=torch.bool)
    question = torch.empty(total if numbered else 0, dtype=torch.int64)
    for key in keys:
        part = _columns(cells.cells.pop(key))
        spans[key] = slice(start, start + len(part[0]))
        score[spans[key]], correct[spans[key]] = part[:2]
        if part[2] is not None:
            question[spans[key]] = part[2]
        start += len(part[0])
    return Answers(score, correct, cells.columns, spans, question if numbered else None)


def _columns(cell: Cell) -> tuple[Tensor, Tensor, Tensor | None]:
    """The answers of a cell as tensors over its memory."""
    return (
        torch.frombuffer(cell.score, dtype=torch.float64),
        torch.frombuffer(cell.correct, dtype=torch.bool),
        torch.frombuffer(cell.question, dtype=torch.int64) if cell.question else None,
    )
