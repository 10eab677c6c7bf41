"""`levelhead capacity`: can this head become over-confident at all, and will smoothing act on it?"""

import argparse
import sys
from typing import Any

from ..arguments import add_model, add_reading, options_of, positive, set_defaults_of, share
from ..errors import missing_extra
from .options import Options

_PACKAGES = {"accelerate", "datasets", "jinja2", "peft", "pyarrow", "rich", "transformers"}
_DESCRIPTION = """\
Says whether the output head of a causal language model can become over-confident at all.
Smoothed labels pull every token towards one finite margin of its logit over the others; a
head whose weights and hidden states cannot spread its logits that far is never more
confident than the smoothed target, and smoothing does nothing for it.

Without DATA the bound is that of the final norm of the model, for all inputs. With DATA it
is also that of the hidden states seen, beside the confidence that the model shows there.
All of it holds for the weights as they are; training changes them.
"""
_EPILOG = """\
examples:
  levelhead capacity tiny
  levelhead capacity Qwen/Qwen2.5-0.5B text.txt
  levelhead capacity run questions.jsonl --temperature 0.5 --json

DATA is a UTF-8 text (.txt), of which every token counts, or rows as `levelhead sft` takes
them, of which the completions count.
"""


def add_parser(verbs: Any) -> None:
    """Add `capacity` to the verbs of the command."""
    parser = verbs.add_parser(
        "capacity",
        help="say whether a model can become over-confident, so that smoothing has an effect",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help=".txt, .jsonl or .parquet file, or name or folder of a data set for "
        "datasets.load_dataset",
    )
    group = parser.add_argument_group("training to judge, as of levelhead sft")
    group.add_argument(
        "--smoothing",
        type=share,
        metavar="EPS",
        help="share of probability spread over the vocabulary (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=positive,
        metavar="T",
        help="logits are divided by T (default: %(default)s)",
    )
    group.add_argument(
        "--softcap",
        type=positive,
        metavar="C",
        help="logits are capped to C * tanh(logits / C)",
    )
    add_reading(parser.add_argument_group("reading"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    set_defaults_of(parser, Options)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        CliError: An optional package is missing, or the model or the data cannot be used.
    """
    try:
        from .measure import capacity
        from .view import show
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    report = capacity(options_of(Options, arguments))
    if arguments.json:
        sys.stdout.write(report.as_json() + "\n")
    else:
        show(report)
