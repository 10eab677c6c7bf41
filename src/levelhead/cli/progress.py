"""The terminal of verbs that take long; needs rich."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def main_console() -> Console:
    """Return a console that prints in the first of the processes that a launcher started."""
    return Console(quiet=os.environ.get("RANK", "0") != "0")


def progress_bar(console: Console, unit: str = "steps") -> Progress:
    """Return a bar that counts optimiser steps, or something else."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
    )
