"""The figures of docs/benchmarks.md, drawn from results/cpu.json: memory, time and error.

Each holds the digest of the numbers that it shows, so that a test can tell whether it is theirs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from levelhead.measure.methods import COMPILED, DENSE, OURS

from .measure import PRODUCTS, Row
from .shapes import OVER_TOKENS, OVER_VOCABULARY

Points = list[tuple[float, float]]
Series = dict[str, Points]  # by label

DIGEST = "Digest"  # key of the PNG's text
_COLOURS = {DENSE: "#6b7280", COMPILED: "#d97706", OURS: "#1d4ed8", PRODUCTS: "#9ca3af"}
_NO_SMOOTHING = ", ε = 0"
_MODEL = "SmolLM2 135M"  # which every method runs on


def _training(rows: Iterable[Row], shape: str) -> list[Row]:
    return [r for r in rows if r["shape"] == shape and r["mode"] == "forward+backward"]


def memory(rows: list[Row]) -> Series:
    """Return MiB beyond the gradients by vocabulary."""
    series: Series = {}
    for row in _training(rows, OVER_VOCABULARY):
        if "extra_bytes" in row and row["eps"]:
            series.setdefault(row["method"], []).append((row["v"], row["extra_bytes"] / 2**20))
    return series


def time(rows: list[Row]) -> Series:
    """Return microseconds a token by number of tokens."""
    series: Series = {}
    for row in _training(rows, OVER_TOKENS):
        if "ms_p50" in row and row["eps"] != 0:
            point = (row["n"], 1e3 * row["ms_p50"] / row["n"])
            series.setdefault(row["method"], []).append(point)
    return series


def error(rows: list[Row]) -> Series:
    """Return the errors of loss and gradient by method and dtype; with smoothing, where the method has it."""
    series: Series = {}
    for row in sorted(_training(rows, _MODEL), key=lambda row: not row["eps"]):
        if "ms_p50" in row and row["method"] != PRODUCTS:
            label = f"{row['method']}, {row['dtype']}"
            unsmoothed = label not in series and not row["eps"]
            if unsmoothed:
                label = f"{row['method']}{_NO_SMOOTHING}, {row['dtype']}"
            series.setdefault(label, [(row["loss_error"], row["gradient_error"])])
    return series


def draw_memory(axes: Any, series: Series) -> None:
    """Lines by vocabulary, with the last value of each."""
    from matplotlib.ticker import StrMethodFormatter

    for label, points in series.items():
        _line(axes, label, points)
        size, mebibytes = points[-1]
        if label != PRODUCTS:
            axes.annotate(
                f"{mebibytes:,.0f} MiB", (size, mebibytes), (8, -3), textcoords="offset points",
                color=_COLOURS[label], fontsize=9,
            )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="vocabulary V", ylabel="MiB beyond inputs and gradients"
    )
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    _ticks(axes, series)


def draw_time(axes: Any, series: Series) -> None:
    """Lines by number of tokens, from zero."""
    for label, points in series.items():
        _line(axes, label, points)
    axes.set(xscale="log", xlabel="tokens N", ylabel="microseconds a token, forward + backward")
    axes.set_ylim(bottom=0)
    _ticks(axes, series)


def _line(axes: Any, label: str, points: Points) -> None:
    x, y = zip(*points, strict=True)
    dashed = label == PRODUCTS
    axes.plot(
        x, y, "--" if dashed else "-", marker="o", markersize=3 if dashed else 5, label=label,
        color=_COLOURS[label], linewidth=4 if label == DENSE else 2,
        alpha=0.5 if label == DENSE else 1, zorder=3 if label == OURS else 2,
    )  # fmt: skip


def _ticks(axes: Any, series: Series) -> None:
    places = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(places, [f"{place:,.0f}" for place in places])
    axes.minorticks_off()


def draw_error(axes: Any, series: Series) -> None:
    """A line a method, a colour a dtype; the loss a ring, the gradient a disc."""
    dtypes = {"float32": "#1d4ed8", "bfloat16": "#d97706"}
    methods = list(dict.fromkeys(label.rpartition(", ")[0] for label in series))
    for label, [errors] in series.items():
        method, _, dtype = label.rpartition(", ")
        faces = ("none", dtypes[dtype])
        for what, value, face in zip(("loss", "gradient"), errors, faces, strict=True):
            axes.plot(
                max(value, 1e-10),  # a logarithmic axis has no zero
                -methods.index(method), "o", color=dtypes[dtype], markerfacecolor=face,
                markersize=7, label=f"{dtype}, {what}",
            )  # fmt: skip
    axes.set(xscale="log", xlabel="largest error, where the largest true value is 1")
    axes.set_yticks([-i for i in range(len(methods))], methods)
    axes.grid(axis="y", alpha=0.25)


_Figure = tuple[Callable[[list[Row]], Series], Callable[[Any, Series], None], str, str]
FIGURES: dict[str, _Figure] = {
    "memory": (memory, draw_memory, "Memory of a training step of the head", OVER_VOCABULARY),
    "time": (time, draw_time, "Time of a training step of the head", OVER_TOKENS),
    "error": (error, draw_error, "Errors against float64", _MODEL),
}


def title(text: str, rows: list[Row], shape: str) -> str:
    """Return the title of a figure, with the sizes that do not grow in it."""
    of = _training(rows, shape)
    known = {name.upper(): {row[name] for row in of} for name in ("n", "d", "v")}
    sizes = ", ".join(f"{name} = {min(found)}" for name, found in known.items() if len(found) == 1)
    model = f"{shape}, " if shape == _MODEL else ""
    return f"{text}: {model}{sizes}, ε = 0.1 unless it says otherwise"


def digest(series: Series) -> str:
    """Return what a figure of these numbers is known by."""
    return hashlib.sha256(json.dumps(series).encode()).hexdigest()[:16]


def drawn_from(path: Path) -> str | None:
    """Return the digest in a figure."""
    from PIL import Image

    with Image.open(path) as image:
        found: str | None = image.info.get(DIGEST)
        return found


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures that the results have numbers for, and return where they are."""
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    drawn = []
    for name, (numbers, plot, text, shape) in FIGURES.items():
        series = numbers(results["rows"])
        if not series:
            continue
        height = 1.6 + 0.3 * len({label.rpartition(", ")[0] for label in series})
        figure = Figure(figsize=(8, height if name == "error" else 4.2), layout="constrained")
        axes = figure.subplots()
        plot(axes, series)
        figure.suptitle(title(text, results["rows"], shape), x=0.01, ha="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if name == "error" else "both", alpha=0.25)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        place = {"loc": "outside lower center", "ncols": 4 if name == "error" else 3}
        figure.legend(unique.values(), unique.keys(), frameon=False, fontsize=9, **place)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150, metadata={DIGEST: digest(series)})
        drawn.append(path)
    return drawn
