"""`levelhead teacher`: what a teacher finds likely at each position of its students' data."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_batch_size, add_data, add_model, add_rows, count
from ..errors import missing_extra

_PACKAGES = {"datasets", "jinja2", "pyarrow", "rich", "transformers"}
_DESCRIPTION = """\
Reads the data as `levelhead sft` does and stores, for every token that has a loss, the
teacher's k most likely tokens and their log-probabilities over its whole vocabulary. A
student learns from the store with `levelhead sft MODEL DATA --teacher STORE`.

With --validation, the k probabilities are recalibrated as FIRST does (Shum et al. 2024,
https://arxiv.org/abs/2408.12168): by the temperature, or the smoothing, under which the
teacher's confidence on held-out data is nearest to its accuracy. The store keeps the
probabilities as they were, and what was chosen beside them.

The same command goes on where it was interrupted; several processes share the work.
"""
_EPILOG = """\
examples:
  levelhead teacher tiny train.jsonl -o teacher --validation held-out.jsonl
  levelhead sft tiny train.jsonl --teacher teacher --output student
  accelerate launch --num_processes 2 -m levelhead teacher MODEL DATA -o STORE

STORE receives manifest.json, and for every 1000 rows an Arrow file with its digest.
"""


def add_parser(verbs: Any) -> None:
    """Adds `teacher` to the verbs of the command."""
    parser = verbs.add_parser(
        "teacher",
        help="store a teacher's most likely tokens, for a student to learn from",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data, forced, group = map(parser.add_argument_group, ("data", "pass", "recalibration"))
    add_model(parser, forced)
    add_data(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="STORE", help="folder for the store"
    )
    _add_data(data)
    _add_pass(forced)
    group.add_argument(
        "--validation", metavar="DATA", help="held-out data to recalibrate the teacher on"
    )
    group.add_argument(
        "--validation-split",
        default="test",
        metavar="NAME",
        help="of --validation, if it is a data set given by name (default: %(default)s)",
    )
    group.add_argument(
        "--recalibrate",
        choices=("temperature", "smoothing"),
        default="temperature",
        help="what to choose on --validation: a temperature of the k probabilities, or how much to "
        "move from the largest to the others (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--max-length",
        type=count,
        default=1024,
        metavar="TOKENS",
        help="cut rows to this length; the student needs the same (default: %(default)s)",
    )
    add_rows(group)


def _add_pass(group: Any) -> None:
    group.add_argument("--top-k", type=count, default=5, metavar="K", help="(default: %(default)s)")
    add_batch_size(group)
    group.add_argument("--bf16", action="store_true", help="load the teacher in bfloat16")


def run(arguments: argparse.Namespace) -> None:
    """Makes the store, or goes on with it.

    Raises:
        CliError: An optional package is missing, an argument or the data cannot be used, or the
            model is refused.
    """
    try:
        from .making import make_store
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    make_store(arguments)
