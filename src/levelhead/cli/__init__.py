"""The `levelhead` command. One file per verb; each imports its optional packages when it runs."""

import argparse
import sys
from collections.abc import Sequence

from levelhead import __version__

from . import demo
from .errors import CliError

_VERBS = (demo,)
_EPILOG = """\
example:
  levelhead demo --seeds 1

exit codes:
  0    done
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
        sys.stderr.write(f"levelhead {arguments.verb}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"levelhead {arguments.verb}: interrupted\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="levelhead",
        description="Language models that know what they don't know.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"levelhead {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser
