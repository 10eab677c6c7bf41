"""Score files: Parquet with one row per question, whole or not there at all."""

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from levelhead.scoring import Score

SETTINGS = b"levelhead"  # the key of the settings, as JSON, in the metadata of the schema
_ROWS_AT_A_TIME = 1000
_TYPES = {
    "question_id": pa.string(),
    "group": pa.string(),
    "answer": pa.string(),
    "prediction": pa.string(),
    "correct": pa.bool_(),
    "confidence": pa.float64(),
    "msp": pa.float64(),
    "choice_probability": pa.float64(),
    "max_logit": pa.float64(),
    "entropy": pa.float64(),
    "choice_logits": pa.list_(pa.float32()),
    "target": pa.int32(),
    "argmax_is_choice": pa.bool_(),
    "order": pa.list_(pa.int32()),
    "model": pa.string(),
}


def schema(settings: dict[str, Any], *, groups: bool) -> pa.Schema:
    """Return the schema of a score file, with or without a column for groups."""
    fields = [(name, type_) for name, type_ in _TYPES.items() if groups or name != "group"]
    return pa.schema(fields, metadata={SETTINGS: json.dumps(settings)})


def write_part(path: Path, schema: pa.Schema, scores: Iterable[Score], model: str) -> None:
    """Write scores as they come, in row groups; on failure, nothing is left."""
    rows = iter(scores)
    try:
        with parquet.ParquetWriter(path, schema) as writer:
            while chunk := [
                score._asdict() | {"model": model} for score in islice(rows, _ROWS_AT_A_TIME)
            ]:
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def join_parts(parts: Sequence[Path], path: Path) -> None:
    """Put `path` in the place of its parts, all at once."""
    first, *others = parts
    if others:
        whole = part_of(path, "whole")
        try:
            _concatenate(parts, whole)
        except BaseException:
            whole.unlink(missing_ok=True)
            raise
        for part in parts:
            part.unlink()
        first = whole
    first.replace(path)


def part_of(path: Path, name: object) -> Path:
    """Return where a part of a file lies until the whole is done: beside it, so that it can be moved."""
    return path.with_name(f".{path.name}.{name}.part")


def _concatenate(parts: Sequence[Path], path: Path) -> None:
    with parquet.ParquetWriter(path, parquet.read_schema(parts[0])) as writer:
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))
