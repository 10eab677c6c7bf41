"""`levelhead demo`: what label smoothing does to a model's confidence, seen in two minutes."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import count, share
from ..errors import missing_extra

_DESCRIPTION = """\
Trains a small language model twice from the same start, once with hard targets and once
with smoothed ones through levelhead.patch_model, and compares how well the confidence of
each fits its accuracy on held-out data. Downloads nothing.

Writes reliability.png and results.json.
"""
_EPILOG = """\
examples:
  levelhead demo
  levelhead demo --data questions.jsonl --smoothing 0.05 --output my-run

questions.jsonl holds one object a line:
  {"prompt": "the capital of France is", "completion": "Paris"}
"""


def add_parser(verbs: Any) -> None:
    """Add `demo` to the verbs of the command."""
    parser = verbs.add_parser(
        "demo",
        help="see in two minutes what label smoothing does to a model's confidence",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON lines to learn (default: names and categories of Unicode characters)",
    )
    parser.add_argument(
        "--smoothing",
        type=share,
        default=0.1,
        metavar="EPS",
        help="share of probability spread over the vocabulary (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        default=3,
        metavar="N",
        help="repetitions, each with its own split, weights and order (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("levelhead-demo"),
        metavar="DIR",
        help="folder for the picture and the numbers (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the experiment and print what came of it.

    Raises:
        CliError: An optional package is missing, the data cannot be used, or the output folder
            cannot be written.
    """
    try:
        from .experiment import demo
        from .report import show
    except ModuleNotFoundError as error:
        raise missing_extra(error, "demo", {"matplotlib", "rich", "transformers"}) from error
    output: Path = arguments.output
    results = demo(
        arguments.data, smoothing=arguments.smoothing, seeds=arguments.seeds, output=output
    )
    show(results, output)
