"""`levelhead teacher`: store a teacher's most likely tokens at each position of its students' data."""

import argparse
from pathlib import Path
from typing import Any

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
    """Add `teacher` to the verbs of the command."""
    parser = verbs.add_parser(
        "teacher",
        help="store a teacher's most likely tokens, for a student to learn from",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data, reading, group = map(parser.add_argument_group, ("data", "pass", "recalibration"))
    add_model(parser, reading)
    add_data(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="STORE", help="folder for the store"
    )
    data.add_argument(
        "--max-length",
        type=count,
        metavar="TOKENS",
        help="cut rows to this length; the student needs the same (default: %(default)s)",
    )
    add_rows(data)
    reading.add_argument("--top-k", type=count, metavar="K", help="(default: %(default)s)")
    add_batch_size(reading)
    reading.add_argument("--bf16", action="store_true", help="load the teacher in bfloat16")
    group.add_argument(
        "--validation", metavar="DATA", help="held-out data to recalibrate the teacher on"
    )
    group.add_argument(
        "--validation-split",
        metavar="NAME",
        help="of --validation, if it is a data set given by name (default: %(default)s)",
    )
    group.add_argument(
        "--recalibrate",
        choices=("temperature", "smoothing"),
        help="what to choose on --validation: a temperature of the k probabilities, or how much to "
        "move from the largest to the others (default: %(default)s)",
    )
    set_defaults_of(parser, Options)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Record, and print what is in the store once it is finished.

    Raises:
        CliError: An optional package is missing, an argument or the data cannot be used, or the
            model is refused.
    """
    try:
        from .recording import record, show
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    options = options_of(Options, arguments)
    if manifest := record(options):
        show(manifest, options.output)
