"""What a report reads: CSV, Parquet or JSON lines, as batches of columns; never a whole file."""

import csv as text_csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import csv, parquet

from ..errors import CliError
from ..rows import json_object, lines
from . import harness

_ROWS = 1 << 16
Batches = Iterator[tuple[Sequence[int], pyarrow.RecordBatch]]  # with the numbers of its rows


@dataclass(frozen=True)
class File:
    """A file of answers.

    Attributes:
        path: Where it is.
        unit: What the user counts its rows in.
        kinds: Its columns and what they hold.
    """

    path: Path
    unit: str
    kinds: dict[str, pyarrow.DataType]

    def batches(self, columns: list[str]) -> Batches:
        """Some of its columns, a batch of rows at a time.

        Raises:
            CliError: A row cannot be read.
        """
        read = {".parquet": _parquet, ".jsonl": _json_lines}.get(self.path.suffix, _csv)
        yield from read(self.path, columns)


def open_file(path: Path) -> File:
    """Finds out which columns a file has.

    Raises:
        CliError: It is missing, empty, or nothing that can be read.
    """
    try:
        if path.stat().st_size == 0:
            raise CliError(f"{path} is empty")
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".parquet":
        return File(path, "row", _parquet_kinds(path))
    if path.suffix == ".jsonl":
        first = next(_json_lines(path, []), None)
        if first is None:
            raise CliError(f"{path} has no rows")
        return File(
            path, "line", dict(zip(first[1].schema.names, first[1].schema.types, strict=True))
        )
    if path.suffix in (".csv", ".tsv"):
        return File(path, "row", _csv_kinds(path))
    raise CliError(
        f"cannot tell what {path} holds by its name; it must end in .csv, .tsv, .parquet or .jsonl"
    )


def _parquet_kinds(path: Path) -> dict[str, pyarrow.DataType]:
    try:
        schema = parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise CliError(f"{path} is not a Parquet file: {error}") from error
    return dict(zip(schema.names, schema.types, strict=True))


def _parquet(path: Path, columns: list[str]) -> Batches:
    first = 1
    try:
        # With a buffer a row group is read in pieces; one after the other, or each has its own.
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(
                    _ROWS, row_groups=[group], columns=columns, use_threads=False
                ):
                    yield range(first, first + batch.num_rows), batch
                    first += batch.num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise CliError(f"cannot read {path} from row {first} on: {error}") from error


def _csv_header(path: Path) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((line for line in file if line.strip()), "")
    except UnicodeDecodeError as error:
        raise CliError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start + 1}"
        ) from error
    delimiter = max(",;\t", key=header.count)
    names = next(text_csv.reader([header], delimiter=delimiter), [])
    if twice := [name for name in names if names.count(name) > 1]:
        raise CliError(f"{path} has two columns named {twice[0]!r}; rename one")
    return names, delimiter


def _csv_kinds(path: Path) -> dict[str, pyarrow.DataType]:
    """What the first rows hold; booleans are text here, as they may be a group."""
    _, delimiter = _csv_header(path)
    parse = csv.ParseOptions(delimiter=delimiter, invalid_row_handler=lambda _row: "skip")
    try:
        with csv.open_csv(path, parse_options=parse) as reader:
            schema = reader.schema
    except pyarrow.ArrowException as error:
        raise CliError(f"cannot read {path}: {error}") from error
    return dict(zip(schema.names, schema.types, strict=True))


def _csv(path: Path, columns: list[str]) -> Batches:
    """Every column as text: whoever knows what it should be names the row where it is not."""
    names, delimiter = _csv_header(path)
    wrong: list[str] = []

    def refuse(row: csv.InvalidRow) -> str:
        found = f"{row.actual_columns} values, not {row.expected_columns}"
        wrong.append(f"{path}, row {row.number - 1}: {found} as the first line names: {row.text!r}")
        return "error"

    first = 1
    try:
        with csv.open_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False, block_size=1 << 18),
            parse_options=csv.ParseOptions(delimiter=delimiter, invalid_row_handler=refuse),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(names, pyarrow.string()),
                include_columns=columns,
                null_values=[""],
                strings_can_be_null=True,
            ),
        ) as reader:
            for batch in reader:
                yield range(first, first + batch.num_rows), batch
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        raise CliError(
            wrong[0] if wrong else f"cannot read {path} from row {first} on: {error}"
        ) from error


def _json_lines(path: Path, columns: list[str]) -> Batches:
    """Samples of lm-evaluation-harness, or any objects; all columns unless some are named."""
    numbered = lines(path)
    while rows := list(islice(numbered, 1000)):
        parsed = []
        for number, line in rows:
            try:
                row = json_object(line)
                parsed.append(harness.answer(row) if harness.is_sample(row) else row)
            except ValueError as error:
                raise CliError(f"{path}, line {number}: {error}") from error
        names = columns or [name for name, value in parsed[0].items() if not _nested(value)]
        arrays = [_array([row.get(name) for row in parsed]) for name in names]
        yield [number for number, _ in rows], pyarrow.record_batch(arrays, names=names)


def _array(values: list[object]) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except pyarrow.ArrowException:  # of several types: whoever reads them says which is wrong
        return pyarrow.array([None if v is None else json.dumps(v) for v in values])


def _nested(value: object) -> bool:
    return isinstance(value, dict | list)
