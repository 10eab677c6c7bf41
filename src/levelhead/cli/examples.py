"""Examples to learn from: prompts and completions, or chats, as a table of token ids on disk.

Only completions and the turns of the assistant have a loss.
"""

import hashlib
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import jinja2
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from levelhead.ops.checks import IGNORE_INDEX
from levelhead.scoring.fields import json_type

from .errors import CliError
from .rows import text_field, usable
from .sources import Source

_HINT = (
    'each row must have "prompt" and "completion", or "messages": a list of '
    '{"role": "user", "content": "..."} with one of role "assistant" at least'
)
_ROWS_AT_A_TIME = 1000
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what the assistant says
IDS = pa.list_(pa.int32())


class Pair(NamedTuple):
    """A text to continue, and its continuation."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """Messages as chat templates take them: dictionaries with "role" and "content"."""

    messages: list[dict[str, Any]]


def parse_example(row: dict[str, Any]) -> Pair | Chat:
    """Return the example in a row.

    Raises:
        ValueError: There is none; the message is the reason.
    """
    if row.get("messages") is None:
        if "prompt" not in row and "completion" not in row:
            raise ValueError('neither "messages" nor "prompt" and "completion"')
        return Pair(*(text_field(row, field) for field in Pair._fields))
    messages = row["messages"]
    if not isinstance(messages, list):
        raise ValueError(f'"messages" is not an array but {json_type(messages)}')
    chat = Chat([_message(number, entry) for number, entry in enumerate(messages, start=1)])
    if all(message["role"] != "assistant" for message in chat.messages):
        raise ValueError('no message has the role "assistant", so there is nothing to learn')
    return chat


def _message(number: int, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"message {number} is not an object but {json_type(entry)}")
    try:
        text_field(entry, "role")
        text_field(entry, "content")
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from error
    return {key: value for key, value in entry.items() if value is not None}  # Parquet pads them


@dataclass(frozen=True)
class Tokens:
    """An example as the model reads it; the label of a position is its own token."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where there is no loss

    def cut(self, length: int) -> Self:
        """Return the first `length` tokens."""
        return replace(self, input_ids=self.input_ids[:length], labels=self.labels[:length])

    @property
    def supervised(self) -> int:
        """Positions with a loss; nothing predicts the first token."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode(example: Pair | Chat, tokenizer: Any) -> Tokens:
    """Return tokens and labels of an example; no token is partly prompt and partly completion.

    Raises:
        ValueError: The tokenizer cannot encode this example; the message is the reason.
        CliError: The tokenizer cannot encode any example of this kind.
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
    """Encode prompt and completion as one text if its tokens divide between them, else apart; add EOS."""
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
    """Set labels where the template itself marks what the assistant says."""
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
    """Set labels from the end of the prompt for each turn of the assistant to the end of the turn."""

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


class Encoder(NamedTuple):
    """How rows become tokens.

    Attributes:
        encode: Makes tokens of a row; raises ValueError with the reason where it cannot.
        hint: Says how rows should look.
        schema: Names the attributes of the tokens to store, with their types.
    """

    encode: Callable[[dict[str, Any]], Tokens]
    hint: str
    schema: pa.Schema


def example_encoder(tokenizer: Any) -> Encoder:
    """Return the encoder of pairs and chats."""
    schema = pa.schema({"input_ids": IDS, "labels": IDS})
    return Encoder(lambda row: encode(parse_example(row), tokenizer), _HINT, schema)


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


def prepare(source: Source, encoder: Encoder, *, max_length: int, path: Path) -> Counts:
    """Write the tokens of every row to `path`, an Arrow stream; on failure, leave nothing.

    Args:
        source: Where the rows come from.
        encoder: Makes tokens of them.
        max_length: Tokens to keep of a row.
        path: The file to write.

    Raises:
        CliError: A row is bad, or none is left to train on.
    """

    def parse(row: Any) -> Tokens:
        tokens = encoder.encode(source.parse(row))
        if not tokens.supervised:
            raise ValueError("the tokenizer makes no token with a loss of it")
        return tokens

    counts = Counts()
    rows = usable(source.rows, parse, source=source.name, unit=source.unit, hint=encoder.hint)
    digest = hashlib.sha256()
    kept = _cut(rows, max_length, counts, digest)
    schema = encoder.schema
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            while chunk := list(islice(kept, _ROWS_AT_A_TIME)):
                columns = [[getattr(row, name) for row in chunk] for name in schema.names]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        if not counts.rows:
            raise CliError(
                f"the completion of every row of {source.name} lies beyond token {max_length}; "
                "raise --max-length"
                if counts.left_out
                else f"{source.name} has no rows"
            )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    counts.digest = digest.hexdigest()
    return counts


def _cut(rows: Iterator[Tokens], max_length: int, counts: Counts, digest: Any) -> Iterator[Tokens]:
    """Yield what is left of the rows after the cut; count and digest it."""
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
        digest.update(array("i", [len(tokens.input_ids), *tokens.input_ids, *tokens.labels]))
        yield tokens


def read_examples(source: Source, tokenizer: Any, *, max_length: int) -> tuple[Dataset, Counts]:
    """Return the tokens of a source of examples, mapped into memory.

    Raises:
        CliError: A row is bad, or there is none.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "tokens"
        counts = prepare(source, example_encoder(tokenizer), max_length=max_length, path=path)
        # What is mapped into memory outlives its file, where the system can do that at all.
        return Dataset.from_file(str(path)), counts


class Collator:
    """Pads rows on the right, whatever side and token the tokenizer generates with."""

    def __init__(self, padding: int) -> None:
        self._padding = padding

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, tokens of the longest row)."""
        ids, labels = (
            [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels")
        )
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._padding),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }
