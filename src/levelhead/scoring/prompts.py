"""Questions as token ids, up to the position that predicts the letter of the answer."""

from __future__ import annotations

from array import array
from itertools import takewhile
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple, get_args

import jinja2

from .questions import Question

Phrasing = Literal["first", "second"]
# Two ways to ask the same, as one way alone may suit a model by chance. The second gives a cue.
PHRASINGS: dict[Phrasing, str] = {
    "first": (
        "Choose the right answer to this question. Reply with the letter of your choice and a "
        "period, and with nothing more.\n\n{question}\n\n{options}\n"
    ),
    "second": (
        "Question: {question}\n{options}\n\nOnly one of these options is right. Say which by its "
        "letter, then a period, without an explanation.\nAnswer:"
    ),
}


class Prompt(NamedTuple):
    """A question as a model reads it.

    Attributes:
        question: the question.
        order: which choice is shown behind each letter.
        input_ids: the tokens before the letter; the last one predicts it.
        letter_ids: the token of each letter.
    """

    question: Question
    order: tuple[int, ...]
    input_ids: array[int]
    letter_ids: tuple[int, ...]


class Prompter:
    """Makes prompts for one model.

    The letters' tokens are those that the tokenizer makes of them in their place, after the prompt:
    " A" after "Answer:", "A" after a line break, and in a chat whatever the template puts between
    the beginning of the assistant's turn and its first word.

    Args:
        tokenizer: of the model; one of transformers.
        phrasing: "first" or "second" of two ways to ask.
        seed: of the order of the options, see `Question.order`; None: that of the data.
        chat_template: whether to ask in a chat, as a user; None: if the tokenizer has a template.
        max_length: tokens a prompt may have; None: any number.

    Attributes:
        chat_template: whether it asks in a chat.

    Raises:
        ValueError: the phrasing is unknown, or there is no chat template that can be used.

    Example:
        >>> prompt = Prompter(tokenizer)(Question("2 + 2?", ("3", "4"), answer=1))
        >>> [tokenizer.decode(token) for token in prompt.letter_ids]
        ['A', 'B']
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        phrasing: Phrasing = "first",
        seed: int | None = 42,
        chat_template: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        if phrasing not in PHRASINGS:
            valid = ", ".join(map(repr, get_args(Phrasing)))
            raise ValueError(f"unknown phrasing {phrasing!r}; expected one of {valid}")
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat_template and not has_template:
            raise ValueError(
                f"chat_template=True, but the {type(tokenizer).__name__} has none; set its "
                "chat_template, or ask in plain text with chat_template=False"
            )
        self.chat_template = has_template if chat_template is None else chat_template
        self._tokenizer = tokenizer
        self._phrasing = PHRASINGS[phrasing]
        self._seed = seed
        self._max_length = max_length
        self._lead = self._lead_of_chat() if self.chat_template else ""

    def __call__(self, question: Question) -> Prompt:
        """Return the prompt of a question.

        Args:
            question: with 2 to 26 choices.

        Returns:
            Its tokens, up to the position that predicts the letter.

        Raises:
            ValueError: a letter is not one token of its own, the prompt is too long, or the chat
                template refuses it.
        """
        order = question.order(self._seed)
        letters = ascii_uppercase[: len(order)]
        options = "\n".join(
            f"{letter}. {question.choices[index]}"
            for letter, index in zip(letters, order, strict=True)
        )
        text = self._phrasing.format(question=question.question, options=options)
        if self.chat_template:
            before = self._chat(text.strip()) + self._lead
        else:
            before = text if text[-1].isspace() else f"{text} "
        input_ids, letter_ids = self._tokens(before, letters)
        if self._max_length is not None and len(input_ids) > self._max_length:
            raise ValueError(
                f"its prompt has {len(input_ids)} tokens, more than the {self._max_length} allowed; "
                "shorten the question, or leave it out"
            )
        return Prompt(question, order, array("i", input_ids), letter_ids)

    def _chat(self, text: str, answer: str | None = None) -> str:
        """Return a chat in which a user says `text`, up to the answer or up to its end."""
        messages = [{"role": "user", "content": text}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            chat: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer is None,
                enable_thinking=False,  # templates that know no thinking ignore it
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return chat

    def _lead_of_chat(self) -> str:
        """Return the white space that the chat template puts before what the assistant says."""
        prompt, chat = self._chat("?"), self._chat("?", "A")
        lead = chat.removeprefix(prompt).partition("A")[0]
        return lead if chat.startswith(prompt) and lead.isspace() else ""

    def _tokens(self, before: str, letters: str) -> tuple[list[int], tuple[int, ...]]:
        """Return what the text before a letter and each of the letters become when they are one text."""
        texts = [before + letter for letter in letters]
        # A chat template has put the special tokens there already.
        special = not self.chat_template
        ids = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        eos = self._tokenizer.eos_token_id
        if all(row[-1:] == [eos] for row in ids):  # some tokenizers end every text with it
            ids = [row[:-1] for row in ids]
        same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ids, strict=False))
        shared = min(sum(1 for _ in same), min(map(len, ids)) - 1)
        found: dict[int, str] = {}
        for letter, row in zip(letters, ids, strict=True):
            tail = row[shared:]
            pieces = self._tokenizer.convert_ids_to_tokens(tail)
            if len(tail) != 1 or tail == [self._tokenizer.unk_token_id]:
                raise ValueError(
                    f"the letter {letter} is not one token after the prompt, but {pieces}; only "
                    "letters that are one token each can be scored"
                )
            if tail[0] in found:
                raise ValueError(
                    f"the letters {found[tail[0]]} and {letter} are the same token {pieces[0]!r} "
                    "after the prompt; only letters with a token each can be scored"
                )
            found[tail[0]] = letter
        return ids[0][:shared], tuple(found)
