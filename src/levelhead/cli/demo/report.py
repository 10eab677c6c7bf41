"""What the demo found, as numbers, as a table and as a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from levelhead.calibration import ReliabilityTable, reliability

from .training import Answers

BINS = 10
_COLOURS = {"dense": "#8d99ae", "fused": "#2a6f97"}
_GAP_COLOUR = "#d1495b"


@dataclass(frozen=True)
class Measures:
    """What a model's held-out answers are worth.

    Attributes:
        accuracy: Share of right tokens.
        nll: Nats per token.
        ece: Expected calibration error.
        confidence: Its mean.
        reliability: Edges, count, confidence and accuracy of the table behind the ECE; None in empty bins.
        step_seconds: Median time of a training step.
    """

    accuracy: float
    nll: float
    ece: float
    confidence: float
    reliability: dict[str, list[float | None]]
    step_seconds: float


@dataclass(frozen=True)
class Data:
    """What was learnt, and the numbers of its rows and token ids."""

    source: str
    rows: int
    training: int
    held_out: int
    vocabulary: int


@dataclass(frozen=True)
class Seed:
    """A repetition: its own split, weights and order."""

    seed: int
    dense: Measures
    fused: Measures


@dataclass(frozen=True)
class Results:
    """What is in results.json.

    Attributes:
        settings: The smoothing, the bins of the calibration error, and the fields of `Recipe`.
        measured_batch: Rows, width and labels of the batch that memory was measured on.
        loss_peak_bytes: As `loss_peaks`.
    """

    levelhead: str
    torch: str
    transformers: str
    python: str
    platform: str
    cpu_count: int | None
    threads: int
    device: str
    data: Data
    settings: dict[str, float]
    seeds: list[Seed]
    measured_batch: dict[str, int]
    loss_peak_bytes: dict[str, int | None]
    wall_seconds: float


def measures(answers: Answers, step_seconds: float) -> Measures:
    """Return the measures of a model's answers."""
    table = reliability(answers.confidence, answers.correct, bins=BINS)
    columns = {name: getattr(table, name) for name in ("edges", "count", "confidence", "accuracy")}
    return Measures(
        accuracy=answers.correct.double().mean().item(),
        nll=answers.nll.mean().item(),
        ece=table.error(),
        confidence=answers.confidence.mean().item(),
        reliability={
            name: [None if math.isnan(value) else value for value in column.tolist()]
            for name, column in columns.items()
        },
        step_seconds=step_seconds,
    )


@dataclass(frozen=True)
class _Row:
    """A line of the table: a measure, its unit, and which direction is an improvement."""

    label: str
    name: str
    better: Literal["higher", "lower", "neither"]
    scale: float = 1.0
    digits: int = 3


_ROWS = (
    _Row("accuracy", "accuracy", "higher"),
    _Row("NLL (nats)", "nll", "lower"),
    _Row("ECE", "ece", "lower"),
    _Row("mean confidence", "confidence", "neither"),
    _Row("time per step (ms)", "step_seconds", "lower", scale=1e3, digits=1),
)
_MEMORY = _Row("peak memory of the loss (MiB)", "", "lower", scale=2**-20, digits=1)


def show(results: Results, output: Path) -> None:
    """Print the results, what exactly they are, and where the files are."""
    console = Console()
    console.print(_table(results), _notes(results), sep="\n")
    console.print(
        f"\n{results.wall_seconds:.0f} seconds. Reliability diagram and all numbers:\n"
        f"  [bold]{escape(str(output / 'reliability.png'))}[/]\n"
        f"  [bold]{escape(str(output / 'results.json'))}[/]",
        soft_wrap=True,
    )


def _table(results: Results) -> Table:
    """Return dense against fused: the mean over the seeds, and their standard deviation."""
    view = Table(title="Held-out answers, and what training cost", title_justify="left")
    view.add_column("")
    view.add_column("dense\nhard targets", justify="right")
    view.add_column(f"fused\nsmoothing {results.settings['smoothing']:g}", justify="right")
    view.add_column("\nchange", justify="right")
    for row in _ROWS:
        dense = [getattr(seed.dense, row.name) for seed in results.seeds]
        fused = [getattr(seed.fused, row.name) for seed in results.seeds]
        view.add_row(*_cells(row, dense, fused))
    peaks = results.loss_peak_bytes
    if peaks["dense"] is None or peaks["fused"] is None:
        view.add_row(_MEMORY.label, "not measured", "not measured", "")
    else:
        view.add_row(*_cells(_MEMORY, [peaks["dense"]], [peaks["fused"]]))
    return view


def _cells(row: _Row, dense: Sequence[float], fused: Sequence[float]) -> tuple[str, str, str, str]:
    return row.label, _summary(row, dense), _summary(row, fused), _change(row, dense, fused)


def _summary(row: _Row, values: Sequence[float]) -> str:
    mean = f"{row.scale * fmean(values):.{row.digits}f}"
    return f"{mean} ± {row.scale * stdev(values):.{row.digits}f}" if len(values) > 1 else mean


def _change(row: _Row, dense: Sequence[float], fused: Sequence[float]) -> str:
    """Return the difference of the means; in colour if every seed agrees on the direction."""
    difference = fmean(fused) - fmean(dense)
    text = f"{row.scale * difference:+.{row.digits}f}"
    rises = {after > before for before, after in zip(dense, fused, strict=True)}
    if row.better == "neither" or len(rises) > 1 or dense == fused:
        return text
    return f"[{'green' if rises == {row.better == 'higher'} else 'red'}]{text}[/]"


def _notes(results: Results) -> str:
    seeds, batch = len(results.seeds), results.measured_batch
    spread = (
        f"Mean ± standard deviation over {seeds} seeds; green is better and red is worse in every "
        "one of them.\n"
    )
    return (
        f"{spread if seeds > 1 else ''}Confidence is the largest probability over the whole vocabulary; ECE has "
        f"{BINS} bins of equal width.\n"
        "Time per step is forward, backward and update: the median after warm-up.\n"
        "Peak memory of the loss is what head and loss need, forward and backward, beyond the "
        "hidden states, the head's weight and the gradients of both, on the widest batch: "
        f"{batch['rows']} rows of {batch['width']} tokens, {batch['labels']} of them with a label. "
        "The dense model makes logits for every token, as it comes from transformers; "
        "the patched one works on the tokens with a label alone, a chunk at a time."
    )


def draw_reliability(
    answers: dict[str, list[Answers]], eces: dict[str, list[float]], smoothing: float, path: Path
) -> None:
    """Draw the reliability diagram of both models, the predictions of all seeds pooled."""
    titles = {"dense": "hard targets", "fused": f"smoothing {smoothing:g}"}
    figure = Figure(figsize=(9, 5.4), dpi=160, layout=ConstrainedLayoutEngine(wspace=0.06))
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, (name, given) in enumerate(answers.items()):
        pooled = reliability(
            torch.cat([of_seed.confidence for of_seed in given]),
            torch.cat([of_seed.correct for of_seed in given]),
            bins=BINS,
        )
        title = f"{titles[name]}   ECE {fmean(eces[name]):.3f}"
        grid[0, column].set_title(title, loc="left", fontweight="bold")
        _draw_accuracy(grid[0, column], pooled, _COLOURS[name])
        _draw_counts(grid[1, column], pooled, _COLOURS[name])
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("answers")
    grid[0, 1].legend(loc="upper left", frameon=False)
    figure.savefig(path)


def _draw_accuracy(axes: Axes, pooled: ReliabilityTable, colour: str) -> None:
    """Draw bars as high as the accuracy; the gap to the mean confidence hatched, the ideal dotted."""
    filled = pooled.count > 0
    left, width = pooled.edges[:-1][filled].numpy(), 1 / BINS
    accuracy, confidence = pooled.accuracy[filled].numpy(), pooled.confidence[filled].numpy()
    axes.bar(left, accuracy, width, align="edge", color=colour, edgecolor="white", label="accuracy")
    axes.bar(
        left,
        confidence - accuracy,
        width,
        bottom=accuracy,
        align="edge",
        facecolor="none",
        edgecolor=_GAP_COLOUR,
        hatch="////",
        linewidth=0,
        label="gap to confidence",
    )
    axes.plot([0, 1], [0, 1], ":", color="black", label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_counts(axes: Axes, pooled: ReliabilityTable, colour: str) -> None:
    left = pooled.edges[:-1].numpy()
    bars = axes.bar(
        left, pooled.count.numpy(), 1 / BINS, align="edge", color=colour, edgecolor="white"
    )
    axes.bar_label(bars, fontsize=7, padding=2, color="#444444")
    axes.margins(y=0.25)
    axes.set_xlabel("confidence")
    axes.spines[["top", "right"]].set_visible(False)
