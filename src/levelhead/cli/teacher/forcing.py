"""The pass: a teacher reads tokenised rows, and says what it finds likely where they have a loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from levelhead.heads.head import head_input, single_head
from levelhead.ops import linear_topk
from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from ..sft.tokens import Collator
from .store import Forced, Row


class Forcing:
    """Reads rows of a table of Tokens, a batch at a time; no logits are kept.

    Args:
        model: The teacher.
        k: How many of its largest probabilities to keep at each position.
        collator: Makes a batch of rows.
        batch_size: Rows of a batch.

    Raises:
        CliError: The model is no causal language model with a plain head, or `k` is more than it
            has tokens.
    """

    def __init__(self, model: Any, k: int, collator: Collator, batch_size: int) -> None:
        try:
            self._head = single_head(model)
        except ValueError as error:
            raise CliError(str(error)) from error
        if not self._head.transform.shift:
            raise CliError(
                f"{type(model).__name__} predicts the label of a position at that position; a "
                "teacher must be a causal language model"
            )
        if k > len(self._head.weight):
            raise CliError(
                f"--top-k {k} is more than the teacher's {len(self._head.weight)} tokens"
            )
        self._model = model
        self._k = k
        self._collator = collator
        self._batch_size = batch_size

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
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden = head_input(self._model, inputs)[:, :-1]
        top = linear_topk(
            hidden[counts.to(hidden.device)],
            self._head.weight,
            self._k,
            linear_bias=self._head.bias,
            softcap=self._head.transform.softcap,
            logit_scale=self._head.transform.logit_scale,
        )
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
