"""Columns that users write, as numbers: scores, outcomes, groups; a bad value is named by its row."""

from typing import Any

import numpy
import pyarrow
from pyarrow import compute

PROBABILITIES = ("confidence", "msp", "probability", "choice_probability")
NO_PROBABILITIES = ("max_logit",)  # wherever their values lie
SCORES = ("confidence", "score", "msp", "probability", "max_logit")
OUTCOMES = ("correct", "grade", "is_correct", "acc")
IDENTITIES = ("question_id", "doc_id", "id", "doc_hash")
# Strings that repeat without being a group of questions.
_NO_GROUPS = {*IDENTITIES, "answer", "prediction", "question", "target", "gold", "response"}
EMPTY = "(empty)"

_MEANINGS = {
    "correct": True,
    "true": True,
    "1": True,
    "1.0": True,
    "wrong": False,
    "incorrect": False,
    "unparseable": False,
    "false": False,
    "0": False,
    "0.0": False,
}

Array = numpy.ndarray[Any, Any]


class BadValueError(ValueError):
    """A value that cannot be used: where it stands in its batch, and why."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def may_be_group(name: str, kind: pyarrow.DataType) -> bool:
    """Whether a column of text may say which group an answer belongs to."""
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) and name not in _NO_GROUPS


def scores(name: str, column: pyarrow.Array) -> Array:
    """Float64 scores, all of them finite, and in [0, 1] if the name says probability.

    Raises:
        BadValueError: At the first value that is not.
    """
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_boolean(column.type):
        raise BadValueError(0, f"{name} holds booleans, not numbers")
    try:
        if _is_text(column.type):
            column = compute.utf8_trim_whitespace(column)
        numbers = column.cast(pyarrow.float64())
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise _not_a_number(name, column) from error
    values: Array = _numbers(numbers)
    _refuse(~numpy.isfinite(values), lambda at: f"{name} is {_shown(numbers[at])}, not a number")
    if name in PROBABILITIES:
        _refuse(
            (values < 0) | (values > 1),
            lambda at: _no_probability(name, float(values[at]), float(values.max())),
        )
    return values


def _no_probability(name: str, value: float, largest: float) -> str:
    advice = (
        "percentages? divide by 100"
        if 1 < largest <= 100
        else "a score that is no probability goes into a column named score"
    )
    return f"{name} is {value:g}, not a probability in [0, 1]; {advice}"


def outcomes(name: str, column: pyarrow.Array) -> Array:
    """Whether each answer was right, as uint8.

    Raises:
        BadValueError: At the first value that does not say.
    """
    encoded = column if pyarrow.types.is_dictionary(column.type) else column.dictionary_encode()
    meanings = [_meaning(value) for value in encoded.dictionary.to_pylist()]
    codes = _codes(encoded.indices, null=len(meanings))
    values: Array = numpy.array([2 if m is None else m for m in [*meanings, None]], numpy.uint8)
    values = values[codes]
    _refuse(
        values == 2,
        lambda at: (
            f"{name} is {_shown(column[at])}; it must be true or false, 1 or 0, "
            "correct, wrong or unparseable (which counts as wrong)"
        ),
    )
    return values


def _meaning(value: object) -> bool | None:
    return None if value is None else _MEANINGS.get(str(value).strip().lower())


def labels(column: pyarrow.Array) -> tuple[Array, list[str]]:
    """The column as text: a code for each value, and what the codes stand for."""
    if not pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    texts = [EMPTY if value is None else str(value) for value in column.dictionary.to_pylist()]
    codes: Array = _codes(column.indices, null=len(texts))
    return codes, [*texts, EMPTY]


def _numbers(column: pyarrow.Array) -> Array:
    """A column of numbers; with NaN where null, which makes floats of whole numbers."""
    if column.null_count:
        return column.to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]
    return numpy.from_dlpack(column)  # to_numpy would import pandas, 0.4 s and 40 MiB


def _codes(indices: pyarrow.Array, null: int) -> Array:
    """Indices with a number in place of null."""
    codes = _numbers(indices)
    return numpy.nan_to_num(codes, nan=null).astype(numpy.int64) if indices.null_count else codes


def _not_a_number(name: str, column: pyarrow.Array) -> BadValueError:
    if not _is_text(column.type):
        return BadValueError(0, f"{name} holds {column.type}, not numbers")
    for position, value in enumerate(column.to_pylist()):
        try:
            float(value or "nan")
        except ValueError:
            return BadValueError(position, f"{name} is {value!r}, not a number")
    return BadValueError(0, f"{name} does not hold numbers")


def _is_text(kind: pyarrow.DataType) -> bool:
    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _refuse(bad: Array, reason: Any) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise BadValueError(first, reason(first))


def _shown(value: Any) -> str:
    content = value.as_py()
    return "missing" if content is None else repr(content)
