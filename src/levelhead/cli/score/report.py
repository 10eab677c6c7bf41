"""What `levelhead score` prints: how right the model was, how sure, and how far the two lie apart."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet
from rich.markup import escape
from rich.table import Table

from levelhead.calibration import auroc, calibration_error


def table(path: Path) -> Table:
    """The results in a score file, by group if it has several."""
    columns = _columns(path)
    shown = Table(box=None, pad_edge=False)
    shown.add_column("")
    for name in ("questions", "accuracy", "mean confidence", "ECE", "AUROC"):
        shown.add_column(name, justify="right")
    groups = columns.get("group", [])
    names = sorted(set(groups), key=lambda name: (name is None, name))
    for name in names if len(names) > 1 else ():
        member = [group == name for group in groups]
        shown.add_row("no group" if name is None else escape(name), *_cells(columns, member))
    shown.add_row("all", *_cells(columns, [True] * len(columns["correct"])))
    return shown


def notes(path: Path) -> str:
    """How the numbers of the table are meant, and what the user should know about them."""
    columns = _columns(path)
    others = 1 - sum(columns["argmax_is_choice"]) / len(columns["argmax_is_choice"])
    lines = [
        "ECE: 10 bins of equal width. AUROC: how well confidence tells right answers from wrong."
    ]
    if others:
        lines.append(
            f"For {others:.1%} of the questions the model's likeliest token is not the letter that "
            "counts as its answer (argmax_is_choice); there, msp is the probability of that token."
        )
    return "\n".join(lines)


def _columns(path: Path) -> dict[str, list[Any]]:
    wanted = {"group", "correct", "confidence", "argmax_is_choice"}
    names = [name for name in parquet.read_schema(path).names if name in wanted]
    columns: dict[str, list[Any]] = parquet.read_table(path, columns=names).to_pydict()
    return columns


def _cells(columns: dict[str, list[Any]], member: list[bool]) -> Iterator[str]:
    confidence, correct = (
        [value for value, chosen in zip(columns[name], member, strict=True) if chosen]
        for name in ("confidence", "correct")
    )
    yield f"{len(correct):,}"
    yield f"{sum(correct) / len(correct):.3f}"
    yield f"{sum(confidence) / len(confidence):.3f}"
    yield f"{calibration_error(confidence, correct):.3f}"
    area = auroc(confidence, correct)
    yield "-" if math.isnan(area) else f"{area:.3f}"  # all right, or all wrong: no pair to order
