"""Rows of data that a user wrote: read with their numbers, and every bad one named with its reason."""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from levelhead.scoring.fields import check_text, json_type

from .errors import CliError

_MAX_NAMED = 20

RowT = TypeVar("RowT")
ParsedT = TypeVar("ParsedT")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1 on, without the blank ones.

    Raises:
        CliError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip(b"\r\n")
                if number == 1:
                    text = text.removeprefix(codecs.BOM_UTF8)
                if text.strip():
                    yield number, text
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error


def usable(
    rows: Iterable[tuple[int, RowT]],
    parse: Callable[[RowT], ParsedT],
    *,
    source: object,
    unit: str,
    hint: str,
    done: str = "trained",
) -> Iterator[ParsedT]:
    """Yields every parsed row until one is bad, then only looks for more bad ones.

    Args:
        rows: Numbered rows.
        parse: Raises ValueError with the reason where a row is bad.
        source: What to call the data in the report.
        unit: What to call a row in the report, "line" or "row".
        hint: How rows should look, the last line of the report.
        done: What was not done because of bad rows, in the report.

    Raises:
        CliError: After the last row, if any was bad: all are counted, the first twenty named.
    """
    number, bad = 0, []
    for number, row in rows:
        try:
            parsed = parse(row)
        except ValueError as error:
            bad.append(f"  {unit} {number}: {error}")
            continue
        if not bad:
            yield parsed
    if bad:
        more = len(bad) - _MAX_NAMED
        raise CliError(
            "\n".join(
                [
                    f"{len(bad)} of {number} {unit}s of {source} cannot be used, so nothing was "
                    f"{done}:",
                    *bad[:_MAX_NAMED],
                    *([f"  and {more} more"] if more > 0 else []),
                    hint,
                ]
            )
        )


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        ValueError: There is none; the message says what there is.
    """
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {json_type(row)}")
    return row


def text_field(row: dict[str, Any], field: str) -> str:
    """The text in a field of a row.

    Raises:
        ValueError: It is missing, not a string, blank or not Unicode.
    """
    if field not in row:
        raise ValueError(f'"{field}" is missing')
    return check_text(f'"{field}"', row[field])
