"""What to fine-tune on: prompts and completions, or chats."""

from typing import Any, NamedTuple

from levelhead.scoring.fields import json_type

from ..rows import text_field

HINT = (
    'each row must have "prompt" and "completion", or "messages": a list of '
    '{"role": "user", "content": "..."} with one of role "assistant" at least'
)


class Pair(NamedTuple):
    """A text to go on from, and how it goes on."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """Messages as chat templates take them: dictionaries with "role" and "content"."""

    messages: list[dict[str, Any]]


def example(row: dict[str, Any]) -> Pair | Chat:
    """The example in a row.

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
    return {key: value for key, value in entry.items() if value is not None}  # as Parquet pads them
