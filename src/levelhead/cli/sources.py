"""Where rows come from: JSON lines, Parquet, or a data set by its name."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import pyarrow
from pyarrow import parquet

from .errors import CliError
from .rows import json_object, lines


class Source(NamedTuple):
    """Where rows come from."""

    name: str
    unit: Literal["line", "row"]  # what the user counts its rows in
    rows: Iterable[tuple[int, Any]]
    parse: Callable[[Any], dict[str, Any]]  # ValueError: the row is none


def open_source(data: str, config: str | None, split: str) -> Source:
    """Finds the rows of a .jsonl or .parquet file, or of a data set that `datasets` finds by name.

    Raises:
        CliError: There are none; reading a file may raise it too.
    """
    path = Path(data)
    if path.suffix == ".jsonl":
        return Source(data, "line", lines(path), json_object)
    if path.suffix == ".parquet":
        return Source(data, "row", _parquet_rows(path), _same)
    if path.is_file():
        raise CliError(
            f"cannot tell what {path} holds by its name; write JSON lines to a file that ends in "
            ".jsonl, or Parquet to one that ends in .parquet"
        )
    try:
        found = datasets.load_dataset(data, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CliError(
            f"{data} is neither a .jsonl or .parquet file, nor a data set that load_dataset finds: "
            f"{error}"
        ) from error
    return Source(data, "row", enumerate(found, start=1), _same)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except OSError as error:
        raise CliError(f"cannot read {path}: {error}") from error
    except pyarrow.ArrowInvalid as error:
        raise CliError(f"{path} is not a Parquet file: {error}") from error


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row
