"""The folder that a verb writes its results to, and goes on with."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import CliError


def make_folder(path: Path) -> None:
    """Make a folder if it is not there.

    Raises:
        CliError: It cannot be made, or nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise CliError(f"cannot write to the folder {path}; name another one with --output")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON for people and programs alike."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def changed_settings(path: Path, settings: Mapping[str, object]) -> str:
    """Return which settings are not those in the file `path`, with both values; empty: none.

    Raises:
        CliError: The file cannot be read.
    """
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CliError(f"cannot go on: {path} cannot be read: {error}") from error
    return ", ".join(
        f"{name} (was {before.get(name)}, is {value})"
        for name, value in settings.items()
        if value != before.get(name)
    )
