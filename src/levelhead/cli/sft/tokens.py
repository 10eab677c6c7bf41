"""Examples as token ids, with labels at the completion or at the turns of the assistant only."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from .data import Chat, Pair

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what the assistant says


class Tokens(NamedTuple):
    """An example as the model reads it; the label of a position is its own token."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where there is no loss

    def cut(self, length: int) -> "Tokens":
        """The first `length` tokens."""
        return Tokens(self.input_ids[:length], self.labels[:length])

    @property
    def supervised(self) -> int:
        """Positions that a model predicts and has a loss at; nothing predicts the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode(example: Pair | Chat, tokenizer: Any) -> Tokens:
    """Tokens and labels of an example; no token lies astride the border of what has a loss.

    Raises:
        ValueError: The tokenizer cannot do it; the message is the reason.
        CliError: The tokenizer cannot do it for any example of the kind.
    """
    if isinstance(example, Pair):
        return _encode_pair(example, tokenizer)
    if tokenizer.chat_template is None:
        raise CliError(
            "the rows are chats, but the tokenizer has no chat template; give it one with "
            "--chat-template, or write rows with a prompt and a completion"
        )
    try:
        if _MARKS.search(tokenizer.get_chat_template()):
            return _encode_marked(example, tokenizer)
        return _encode_by_prefixes(example, tokenizer)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def _encode_pair(pair: Pair, tokenizer: Any) -> Tokens:
    """Prompt and completion as one text if its tokens divide between them, else apart; then EOS."""
    if tokenizer.eos_token_id is None:
        raise CliError(
            "the tokenizer has no EOS token, so no completion could end; set its eos_token and save it again"
        )
    prompt = _without_eos(tokenizer(pair.prompt)["input_ids"], tokenizer)
    ids = _without_eos(tokenizer(pair.prompt + pair.completion)["input_ids"], tokenizer)
    if ids[: len(prompt)] != prompt:
        ids = [*prompt, *tokenizer(pair.completion, add_special_tokens=False)["input_ids"]]
    ids = [*ids, tokenizer.eos_token_id]
    return _labelled(ids, [(len(prompt), len(ids))])


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encode_marked(chat: Chat, tokenizer: Any) -> Tokens:
    """With labels where the template itself says that the assistant speaks."""
    if not tokenizer.is_fast:
        raise CliError(
            f"{type(tokenizer).__name__} does not tell where its tokens come from, which the marks "
            "of the chat template need; use a fast tokenizer"
        )
    encoded = tokenizer.apply_chat_template(
        chat.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return Tokens(ids, [i if own else IGNORE_INDEX for i, own in zip(ids, mask, strict=True)])


def _encode_by_prefixes(chat: Chat, tokenizer: Any) -> Tokens:
    """With labels from the end of the prompt for each turn of the assistant to the end of the turn."""

    def tokens(turns: int, prompt: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(
            chat.messages[:turns], tokenize=False, add_generation_prompt=prompt
        )
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    ids, spans = tokens(len(chat.messages)), []
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        before, after = tokens(turn, prompt=True) if turn else [], tokens(turn + 1)
        if ids[: len(after)] != after or after[: len(before)] != before or not turn:
            raise ValueError(
                f"message {turn + 1} cannot be told apart in what the chat template makes of the "
                "chat; give a template with {% generation %} marks as --chat-template"
            )
        spans.append((len(before), len(after)))
    return _labelled(ids, spans)


def _labelled(ids: list[int], spans: list[tuple[int, int]]) -> Tokens:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Tokens(ids, labels)


class Collator:
    """Pads rows on the right, whatever side and token the tokenizer generates with."""

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Tensors of shape (rows, tokens of the longest row)."""
        ids, labels = ([torch.tensor(row[key]) for row in rows] for key in Tokens._fields)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._padding),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }
