"""The `levelhead` command. A file or a folder per verb; each imports its optional packages when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence

from levelhead import __version__

from . import bench, capacity, demo, doctor, plan, report, score, sft, teacher, temperature
from .errors import CliError

_VERBS = (demo, sft, teacher, score, report, capacity, temperature, plan, bench, doctor)
_EPILOG = """\
examples:
  levelhead demo --seeds 1
  levelhead sft tiny questions.jsonl --output run
  levelhead teacher tiny questions.jsonl -o store
  levelhead score tiny questions.jsonl -o scores.parquet
  levelhead report scores.parquet
  levelhead capacity run questions.jsonl
  levelhead temperature run held-out.jsonl --output calibrated
  levelhead bench tiny
  levelhead plan tiny --tokens 4096 --gpus 8 --zero 3
  levelhead doctor

exit codes:
  0    done
  1    doctor, bench: a result is wrong on this machine; elsewhere an error with a traceback
  2    wrong arguments, unusable input, or a missing optional package; stderr says which
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: The arguments after the program's name; None takes them from the command line.

    Returns:
        The exit code, as documented in `levelhead --help`.

    Raises:
        SystemExit: From argparse, for --help and --version (0) and wrong arguments (2).
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CliError as error:
        _say(arguments.verb, f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say(arguments.verb, "interrupted")
        return 130
    return 0


def _say(verb: str, message: str) -> None:
    """Prints to stderr; of several processes under a launcher, one is enough."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"levelhead {verb}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="levelhead",
        description="Language models that know what they don't know.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"levelhead {__version__}")
    # What the launcher of DeepSpeed puts before our arguments; the environment says it too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser
