"""The pass: a teacher reads tokenised rows, and says what it finds likely where they have a loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from levelhead.integrations.forced import ForcedDecoder

from ..errors import CliError
from ..sft.tokens import IGNORE_INDEX, Collator
from .store import Forced, Row


class Forcing:
    """Reads rows of a table of Tokens, a batch at a time.

    Args:
        decoder: The teacher.
        collator: Makes a batch of rows.
        batch_size: Rows of a batch.
        device: Of the teacher.
    """

    def __init__(
        self, decoder: ForcedDecoder, collator: Collator, batch_size: int, device: torch.device
    ) -> None:
        self._decoder = decoder
        self._collator = collator
        self._batch_size = batch_size
        self._device = device

    def __call__(self, table: Any, numbers: Sequence[int]) -> Iterator[list[Forced]]:
        """Batches of what the teacher says to the rows of `table` with these numbers, in their order.

        Raises:
            CliError: A probability is not a number.
        """
        for start in range(0, len(numbers), self._batch_size):
            chosen = numbers[start : start + self._batch_size]
            yield self._batch([table[number] for number in chosen], chosen)

    def _batch(self, rows: list[dict[str, Any]], numbers: Sequence[int]) -> list[Forced]:
        batch = self._collator(rows)
        target = batch["labels"][:, 1:]
        counts = target != IGNORE_INDEX
        inputs = (batch["input_ids"], batch["attention_mask"], counts)
        top = self._decoder(*(tensor.to(self._device) for tensor in inputs))
        found, likely = top.indices.cpu(), top.log_probs.float().cpu()
        correct = found[:, 0] == target[counts]
        sizes = counts.sum(1).tolist()
        parts = (torch.split(tensor, sizes) for tensor in (found, likely, correct))
        result = []
        for number, ids, log_probs, right in zip(numbers, *parts, strict=True):
            if log_probs.isnan().any():
                raise CliError(
                    f"the teacher's probabilities of row {number + 1} are not numbers; a model that "
                    "was trained in bfloat16 may overflow in another dtype: try --bf16"
                )
            result.append(Forced(Row(ids, log_probs), right))
        return result
