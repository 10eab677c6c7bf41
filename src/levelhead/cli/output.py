"""The folder that a verb writes its results to."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import CliError


def make_folder(path: Path) -> None:
    """Makes a folder if it is not there.

    Raises:
        CliError: It cannot be made, or nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise CliError(f"cannot write to the folder {path}; name another one with --output")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON for people and programs alike."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
