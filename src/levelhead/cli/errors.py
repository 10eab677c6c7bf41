"""What a verb raises when the user, not the code, has something to mend."""

from collections.abc import Set


class CliError(Exception):
    """A problem to print without a traceback: what is wrong, and what to do."""

    exit_code = 2


class WrongResultError(CliError):
    """Levelhead computes something wrong on this machine."""

    exit_code = 1


def missing_extra(error: ModuleNotFoundError, extra: str, packages: Set[str]) -> Exception:
    """What to raise for a failed import: for one of an extra's packages, how to install it.

    Any other module that is missing is a fault of the installation, and the error itself tells
    more about it.
    """
    package = (error.name or "").partition(".")[0]
    if package not in packages:
        return error
    return CliError(
        f"this needs {package}, which is not installed; run: pip install 'levelhead[{extra}]'"
    )
