"""What `levelhead sft --teacher` adds to a run: the teacher's top-k beside the tokens, and the checks that they fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from ..examples import Collator, Counts
from ..teacher.store import TeacherStore, vocabulary_digest
from .options import Options


class TaughtRows(Dataset[dict[str, Any]]):
    """Rows of Tokens with the teacher's top-k, recalibrated unless `raw`."""

    def __init__(self, table: Any, store: TeacherStore, *, raw: bool) -> None:
        self._table = table
        self._store = store
        self._recalibrate = None if raw else store.manifest.recalibration

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        ids, log_probs = self._store[number]
        if self._recalibrate is not None:
            log_probs = self._recalibrate(log_probs)
        tokens: dict[str, Any] = self._table[number]
        return tokens | {"teacher_ids": ids, "teacher_log_probs": log_probs}


class TaughtCollator(Collator):
    """Pads rows, with the teacher's columns at the positions that predict a token with a loss."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors (rows, tokens of the longest row); of training rows (rows, tokens, k), too."""
        batch = super().__call__(rows)
        if "teacher_ids" not in rows[0]:  # of evaluation
            return batch
        ids, log_probs = map(list, zip(*map(_aligned, rows), strict=True))
        batch["teacher_ids"] = pad_sequence(ids, batch_first=True, padding_value=IGNORE_INDEX)
        # As bits: FSDP and DeepSpeed round inputs that are floating point.
        batch["teacher_log_probs"] = pad_sequence(log_probs, batch_first=True).view(torch.int32)
        return batch


def _aligned(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the teacher's columns of a row, (T, k), where the hidden state predicts a token with a loss."""
    has_loss = torch.tensor(row["labels"][1:]) != IGNORE_INDEX
    has_loss = torch.cat([has_loss, torch.tensor([False])])
    shape = (len(has_loss), row["teacher_ids"].shape[1])
    ids, log_probs = torch.full(shape, IGNORE_INDEX), torch.zeros(shape)
    ids[has_loss], log_probs[has_loss] = row["teacher_ids"], row["teacher_log_probs"]
    return ids, log_probs


def check_teacher(folder: Path, options: Options, tokenizer: Any, counts: Counts) -> None:
    """Refuse a store that was not made for these rows and this tokenizer; read all of it once.

    Args:
        folder: Of the store.
        options: The options of the run.
        tokenizer: The student's.
        counts: What became of the rows.

    Raises:
        CliError: It was not, or cannot be used.
    """
    made = TeacherStore(folder).manifest
    if made.vocabulary != vocabulary_digest(tokenizer):
        raise CliError(
            f"the tokenizer of {options.model} is not that of the teacher {made.model}, so their "
            "token ids mean different tokens; distil into a student with the teacher's tokenizer"
        )
    if made.tokens != counts.digest:
        raise CliError(
            f"{options.teacher} was made for other tokens: {made.rows:,} rows of {made.data} "
            f"with --max-length {made.max_length}, and these are {counts.rows:,} rows of "
            f"{options.data} with --max-length {options.max_length}. Data, --max-length and "
            "--chat-template must be those of `levelhead teacher`"
        )


def check_vocabulary(store: TeacherStore, entries: int) -> None:
    """Refuse a student whose head has no row for a token of the teacher.

    Raises:
        CliError: It has none.
    """
    largest = max(shard.largest_id for shard in store.manifest.shards)
    if largest >= entries:
        raise CliError(
            f"the teacher finds token {largest} likely, and the student's head has {entries} entries; "
            "resize_token_embeddings the student to the teacher's size"
        )
