"""The measurements for people: a table for each mode; needs rich."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .contest import LOSSES, TORCH, Outcome


def show(facts: dict[str, Any], rows: list[Outcome]) -> None:
    """Prints what was measured and the tables."""
    console = Console()
    name = "" if facts["model"] is None else f"{facts['model']}: "
    console.print(
        escape(
            f"{name}head {facts['vocabulary']} x {facts['hidden']}, {facts['dtype']}, label smoothing "
            f"{facts['smoothing']:g}; {facts['tokens']} tokens ({facts['tokens_are']}); {facts['device']}, "
            f"{facts['threads']} threads, torch {facts['torch']}"
        ),
        highlight=False,
    )
    for mode in dict.fromkeys(row.mode for row in rows):
        table = Table(title=mode, title_justify="left")
        table.add_column("head and loss", no_wrap=True)
        for column in ("median", "20 % to 80 %", "extra memory", "time", "memory"):
            table.add_column(column)
        dense, *_ = own = [row for row in rows if row.mode == mode]
        for row in own:
            table.add_row(row.method, *_cells(row, dense))
        console.print(table)
        for row in own:
            if row.failure:
                console.print(f"{row.method}: {escape(row.failure)}", highlight=False)
    console.print(
        "Extra memory: the peak beyond inputs and gradients. Last columns: shares of dense. Each result "
        "was checked first.",
        highlight=False,
    )
    if facts["smoothing"] and TORCH in LOSSES:
        console.print(
            f"{TORCH} has no label smoothing: it falls back to dense logits.", highlight=False
        )


def _cells(row: Outcome, dense: Outcome) -> list[str]:
    """What stands beside the method: times, memory, and what they are of the dense ones."""
    if row.ms_p20 is None or row.ms_p50 is None or row.ms_p80 is None:
        return ["out of memory" if row.failure.startswith("out of memory") else "[red]failed[/]"]
    size = row.extra_bytes
    memory = "not measurable here" if size is None else f"{size / 2**20:.1f} MiB"
    cells = [f"{_ms(row.ms_p50)} ms", f"{_ms(row.ms_p20)} to {_ms(row.ms_p80)}", memory]
    if dense.ms_p50:
        cells.append(f"{row.ms_p50 / dense.ms_p50:.2f} x")
    if dense.extra_bytes and size is not None:
        cells.append(f"{size / dense.extra_bytes:.2g} x")
    return cells


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
