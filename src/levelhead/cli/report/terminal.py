"""The report in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as View

from .tables import Cell, Table, comparison_table, main_table, payoff_table
from .words import findings

Numbers = dict[str, Any]


def show(results: Numbers, folder: Path | None) -> None:
    """Prints findings, the main table, the comparison, and what was written."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(results['title'])}[/]\n{escape(results['subtitle'])}\n")
    first = next(iter(results["scores"].values()))
    for sentence in findings(first, results["by"]):
        console.print(f"• {escape(sentence)}")
    console.print()
    _print(console, main_table(results["scores"], results["by"]))
    if (payoff := payoff_table(first, results["by"])) is not None:
        console.print("Points per question, and the share of questions withheld")
        _print(console, payoff)
    for note in results["notes"]:
        console.print(escape(note), style="dim")
    if (comparison := results["comparison"]) is not None:
        console.print(f"\n{escape(comparison['how'])}")
        _print(console, comparison_table(comparison))
    if folder is not None:
        console.print(f"\nTo read: {escape(str(folder / 'report.html'))}", soft_wrap=True)
        console.print(f"Numbers: {escape(str(folder / 'results.json'))}", soft_wrap=True)


def _print(console: Console, table: Table) -> None:
    """A table that is too wide for the terminal wraps there: no digit is cut off."""
    view = _view(table)
    needed = console.measure(view, options=console.options.update(width=1000)).maximum
    Console(width=max(needed, console.width), highlight=False).print(view)
    console.print()


def _view(table: Table) -> View:
    view = View(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for index, cell in enumerate(table.head):
        view.add_column(_text(cell), justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(table.rows):
        if table.total and index == len(table.rows) - 1:
            view.add_row()
        view.add_row(*map(_text, row))
    return view


def _text(cell: Cell) -> str:
    small = f"\n[dim]{escape(cell.small)}[/]" if cell.small else ""
    return escape(cell.text) + small
