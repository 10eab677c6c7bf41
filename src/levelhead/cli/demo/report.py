"""What the demo found, as numbers, as a table and as a picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

from levelhead.calibration import ReliabilityTable, calibration_error, reliability

from .training import Answers

BINS = 10
NAMES = ("dense", "fused")
_COLOURS = {"dense": "#8d99ae", "fused": "#2a6f97"}
_GAP_COLOUR = "#d1495b"

Numbers = dict[str, Any]  # what goes into results.json


def metrics(answers: Answers) -> Numbers:
    """Accuracy, NLL (nats per token), ECE and mean confidence, and the table behind the ECE."""
    table = reliability(answers.confidence, answers.correct, bins=BINS)
    return {
        "accuracy": answers.correct.double().mean().item(),
        "nll": answers.nll.mean().item(),
        "ece": calibration_error(answers.confidence, answers.correct, bins=BINS),
        "confidence": answers.confidence.mean().item(),
        "reliability": {
            "edges": table.edges.tolist(),
            "count": table.count.tolist(),
            "confidence": _without_nan(table.confidence.tolist()),
            "accuracy": _without_nan(table.accuracy.tolist()),
        },
    }


def _without_nan(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]  # JSON has no NaN


@dataclass(frozen=True)
class _Row:
    """A line of the table: a measure, its unit, and which direction is an improvement."""

    label: str
    key: str
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


def table(results: Numbers) -> Table:
    """Dense against fused: the mean over the seeds, and their standard deviation."""
    smoothing = results["settings"]["smoothing"]
    view = Table(title="Held-out answers, and what training cost", title_justify="left")
    view.add_column("")
    view.add_column("dense\nhard targets", justify="right")
    view.add_column(f"fused\nsmoothing {smoothing:g}", justify="right")
    view.add_column("\nchange", justify="right")
    for row in _ROWS:
        view.add_row(
            *_cells(row, *([seed[n][row.key] for seed in results["seeds"]] for n in NAMES))
        )
    peaks = results["loss_peak_bytes"]
    if None in peaks.values():
        view.add_row(_MEMORY.label, "not measured", "not measured", "")
    else:
        view.add_row(*_cells(_MEMORY, *([peaks[name]] for name in NAMES)))
    return view


def _cells(row: _Row, dense: list[float], fused: list[float]) -> tuple[str, str, str, str]:
    return row.label, _summary(row, dense), _summary(row, fused), _change(row, dense, fused)


def _summary(row: _Row, values: list[float]) -> str:
    mean = f"{row.scale * fmean(values):.{row.digits}f}"
    return f"{mean} ± {row.scale * stdev(values):.{row.digits}f}" if len(values) > 1 else mean


def _change(row: _Row, dense: list[float], fused: list[float]) -> str:
    """The difference of the means; in colour if every seed agrees on the direction."""
    difference = fmean(fused) - fmean(dense)
    text = f"{row.scale * difference:+.{row.digits}f}"
    rises = {after > before for before, after in zip(dense, fused, strict=True)}
    if row.better == "neither" or len(rises) > 1 or dense == fused:
        return text
    return f"[{'green' if rises == {row.better == 'higher'} else 'red'}]{text}[/]"


def notes(results: Numbers) -> str:
    """What exactly the table shows, to be printed below it."""
    seeds, batch = len(results["seeds"]), results["measured_batch"]
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


def draw_reliability(answers: dict[str, list[Answers]], results: Numbers, path: Path) -> None:
    """Draws the reliability diagram of both models, the predictions of all seeds pooled."""
    smoothing, seeds = results["settings"]["smoothing"], results["seeds"]
    titles = {"dense": "hard targets", "fused": f"smoothing {smoothing:g}"}
    figure = Figure(figsize=(9, 5.4), dpi=160, layout=ConstrainedLayoutEngine(wspace=0.06))
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, name in enumerate(NAMES):
        pooled = reliability(
            torch.cat([given.confidence for given in answers[name]]),
            torch.cat([given.correct for given in answers[name]]),
            bins=BINS,
        )
        ece = fmean(seed[name]["ece"] for seed in seeds)
        grid[0, column].set_title(f"{titles[name]}   ECE {ece:.3f}", loc="left", fontweight="bold")
        _draw_accuracy(grid[0, column], pooled, _COLOURS[name])
        _draw_counts(grid[1, column], pooled, _COLOURS[name])
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("answers")
    grid[0, 1].legend(loc="upper left", frameon=False)
    figure.savefig(path)


def _draw_accuracy(axes: Axes, pooled: ReliabilityTable, colour: str) -> None:
    """Bars as high as the accuracy; the gap to the mean confidence hatched, the ideal dotted."""
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
