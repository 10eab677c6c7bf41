"""Multiple-choice questions to fine-tune on, as token ids with the letters that may answer them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from levelhead.ops.checks import IGNORE_INDEX
from levelhead.scoring import Prompter, Question

from ..errors import CliError
from .preparation import Kind
from .tokens import Collator

_IDS = pa.list_(pa.int32())


class QuestionTokens(NamedTuple):
    """A question and its answer as the model reads them; the label of a position is its own token."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where there is no loss
    choices: list[int]  # the token of each letter, in the order in which the choices are shown
    answer: int  # index into them
    answer_position: int  # of the token that predicts the letter

    def cut(self, length: int) -> "QuestionTokens":
        """The first `length` tokens."""
        return self._replace(input_ids=self.input_ids[:length], labels=self.labels[:length])

    @property
    def supervised(self) -> int:
        """Positions that a model predicts and has a loss at; none if the answer was cut off."""
        if len(self.labels) <= self.answer_position + 1:
            return 0
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


QUESTIONS = Kind(
    Question.from_row,
    'each row must have "question", a text, "choices", a list of texts, and "answer": the letter, the '
    "index (from 0) or the text of the right choice",
    pa.schema(
        {
            "input_ids": _IDS,
            "labels": _IDS,
            "choices": _IDS,
            "answer": pa.int32(),
            "answer_position": pa.int32(),
        }
    ),
)


def question_encoder(
    tokenizer: Any, *, completion_only: bool
) -> Callable[[Question], QuestionTokens]:
    """What makes tokens of a question as `levelhead score` asks it, then its letter and EOS.

    Args:
        tokenizer: The model's.
        completion_only: Whether the letter and EOS alone have a loss, or every token.

    Raises:
        CliError: The tokenizer cannot do it.
    """
    if tokenizer.eos_token_id is None:
        raise CliError(
            "the tokenizer has no EOS token, so no answer could end; set its eos_token and save it again"
        )
    try:
        prompter = Prompter(tokenizer)
    except ValueError as error:
        raise CliError(str(error)) from error

    def encode(question: Question) -> QuestionTokens:
        prompt = prompter(question)
        answer = prompt.order.index(question.answer)
        ids = [*prompt.input_ids, prompt.letter_ids[answer], tokenizer.eos_token_id]
        asked = len(prompt.input_ids)
        without = asked if completion_only else 1  # nothing predicts the first token
        labels = [IGNORE_INDEX] * without + ids[without:]
        return QuestionTokens(ids, labels, list(prompt.letter_ids), answer, asked - 1)

    return encode


class QuestionCollator(Collator):
    """Pads questions; those of training come with what the objective and the E-step need.

    Args:
        padding: Token that fills up `input_ids`.
        width: C, the most choices that a question of the training set has.
    """

    def __init__(self, padding: int, width: int) -> None:
        super().__init__(padding)
        self._width = width

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors (rows, tokens of the longest row); of numbered rows `choices`, (rows, C), too."""
        batch = super().__call__(rows)
        if "question" in rows[0]:
            choices = torch.full((len(rows), self._width), -1)
            for row, letters in zip(choices, (row["choices"] for row in rows), strict=True):
                row[: len(letters)] = torch.tensor(letters)
            batch["choices"] = choices
            for name in ("answer_position", "question"):
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch
