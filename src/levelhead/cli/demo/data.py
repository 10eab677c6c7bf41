"""What the demo learns: facts from Python's own `unicodedata`, or the user's prompts and completions.

Both are cut into words and punctuation marks, one token each. Nothing is downloaded: there is no
tokenizer to fetch, and the vocabulary is simply every word of the data.
"""

import random
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from levelhead.ops.checks import IGNORE_INDEX

from ..errors import CliError
from ..rows import json_object, lines, text_field, usable

MAX_TRAINING, MAX_HELD_OUT = 800, 2000  # what two cores manage in two minutes, over three seeds
MIN_ROWS = 50
MAX_WORDS = 256

_PAD, _PROMPT, _COMPLETION = range(3)  # the special tokens, before all words
_words = re.compile(r"\w+|[^\w\s]").findall


class Example(NamedTuple):
    """A question and its answer, as text."""

    prompt: str
    completion: str


class Tokens(NamedTuple):
    """An example as token ids: everything up to the answer, and the answer."""

    prompt: list[int]
    completion: list[int]


class Batch(NamedTuple):
    """Examples padded on the right to the longest of them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64; IGNORE_INDEX except at the tokens of the completion


def unicode_facts() -> list[Example]:
    """Return name of a character -> its general category, for the Basic Multilingual Plane.

    A category is partly a matter of rule (CAPITAL LETTER -> Lu) and partly of knowledge (is a
    vowel sign Mn or Mc?), so a small model gets most of them right and still has something to be
    unsure about. Names made by algorithm, which end in the code point or spell a Hangul syllable,
    are left out.
    """
    named = ((chr(code), unicodedata.name(chr(code), "")) for code in range(0x10000))
    return [
        Example(name, unicodedata.category(character))
        for character, name in named
        if name
        and not name.endswith(f"{ord(character):04X}")
        and not name.startswith("HANGUL SYLLABLE")
    ]


def read_jsonl(path: Path) -> list[Example]:
    """Return the {"prompt": ..., "completion": ...} objects of a file, one a line, blank lines skipped.

    Raises:
        CliError: The file cannot be read, any line is bad (all are named, the first twenty with
            their reason), or fewer than fifty rows are left.
    """
    examples = list(
        usable(
            lines(path),
            _parse,
            source=path,
            unit="line",
            hint='write each line as {"prompt": "...", "completion": "..."}',
        )
    )
    if len(examples) < MIN_ROWS:
        raise CliError(
            f"{path} has {len(examples)} rows, and the demo needs at least {MIN_ROWS}: a fifth is "
            "held out, and fewer than ten answers say nothing about calibration"
        )
    return examples


def _parse(line: bytes) -> Example:
    """Return the example on a line; ValueError says what is wrong with it."""
    row = json_object(line)
    example = Example(*(text_field(row, field) for field in Example._fields))
    length = sum(len(_words(text)) for text in example)
    if length > MAX_WORDS:
        raise ValueError(f"{length} words, and at most {MAX_WORDS} fit")
    return example


class Vocabulary:
    """Every word of the examples, in alphabetical order, after the special tokens.

    Words of the held-out examples belong to it too, as they would to any tokenizer made elsewhere;
    what the model has never trained on it cannot answer, and that counts as wrong.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        words = sorted({word for example in examples for text in example for word in _words(text)})
        self._ids = {word: index for index, word in enumerate(words, start=_COMPLETION + 1)}

    def __len__(self) -> int:
        return len(self._ids) + _COMPLETION + 1

    def encode(self, example: Example) -> Tokens:
        """Return the ids of an example, with a mark before its prompt and one before its completion."""
        prompt, completion = ([self._ids[word] for word in _words(text)] for text in example)
        return Tokens([_PROMPT, *prompt, _COMPLETION], completion)


def split(rows: Sequence[Tokens], seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Shuffle by the seed and cut: for training, and held out. At most a fifth is held out."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    held_out = min(MAX_HELD_OUT, len(rows) // 5)
    return shuffled[held_out : held_out + MAX_TRAINING], shuffled[:held_out]


def collate(rows: Sequence[Tokens], device: torch.device) -> Batch:
    """Pad rows to one batch, with labels at the tokens of the completions only."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), _PAD)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return Batch(input_ids.to(device), labels.to(device))
