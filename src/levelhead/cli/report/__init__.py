"""`levelhead report`: whether confidence means anything, from answers that were graded."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..arguments import count
from ..errors import missing_extra

_DESCRIPTION = """\
Measures calibration and ranking of graded answers, with intervals, per group and over
all; draws reliability diagrams, risk-coverage and payoff curves; writes a page to read
and results.json. Large files are read in pieces.
"""
_EPILOG = """\
examples:
  levelhead report scores.parquet
  levelhead report before.parquet after.parquet --compare before after
  levelhead report answers.csv --confidence p --correct ok --by model --within dataset
  levelhead report out/MODEL/samples_*.jsonl --json

files:
  .parquet   what `levelhead score` writes, or any table with a row per answer
  .csv .tsv  a row per answer, names of the columns in the first
  .jsonl     an object per answer, or samples of lm-evaluation-harness (--log_samples);
             of those, confidence is the softmax over the likelihoods of the choices

A row holds a confidence (or score, msp, probability, max_logit) and whether the answer was
correct (or grade, is_correct, acc): true or false, 1 or 0, correct, wrong or unparseable,
which counts as wrong. Columns of text with few values are groups; a column score_kind
tells scores of several kinds apart. Scores outside [0, 1] are ranked, not calibrated.
"""


def add_parser(verbs: Any) -> None:
    """Adds `report` to the verbs of the command."""
    parser = verbs.add_parser(
        "report",
        help="see whether confidence means anything, from graded answers",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="graded answers")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for page, pictures and numbers (default: levelhead-report; none with --json)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the numbers as JSON, and nothing else"
    )
    _add_columns(parser.add_argument_group("columns"))
    _add_measures(parser.add_argument_group("measures"))
    parser.set_defaults(run=run)


def _add_columns(group: Any) -> None:
    group.add_argument("--confidence", metavar="COLUMN", help="the score of each answer")
    group.add_argument("--correct", metavar="COLUMN", help="whether it was right")
    group.add_argument(
        "--by",
        metavar="COLUMN",
        help="rows of the main table; file stands for the file (default: model, or file, or the "
        "first group)",
    )
    group.add_argument(
        "--within",
        metavar="COLUMN",
        action="append",
        default=[],
        help="strata of each row, over which accuracy and AUROC are averaged and significant ones "
        "counted; may be repeated (default: all other groups)",
    )
    group.add_argument(
        "--where",
        metavar="COLUMN=VALUE",
        type=_condition,
        action="append",
        default=[],
        help="only rows that hold this value; may be repeated",
    )


def _add_measures(group: Any) -> None:
    group.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two rows of the main table, and the differences B - A with intervals (default: if "
        "there are just two)",
    )
    group.add_argument(
        "--bins",
        type=count,
        default=10,
        metavar="N",
        help="of equal width, for the calibration error (default: %(default)s)",
    )
    group.add_argument(
        "--labels",
        type=count,
        default=100,
        metavar="N",
        help="labelled answers that a threshold is learned from, spread over the strata "
        "(default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE, got {text!r}")
    return column, value


def run(arguments: argparse.Namespace) -> None:
    """Reads, measures and reports.

    Raises:
        CliError: An optional package is missing, a file or an argument cannot be used, or the output
            folder cannot be written.
    """
    try:
        from .report import report

        if arguments.output or not arguments.json:
            _need("matplotlib")  # last, but better missed first
    except ModuleNotFoundError as error:
        raise missing_extra(error, "report", {"matplotlib", "numpy", "pyarrow", "rich"}) from error
    report(arguments)


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(name=package)
