"""Arguments that several verbs take, and their types; argparse prints what those raise."""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

OptionsT = TypeVar("OptionsT")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def share(text: str) -> float:
    """Return a number in [0, 1]."""
    return _number(text, lambda x: 0 <= x <= 1, "in [0, 1]", "; a common choice is 0.1")


def positive(text: str) -> float:
    """Return a finite number above 0."""
    return _number(text, lambda x: 0 < x < math.inf, "above 0")


def weight(text: str) -> float:
    """Return a finite number from 0 on."""
    return _number(text, lambda x: 0 <= x < math.inf, "from 0 on")


def count(text: str) -> int:
    """Return a whole number from 1 on."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return value


def _number(text: str, valid: Callable[[float], bool], where: str, advice: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"must be a number {where}, got {text!r}{advice}")
    return value


def set_defaults_of(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Take the defaults of a verb's arguments from the dataclass that they become."""
    known = {field.name: field.default for field in fields(options)}
    parser.set_defaults(**{name: x for name, x in known.items() if x is not MISSING})


def options_of(options: type[OptionsT], arguments: argparse.Namespace) -> OptionsT:
    """Return the parsed arguments of a verb as a dataclass with a field for each."""
    values = vars(arguments)
    return options(**{field.name: values[field.name] for field in fields(options)})  # type: ignore[arg-type]


def add_model(parser: Any, options: Any = None, *, optional: bool = False) -> None:
    """Add MODEL, and to `options`, a group of them, whether its own code may run."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="name on the model hub, folder, or 'tiny': a small Llama with random weights that "
        "reads bytes, to try the command offline",
    )
    (options or parser).add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (default: refuse)",
    )


def add_dtype(parser: Any, default: str) -> None:
    """Add the dtype of a head, a key of DTYPES."""
    parser.add_argument("--dtype", choices=DTYPES, default=default, help="(default: %(default)s)")


def add_data(parser: Any) -> None:
    """Add DATA."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help=".jsonl or .parquet file, or name or folder of a data set for datasets.load_dataset",
    )


def add_rows(group: Any, split: str = "train") -> None:
    """Add which rows of DATA are meant, and how chats become text."""
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template for chats, in place of the tokenizer's",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="of a data set given by name")
    group.add_argument(
        "--dataset-split",
        default=split,
        metavar="NAME",
        help=f"of a data set given by name, for example {split}[:95%%] (default: %(default)s)",
    )


def add_batch_size(group: Any, what: str = "rows per forward pass") -> None:
    """Add how many rows are read at a time."""
    group.add_argument(
        "--batch-size",
        type=count,
        default=8,
        metavar="N",
        help=f"{what} (default: %(default)s)",
    )


def add_reading(group: Any) -> None:
    """Add what says which tokens of DATA a model reads, and how many at a time."""
    group.add_argument(
        "--max-tokens",
        type=count,
        default=65_536,
        metavar="N",
        help="stop after N tokens that count: one hidden state is kept in memory for each "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-length",
        type=count,
        default=1024,
        metavar="TOKENS",
        help="cut rows to this length, and texts into pieces of it (default: %(default)s)",
    )
    add_batch_size(group)
    add_rows(group)
    group.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="of the order in which rows are read (default: %(default)s)",
    )
