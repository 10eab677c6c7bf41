"""The measurements for people: a table for each mode; needs rich."""

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from levelhead.measure.bench import LEFT_OUT, LOSSES, OUT_OF_MEMORY, TORCH, Bench, Outcome


def show(model: str | None, found: Bench) -> None:
    """Print what was measured and the tables."""
    console, problem, rows = Console(), found.problem, found.rows
    name = "" if model is None else f"{model}: "
    dtype = str(problem.dtype).removeprefix("torch.")
    console.print(
        escape(
            f"{name}head {problem.vocabulary} x {problem.hidden}, {dtype}, label smoothing "
            f"{found.smoothing:g}; {problem.tokens} tokens ({found.tokens_are}); {found.device}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        ),
        highlight=False,
    )
    for mode in dict.fromkeys(row.mode for row in rows):
        dense, *_ = own = [row for row in rows if row.mode == mode]
        rounds = max(row.rounds for row in own)
        table = Table(title=f"{mode}{_rounds(rounds)}", title_justify="left")
        table.add_column("head and loss", no_wrap=True)
        for column in ("median", "20 % to 80 %", "extra memory", "time", "memory"):
            table.add_column(column)
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
    if any(row.unweighed or row.failure.startswith(LEFT_OUT) for row in rows):
        console.print(
            "What was left out is measured with --tokens N, which may take longer; levelhead plan "
            "computes peaks.",
            highlight=False,
        )
    if found.smoothing and TORCH in LOSSES:
        console.print(
            f"{TORCH} has no label smoothing: it falls back to dense logits.", highlight=False
        )


def _cells(row: Outcome, dense: Outcome) -> list[str]:
    """Return the cells beside the method: times, memory, and their shares of the dense ones."""
    if row.ms_p20 is None or row.ms_p50 is None or row.ms_p80 is None:
        known = (what for what in (OUT_OF_MEMORY, LEFT_OUT) if row.failure.startswith(what))
        return [next(known, "[red]failed[/]")]
    size = row.extra_bytes
    memory = row.unweighed if size is None else f"{size / 2**20:.1f} MiB"
    cells = [f"{_ms(row.ms_p50)} ms", f"{_ms(row.ms_p20)} to {_ms(row.ms_p80)}", memory]
    if dense.ms_p50:
        cells.append(f"{row.ms_p50 / dense.ms_p50:.2f} x")
    if dense.extra_bytes and size is not None:
        cells.append(f"{size / dense.extra_bytes:.2g} x")
    return cells


def _rounds(count: int) -> str:
    if count > 1:
        return f", {count} rounds"
    return ", one run each: there was no time for rounds" if count else ""


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
