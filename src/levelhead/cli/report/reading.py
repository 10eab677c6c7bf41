"""From files to answers: which column is what, rows checked and sorted into groups, batch by batch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pyarrow

from ..errors import CliError
from . import harness
from .cells import Cells, Key
from .columns import (
    IDENTITIES,
    OUTCOMES,
    SCORES,
    Array,
    BadValueError,
    labels,
    may_be_group,
    outcomes,
    scores,
)
from .files import File, open_file

KIND = "score_kind"  # a column that tells scores of several kinds apart
FILE = "file"
_MAX_VALUES = 200  # of a column that is taken for a group unasked
_MAX_CELLS = 20_000
_ANSWERS_PER_VALUE = 5  # at least, of a column that is taken for a group unasked

Ranges = dict[tuple[str, str], tuple[float, float]]


@dataclass(frozen=True)
class Choice:
    """What the user says about columns; None and () leave it to the names.

    Attributes:
        confidence: Column of the scores.
        correct: Column of the outcomes.
        groups: Columns that must be among the groups.
        where: Pairs of column and value: only rows that hold all of them are read.
        questions: Whether to tell questions apart, if every file has a column for that.
    """

    confidence: str | None = None
    correct: str | None = None
    groups: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()
    questions: bool = False


@dataclass(frozen=True)
class _Plan:
    """Which columns of a file are read, as what."""

    file: File
    confidence: str
    correct: str
    groups: tuple[str, ...]
    given: dict[str, str]  # groups that the name of the file tells
    where: tuple[tuple[str, str], ...]


@dataclass
class Reading:
    """What was read.

    Attributes:
        cells: By all groups, those that were not asked for only where they are plausible.
        constants: Groups in which all answers agree, and their value.
        confidence: The name of the column of scores.
        from_harness: Whether confidences were computed from logs of lm-evaluation-harness.
        ranges: Lowest and highest score, by file and kind of score.
    """

    cells: Cells
    constants: dict[str, str]
    confidence: str
    from_harness: bool
    ranges: Ranges


def read(paths: list[Path], choice: Choice) -> Reading:
    """Reads answers.

    Raises:
        CliError: A file cannot be read, lacks a column, or has a bad row; or files do not fit.
    """
    # What Arrow frees is then there for measuring; its own pool would keep it.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    names = _names(paths)
    files = [open_file(path) for path in paths]
    plans = [_plan(file, choice, name) for file, name in zip(files, names, strict=True)]
    cells = Cells(_common(plans, choice))
    identity = _identity(files) if choice.questions else None
    known: dict[object, int] = {}
    for plan in plans:
        _read_file(plan, cells, choice.groups, identity, known)
    if not len(cells):
        raise CliError(_nothing(choice))
    ranges = _ranges(cells)
    _check_mixture(ranges)
    return Reading(
        cells,
        _settle(cells, choice.groups),
        plans[0].confidence,
        any(harness.groups(path) for path in paths),
        ranges,
    )


def _identity(files: list[File]) -> str | None:
    """The column that says which question was answered, if every file has it."""
    return next((name for name in IDENTITIES if all(name in file.kinds for file in files)), None)


def _nothing(choice: Choice) -> str:
    if not choice.where:
        return "there are no rows in what was given; a report needs at least one answer"
    conditions = " and ".join(f"{column} = {value!r}" for column, value in choice.where)
    return f"no row has {conditions}; spell column and value of --where as in the file"


def _names(paths: list[Path]) -> list[str]:
    """What to call each file: its stem, or its path where stems repeat."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CliError(f"{twice} was given twice; its answers would count twice")
    return names


def _plan(file: File, choice: Choice, name: str) -> _Plan:
    given = {FILE: name, **harness.groups(file.path)}
    confidence = _column(file, "confidence", choice.confidence, SCORES)
    correct = _column(file, "correct", choice.correct, OUTCOMES)
    for column in (*choice.groups, *(column for column, _ in choice.where)):
        if column not in file.kinds and column not in given:
            raise CliError(_no_column(file, column))
    candidates = (
        column
        for column, kind in file.kinds.items()
        if column not in (confidence, correct)
        and (column in choice.groups or may_be_group(column, kind))
    )
    return _Plan(
        file,
        confidence,
        correct,
        tuple(column for column in candidates if column not in given),
        given,
        choice.where,
    )


def _column(file: File, role: str, chosen: str | None, names: Iterable[str]) -> str:
    if chosen is not None:
        if chosen not in file.kinds:
            raise CliError(_no_column(file, chosen))
        return chosen
    for name in names:
        if name in file.kinds:
            return name
    raise CliError(
        f"{file.path} has no column named {' or '.join(names)}; name one with --{role}. "
        f"It has {_listed(file.kinds)}"
    )


def _no_column(file: File, column: str) -> str:
    return f"{file.path} has no column named {column!r}; it has {_listed(file.kinds)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _common(plans: list[_Plan], choice: Choice) -> Key:
    """Groups that every file has, in the order of the first."""
    shared = [
        column
        for column in (*plans[0].given, *plans[0].groups)
        if all(column in plan.given or column in plan.groups for plan in plans)
    ]
    return tuple(dict.fromkeys([*shared, *choice.groups]))


def _read_file(
    plan: _Plan,
    cells: Cells,
    asked: tuple[str, ...],
    identity: str | None,
    known: dict[object, int],
) -> None:
    """Appends the answers of a file; `known` numbers the questions, across files."""
    if any(plan.given.get(column, value) != value for column, value in plan.where):
        return
    where = [(column, value) for column, value in plan.where if column not in plan.given]
    groups = [column for column in cells.columns if column not in plan.given]
    needed = [plan.confidence, plan.correct, *groups, *(column for column, _ in where)]
    needed += [identity] if identity else []
    for numbers, batch in plan.file.batches(list(dict.fromkeys(needed))):
        kept = _kept(batch, where)
        rows = batch if len(kept) == batch.num_rows else batch.take(pyarrow.array(kept))
        try:
            score = scores(plan.confidence, rows.column(plan.confidence))
            correct = outcomes(plan.correct, rows.column(plan.correct))
        except BadValueError as error:
            number = numbers[int(kept[error.position])]
            raise CliError(f"{plan.file.path}, {plan.file.unit} {number}: {error}") from error
        coded = {name: labels(rows.column(name)) for name in groups if name in rows.schema.names}
        coded |= {
            name: (numpy.zeros(len(score), numpy.int64), [value])
            for name, value in plan.given.items()
        }
        many = [name for name in groups if len(coded[name][1]) > _MAX_VALUES and name not in asked]
        groups = [name for name in groups if name not in many]
        cells.keep(name for name in cells.columns if name not in many)
        question = None
        if identity is not None:
            texts = rows.column(identity).to_pylist()
            question = numpy.array([known.setdefault(text, len(known)) for text in texts])
        cells.append(score, correct, question, coded)
        if len(cells.cells) > _MAX_CELLS:
            raise CliError(
                f"the groups {_listed(cells.columns)} cut the answers into more than "
                f"{_MAX_CELLS:,} parts; name columns with fewer values with --by and --within"
            )


def _kept(batch: pyarrow.RecordBatch, where: list[tuple[str, str]]) -> Array:
    """Positions of the rows that hold every value."""
    mask = numpy.ones(batch.num_rows, bool)
    for column, value in where:
        codes, texts = labels(batch.column(column))
        mask &= numpy.array([text == value for text in texts])[codes]
    return numpy.flatnonzero(mask)


def _ranges(cells: Cells) -> Ranges:
    """Lowest and highest score, by file and kind of score."""
    names = [name for name in (FILE, KIND) if name in cells.columns]
    indices = [cells.columns.index(name) for name in names]
    ranges: Ranges = {}
    for key, cell in cells.cells.items():
        file, kind = [*(key[index] for index in indices), ""][:2]
        score = numpy.frombuffer(cell.score)
        low, high = ranges.get((file, kind), (math.inf, -math.inf))
        ranges[file, kind] = (min(low, score.min()), max(high, score.max()))
    return ranges


def _check_mixture(ranges: Ranges) -> None:
    """Files whose scores are probabilities do not mix with files whose scores are not."""
    for kind in {kind for _, kind in ranges}:
        found = {file: low_high for (file, k), low_high in ranges.items() if k == kind}
        outside = [file for file, (low, high) in found.items() if low < 0 or high > 1]
        if outside and len(outside) < len(found):
            inside = next(file for file in found if file not in outside)
            low, high = found[outside[0]]
            raise CliError(
                f"the scores of {outside[0]} go from {low:g} to {high:g}, those of {inside} lie in "
                f"[0, 1]; report them apart, or tell them apart in a column {KIND!r}"
            )


def _settle(cells: Cells, asked: tuple[str, ...]) -> dict[str, str]:
    """Forgets columns that do not group: of one value, or of too many for one to say anything.

    Returns:
        The columns of one value, and that value.
    """
    counts = {column: len(cells.values(column)) for column in cells.columns}
    constants = {name: cells.values(name)[0] for name, count in counts.items() if count == 1}
    most = min(_MAX_VALUES, len(cells) // _ANSWERS_PER_VALUE)
    cells.keep(
        name
        for name, count in counts.items()
        if name in asked or (count > 1 and (count <= most or name in (FILE, KIND)))
    )
    return constants
