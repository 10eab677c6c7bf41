"""Answers as they come in from files, sorted into cells: those that agree in every group."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy

from .columns import Array

Key = tuple[str, ...]  # one value for each column of the groups


@dataclass
class Cell:
    """Answers that agree in every group, in the order of the files; nine bytes each.

    Attributes:
        score: Of each answer, float64.
        correct: 1 or 0 for each answer.
        question: A number for the question of each answer, int64; empty unless asked for.
    """

    score: "array[float]" = field(default_factory=lambda: array("d"))
    correct: bytearray = field(default_factory=bytearray)
    question: "array[int]" = field(default_factory=lambda: array("q"))

    def extend(self, other: "Cell") -> None:
        """Appends the answers of another cell."""
        self.score.extend(other.score)
        self.correct.extend(other.correct)
        self.question.extend(other.question)


@dataclass
class Cells:
    """All answers.

    Attributes:
        columns: Names of the groups.
        cells: The answers, by their values in these groups.
    """

    columns: Key
    cells: dict[Key, Cell] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(cell.score) for cell in self.cells.values())

    def values(self, column: str) -> list[str]:
        """The values of a group, in the order of their first answers."""
        index = self.columns.index(column)
        return list(dict.fromkeys(key[index] for key in self.cells))

    def append(
        self,
        score: Array,
        correct: Array,
        question: Array | None,
        groups: dict[str, tuple[Array, list[str]]],
    ) -> None:
        """Appends rows, in their order.

        Args:
            score: (N,) float64.
            correct: (N,) uint8.
            question: (N,) int64, if questions are to be told apart.
            groups: For every column a code for each row, and the values that codes stand for.
        """
        if not len(score):
            return
        texts = [groups[name][1] for name in self.columns]
        shape = tuple(len(values) for values in texts)
        codes = [groups[name][0] for name in self.columns]
        combined = numpy.ravel_multi_index(codes, shape) if codes else numpy.zeros(len(score), int)
        order = numpy.argsort(combined, kind="stable")
        present, starts = numpy.unique(combined[order], return_index=True)
        for code, rows in zip(present, numpy.split(order, starts[1:]), strict=True):
            where = numpy.unravel_index(code, shape) if codes else ()
            key = tuple(values[i] for values, i in zip(texts, where, strict=True))
            cell = self.cells.setdefault(key, Cell())
            cell.score.frombytes(score[rows].tobytes())
            cell.correct += correct[rows].tobytes()
            if question is not None:
                cell.question.frombytes(question[rows].tobytes())

    def keep(self, columns: Iterable[str]) -> None:
        """Forgets all other groups; cells that now agree become one."""
        kept = tuple(columns)
        if kept == self.columns:
            return
        indices = [self.columns.index(column) for column in kept]
        cells: dict[Key, Cell] = {}
        for key, cell in self.cells.items():
            value = tuple(key[index] for index in indices)
            if value in cells:
                cells[value].extend(cell)
            else:
                cells[value] = cell
        self.columns, self.cells = kept, cells
