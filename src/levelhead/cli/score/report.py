"""What `levelhead score` prints: how right the model was, how sure, and how far the two lie apart."""

import math
from collections.abc import Iterator
from itertools import compress
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from levelhead.calibration import auroc, calibration_error


def show(path: Path) -> None:
    """Print the results in a score file, by group if it has several, and what they mean."""
    names = [name for name in parquet.read_schema(path).names if name in _WANTED]
    scores = parquet.read_table(path, columns=names)
    console = Console()
    console.print(_table(scores), _notes(scores), sep="\n")
    console.print(f"Scores: [bold]{escape(str(path))}[/]", soft_wrap=True)


_WANTED = ("group", "correct", "confidence", "argmax_is_choice")


def _table(scores: pa.Table) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for name in ("questions", "accuracy", "mean confidence", "ECE", "AUROC"):
        shown.add_column(name, justify="right")
    confidence, correct = (scores[name].to_pylist() for name in ("confidence", "correct"))
    groups = scores["group"].to_pylist() if "group" in scores.column_names else []
    names = sorted(set(groups), key=lambda name: (name is None, name))
    for name in names if len(names) > 1 else ():
        member = [group == name for group in groups]
        cells = _cells(list(compress(confidence, member)), list(compress(correct, member)))
        shown.add_row("no group" if name is None else escape(name), *cells)
    shown.add_row("all", *_cells(confidence, correct))
    return shown


def _notes(scores: pa.Table) -> str:
    is_choice = scores["argmax_is_choice"].to_pylist()
    others = 1 - sum(is_choice) / len(is_choice)
    note = "ECE: 10 bins of equal width. AUROC: how well confidence tells right answers from wrong."
    if others:
        note += (
            f"\nFor {others:.1%} of the questions the model's likeliest token is not the letter that "
            "counts as its answer (argmax_is_choice); there, msp is the probability of that token."
        )
    return note


def _cells(confidence: list[float], correct: list[bool]) -> Iterator[str]:
    yield f"{len(correct):,}"
    yield f"{sum(correct) / len(correct):.3f}"
    yield f"{sum(confidence) / len(confidence):.3f}"
    yield f"{calibration_error(confidence, correct):.3f}"
    area = auroc(confidence, correct)
    yield "-" if math.isnan(area) else f"{area:.3f}"  # all right, or all wrong: no pair to order
