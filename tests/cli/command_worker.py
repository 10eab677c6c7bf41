"""The command in a rank; Accelerate starts the process group."""

import contextlib
import io

from levelhead.cli import main


def command(*arguments: str) -> tuple[int, str, str]:
    """The exit code, and what went to stdout and stderr."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def start() -> None:
    pass


SCENARIOS = {"command": command}
