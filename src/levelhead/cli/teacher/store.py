"""The store of a teacher's top-k: Arrow files of a fixed number of rows, and a manifest that describes them.

A shard is written under another name and moved into place, then its description beside it; so after a kill, at any
moment, every shard either is whole and described or is made again, and none holds a row of another. Which rows a
shard holds follows from its number alone. Processes that share the work therefore never talk to each other: each
makes the shards whose number is its own modulo their count, and whoever sees them all writes the manifest.

A shard has a row for every example, with lists of a multiple of k: per position that has a loss, in order,
k token ids (uint32) and their log-probabilities (float16, of nats), the most likely first.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from levelhead.objectives import Recalibration

from ..errors import CliError
from ..output import write_json

FORMAT = 1
ROWS = 1000  # of a shard
MANIFEST = "manifest.json"
_PART = ".part"
_SCHEMA = pa.schema({"ids": pa.list_(pa.uint32()), "log_probs": pa.list_(pa.float16())})


@dataclass(frozen=True)
class Shard:
    """The description of a shard, beside it and in the manifest."""

    rows: int
    positions: int
    bytes: int
    sha256: str
    largest_id: int
    mass: float  # of the k probabilities, summed over the positions
    correct: int  # positions where the most likely token is the one in the data


@dataclass(frozen=True)
class Settings:
    """What the probabilities in a store depend on, and what a student must have in common."""

    format: int
    model: str
    data: str
    k: int
    max_length: int
    dtype: str
    rows: int
    vocabulary: str  # digest
    tokens: str  # digest of all tokens and labels


@dataclass(frozen=True)
class Manifest(Settings):
    """What a finished store holds."""

    levelhead: str
    positions: int
    recalibration: Recalibration | None  # of the log-probabilities, which are stored without it
    shards: list[Shard]


def vocabulary_digest(tokenizer: Any) -> str:
    """Return what tells tokenizers apart whose ids mean other tokens."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def write_atomically(path: Path, content: dict[str, object], part: str = "") -> None:
    """Write JSON that is there whole or not at all; `part` tells processes apart that write the same."""
    temporary = path.with_name(f"{path.name}{_PART}{part}")
    write_json(temporary, content)
    temporary.replace(path)


def shard_path(folder: Path, number: int) -> Path:
    """Return where a shard is; its description has the same name with .json."""
    return folder / f"shard-{number:05}.arrow"


class Row(NamedTuple):
    """A teacher's k most likely tokens at the positions of one example that have a loss."""

    ids: Tensor  # (P, k) int64
    log_probs: Tensor  # (P, k) float32, nats


class Prediction(NamedTuple):
    """A row, and whether the most likely token is the one in the data."""

    row: Row
    correct: Tensor  # (P,) bool


def write_shard(folder: Path, number: int, batches: Iterable[list[Prediction]]) -> None:
    """Write a shard and its description, as the rows come."""
    path = shard_path(folder, number)
    temporary = path.with_name(path.name + _PART)
    rows = positions = largest = correct = 0
    mass = 0.0
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(_record_batch([row for row, _ in batch]))
            rows += len(batch)
            for row, right in batch:
                positions += len(row.ids)
                largest = max(largest, int(row.ids.max()))
                mass += row.log_probs.double().exp().sum().item()
                correct += int(right.sum())
    size, digest = temporary.stat().st_size, _digest(temporary)
    temporary.replace(path)
    shard = Shard(rows, positions, size, digest, largest, mass, correct)
    write_atomically(path.with_suffix(".json"), asdict(shard))


def _record_batch(rows: list[Row]) -> Any:
    ends = torch.tensor([0, *(row.ids.numel() for row in rows)]).cumsum(0)
    columns = (
        torch.cat([row.ids.flatten() for row in rows]).to(torch.uint32),
        torch.cat([row.log_probs.flatten() for row in rows]).to(torch.float16),
    )
    offsets = pa.array(ends.to(torch.int32).numpy())
    arrays = [pa.ListArray.from_arrays(offsets, pa.array(column.numpy())) for column in columns]
    return pa.record_batch(arrays, schema=_SCHEMA)


def finished_shard(folder: Path, number: int) -> Shard | None:
    """Return the description of a shard that is whole; None if it is missing, or not as it was written."""
    path = shard_path(folder, number)
    try:
        shard = Shard(**json.loads(path.with_suffix(".json").read_text()))
        whole = path.stat().st_size == shard.bytes and _digest(path) == shard.sha256
    except (OSError, ValueError, TypeError):
        return None
    return shard if whole else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TeacherStore:
    """A finished store, read by row in any order; the shards are mapped into memory, not read.

    Args:
        folder: What `levelhead teacher` wrote.
        check: Whether to read all of it once and compare digests.

    Raises:
        CliError: It is no store, is not finished, or was changed since.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        try:
            content = json.loads((folder / MANIFEST).read_text())
            if content["format"] != FORMAT:
                raise CliError(
                    f"{folder} is a store of format {content['format']}, and this reads {FORMAT} alone"
                )
            self.manifest = _manifest(content)
        except FileNotFoundError as error:
            raise CliError(
                f"{folder} holds no finished store of a teacher; make one, or go on with it, with "
                "`levelhead teacher MODEL DATA -o STORE`"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CliError(f"cannot read {folder / MANIFEST}: {error}") from error
        self._tables = [
            _open_shard(folder, number, shard, check=check)
            for number, shard in enumerate(self.manifest.shards)
        ]

    def __len__(self) -> int:
        return sum(table.num_rows for table in self._tables)

    def __getitem__(self, number: int) -> Row:
        table, row = self._tables[number // ROWS], number % ROWS
        ids, log_probs = (table[name][row].values.to_numpy() for name in _SCHEMA.names)
        return Row(
            torch.from_numpy(ids.astype("int64")).view(-1, self.manifest.k),
            torch.from_numpy(log_probs.astype("float32")).view(-1, self.manifest.k),
        )


def _manifest(content: dict[str, Any]) -> Manifest:
    """Return the manifest in a file."""
    recalibration = content.pop("recalibration")
    return Manifest(
        **{name: value for name, value in content.items() if name != "shards"},
        recalibration=recalibration and Recalibration(**recalibration),
        shards=[Shard(**shard) for shard in content["shards"]],
    )


def _open_shard(folder: Path, number: int, shard: Shard, *, check: bool) -> Any:
    path = shard_path(folder, number)
    try:
        whole = path.stat().st_size == shard.bytes and (not check or _digest(path) == shard.sha256)
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}") from error
    if not whole:
        raise CliError(f"{path} is not what the manifest of the store describes; make it again")
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
