"""`levelhead score`: multiple-choice questions through a model, with all that its confidence may be."""

import argparse
from pathlib import Path
from typing import Any, get_args

from levelhead.scoring.prompts import Phrasing
from levelhead.scoring.scores import Confidence

from ..arguments import (
    add_batch_size,
    add_data,
    add_model,
    add_rows,
    count,
    options_of,
    set_defaults_of,
)
from ..errors import missing_extra
from .options import Options

_PACKAGES = {"accelerate", "datasets", "jinja2", "pyarrow", "rich", "transformers"}
_DESCRIPTION = """\
Asks a causal language model multiple-choice questions and writes down, for each, its answer
and how sure it was: the largest probability and the largest logit over the whole vocabulary
where it predicts the letter of its answer, the probability among the letters alone, and the
entropy. One forward pass a question; the logits are never kept.

The options are shuffled, each question's in the same way for every model.
"""
_EPILOG = """\
examples:
  levelhead score tiny questions.jsonl -o scores.parquet
  levelhead score Qwen/Qwen2.5-0.5B-Instruct cais/mmlu --dataset-config all --bf16 -o mmlu.parquet
  accelerate launch --num_processes 2 -m levelhead score MODEL DATA -o scores.parquet

rows of DATA, one a line in JSON lines, or columns of the same names; the answer is a letter, an
index from 0 or the text of a choice; "id" and "group" (or "subject") are optional:
  {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "id": "s1", "group": "sums"}

SCORES has a row per question, and the settings as JSON under "levelhead" in the metadata of its
schema. If any row is bad or longer than the model can read, nothing is scored: all are counted,
and the first twenty named with the reason. Nothing is ever cut.
"""


def add_parser(verbs: Any) -> None:
    """Add `score` to the verbs of the command."""
    parser = verbs.add_parser(
        "score",
        help="ask a model multiple-choice questions, and write down how sure it was",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    questions, model = map(parser.add_argument_group, ("questions", "model"))
    add_model(parser, model)
    add_data(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="SCORES",
        help="Parquet file for the results; replaced, once all is done, if it is there",
    )
    questions.add_argument(
        "--phrasing",
        choices=get_args(Phrasing),
        help="which of two ways to ask; the second ends with 'Answer:' (default: %(default)s)",
    )
    order = questions.add_mutually_exclusive_group()
    order.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the order of the options (default: %(default)s)",
    )
    order.add_argument(
        "--no-shuffle",
        dest="seed",
        action="store_const",
        const=None,
        help="leave the options in the order of the data",
    )
    questions.add_argument(
        "--no-chat-template",
        action="store_true",
        help="ask in plain text, even if the tokenizer has a chat template",
    )
    questions.add_argument(
        "--max-length",
        type=count,
        metavar="TOKENS",
        help="refuse questions with longer prompts (default: what the model can read)",
    )
    add_rows(questions, split="test")

    model.add_argument(
        "--confidence",
        choices=get_args(Confidence),
        help="what the column 'confidence' shall be: the largest probability over the whole "
        "vocabulary, or over the letters alone (default: %(default)s)",
    )
    add_batch_size(model, "questions per device and forward pass")
    model.add_argument("--bf16", action="store_true", help="load the weights in bfloat16")
    set_defaults_of(parser, Options)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score and print.

    Raises:
        CliError: An optional package is missing, an argument or the data cannot be used, or the
            model is refused; nothing was written.
    """
    try:
        from .report import show
        from .scoring import score
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    path = score(options_of(Options, arguments))
    if path is not None:
        show(path)
