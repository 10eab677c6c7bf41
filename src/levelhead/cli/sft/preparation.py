"""From rows to a memory-mapped table of tokens, made once however many processes train."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ..errors import CliError
from ..rows import usable
from ..sources import Source
from .data import HINT, example
from .tokens import Tokens

_ROWS_AT_A_TIME = 1000


class Kind(NamedTuple):
    """What rows hold, and what becomes of one.

    Attributes:
        parse: What is in a row; raises ValueError with the reason where there is nothing of the kind.
        hint: How rows should look.
        schema: Of the table: fields of the named tuples that the encoder makes.
    """

    parse: Callable[[dict[str, Any]], Any]
    hint: str
    schema: pa.Schema


EXAMPLES = Kind(example, HINT, pa.schema({field: pa.list_(pa.int32()) for field in Tokens._fields}))


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    cut: int = 0  # rows that lost their end to --max-length
    left_out: int = 0  # rows that lost all that has a loss, and are not among `rows`
    tokens: int = 0
    supervised: int = 0  # tokens with a loss
    longest: int = 0
    digest: str = ""  # of all tokens and labels, in their order


def prepare(
    source: Source,
    encode: Callable[[Any], Any],
    *,
    max_length: int,
    path: Path,
    kind: Kind = EXAMPLES,
) -> Counts:
    """Writes what `encode` makes of every row to `path`, an Arrow stream; on failure, nothing.

    Args:
        source: Of the rows.
        encode: Tokens, or a named tuple like it, of what `kind.parse` finds in a row.
        max_length: Tokens that are left of a row.
        path: Of the file.
        kind: Of the rows.

    Returns:
        What became of them.

    Raises:
        CliError: A row is bad, or none is left to train on.
    """

    def parse(row: Any) -> Any:
        tokens = encode(kind.parse(source.parse(row)))
        if not tokens.supervised:
            raise ValueError("the tokenizer makes no token with a loss of it")
        return tokens

    counts = Counts()
    rows = usable(source.rows, parse, source=source.name, unit=source.unit, hint=kind.hint)
    digest = hashlib.sha256()
    kept = _digested(_cut(rows, max_length, counts), digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, kind.schema) as writer:
            while chunk := list(islice(kept, _ROWS_AT_A_TIME)):
                columns = [list(column) for column in zip(*chunk, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=kind.schema))
        if not counts.rows:
            raise CliError(_nothing_left(source, counts, max_length))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    counts.digest = digest.hexdigest()
    return counts


def _digested(rows: Iterator[Any], digest: Any) -> Iterator[Any]:
    """The rows, after each of which the digest has taken it in."""
    for row in rows:
        digest.update(array("i", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
        yield row


def _cut(rows: Iterator[Any], max_length: int, counts: Counts) -> Iterator[Any]:
    for row in rows:
        tokens = row.cut(max_length)
        if not tokens.supervised:
            counts.left_out += 1
            continue
        counts.rows += 1
        counts.cut += len(row.input_ids) > max_length
        counts.tokens += len(tokens.input_ids)
        counts.supervised += tokens.supervised
        counts.longest = max(counts.longest, len(tokens.input_ids))
        yield tokens


def _nothing_left(source: Source, counts: Counts, max_length: int) -> str:
    if not counts.left_out:
        return f"{source.name} has no rows"
    return (
        f"the completion of every row of {source.name} lies beyond token {max_length}; "
        "raise --max-length"
    )
