"""What a field of a row of data may hold, in the terms of JSON, which people write."""

from typing import Any


def check_text(name: str, text: Any) -> str:
    """Return the text that a field holds, as it is; `name` is what an error calls the field.

    Raises:
        ValueError: It holds no string, a blank one or one that is not Unicode.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is not a string but {json_type(text)}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no UTF-8 holds
        raise ValueError(
            f"{name} has half a surrogate pair at character {error.start + 1}"
        ) from error
    return text


def json_type(value: object) -> str:
    """Return what JSON calls the type of a value, with its article; of one that JSON has not, Python's name."""
    if value is None:
        return "null"
    names = {
        list: "an array",
        dict: "an object",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
