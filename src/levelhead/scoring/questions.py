"""Multiple-choice questions: what a row must hold, and the order its options are shown in."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from .fields import check_text


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        question: the text.
        choices: the texts of the options, 2 to 26 of them.
        answer: index into `choices` of the right one.
        question_id: what to call it; None: nothing yet.
        group: what it belongs to, such as a subject or a data set.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    question_id: str | None = None
    group: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Question:
        """The question in a row of data.

        Args:
            row: `question`, a text; `choices`, a list of texts; `answer`, the letter (A is the first
                choice), the index (from 0) or the text of a choice. It may have an `id` and a
                `group` or else a `subject`, texts or whole numbers; None counts as absent.

        Returns:
            The question, its `answer` as an index.

        Raises:
            ValueError: there is none in it, or the answer could mean two choices; the message says
                what is wrong.

        Example:
            >>> row = {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"}
            >>> Question.from_row(row).answer
            1
        """
        choices = _choices(row)
        return cls(
            question=_text('"question"', row.get("question")),
            choices=choices,
            answer=_answer(row.get("answer"), choices),
            question_id=_name(row, "id"),
            group=_name(row, "group") or _name(row, "subject"),
        )

    def order(self, seed: int | None) -> tuple[int, ...]:
        """Return which choice is shown behind each letter: a permutation of the indices of `choices`.

        It depends on the seed and on the texts alone, so that a question has the same order for
        every model, in every subset of the data and on every machine.

        Args:
            seed: any whole number; None: the order of the data.

        Returns:
            Of each letter, from A on, the index of its choice.
        """
        order = list(range(len(self.choices)))
        if seed is not None:
            # A str seeds through SHA-512: the same numbers on every machine, unlike hash().
            random.Random("\0".join((str(seed), self.question, *self.choices))).shuffle(order)
        return tuple(order)


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices")
    if choices is None:
        raise ValueError('"choices" is missing')
    if not isinstance(choices, list | tuple):
        raise ValueError(f'"choices" must be a list of texts, got {type(choices).__name__}')
    if not 2 <= len(choices) <= len(ascii_uppercase):
        raise ValueError(f'"choices" must have 2 to 26 entries, got {len(choices)}')
    return tuple(_text(f"choice {number}", text) for number, text in enumerate(choices, start=1))


def _answer(answer: Any, choices: tuple[str, ...]) -> int:
    """Return the index of the choice that `answer` names; refuse one that could name two."""
    letters = ascii_uppercase[: len(choices)]
    valid = (
        f"a letter from A to {letters[-1]}, an index from 0 to {len(choices) - 1} or the text of a "
        "choice"
    )
    if answer is None:
        raise ValueError(f'"answer" is missing; it must be {valid}')
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f'"answer" must be {valid}, got {answer}')
        return answer
    if not isinstance(answer, str):
        raise ValueError(f'"answer" must be {valid}, got {type(answer).__name__}')
    named = {index for index, text in enumerate(choices) if text.strip() == answer.strip()}
    letter = answer.strip().upper()
    if len(letter) == 1 and letter in letters:
        named.add(letters.index(letter))
    if not named:
        raise ValueError(f'"answer" must be {valid}, got {answer!r}')
    if len(named) > 1:
        both = " and ".join(str(index) for index in sorted(named))
        raise ValueError(
            f'"answer" {answer!r} could mean the choices with the indices {both}; give the index'
        )
    return named.pop()


def _text(name: str, text: Any) -> str:
    if text is None:
        raise ValueError(f"{name} is missing")
    return check_text(name, text)


def _name(row: Mapping[str, Any], field: str) -> str | None:
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None if value is None else _text(f'"{field}"', value)
