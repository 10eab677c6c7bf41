"""The pictures: reliability, risk against coverage, payoff against threshold, and groups compared."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from .abstention import PAYOFFS
from .style import BLUE, DASHES, INK, ORANGE, PALE, PAPER, SERIES, style
from .words import MINUS, minus

MOST_PANELS = 12
MOST_LINES = len(SERIES)
_PANEL: dict[str, Any] = {"height_ratios": (3.4, 1), "sharex": "col"}
_PERCENT = PercentFormatter(xmax=1, decimals=0)

Numbers = dict[str, Any]
Draw = Callable[..., None]


def reliability_grid(groups: list[Numbers]) -> Figure:
    """A reliability diagram for each group, with the histogram of confidences under it."""
    columns = min(4, len(groups))
    rows = math.ceil(len(groups) / columns)
    with style():
        width = 0.5 + 2.9 * columns
        figure = Figure(figsize=(width, 0.3 + 3.8 * rows))
        grid = figure.add_gridspec(rows + 1, 1, height_ratios=[0.3] + rows * [3.8])
        strips = [figure.add_subfigure(grid[row, 0]) for row in range(rows + 1)]
        for row, part in enumerate(strips[1:]):
            shown = groups[row * columns : (row + 1) * columns]
            axes: Any = part.subplots(2, columns, squeeze=False, **_PANEL)
            part.subplots_adjust(
                0.7 / width, 0.14, 1 - 0.25 / width, 0.91, wspace=0.32, hspace=0.06
            )
            for column in range(columns):
                if column < len(shown):
                    _draw_panel(axes[:, column], shown[column], labelled=column == 0)
                else:
                    part.delaxes(axes[0, column])
                    part.delaxes(axes[1, column])
            if row == 0:
                handles, labels = axes[0, 0].get_legend_handles_labels()
                strips[0].legend(handles, labels, loc="center", ncols=3)
    return figure


def reliability_panel(group: Numbers) -> Figure:
    """The reliability diagram of one group."""
    with style():
        figure = Figure(figsize=(3.3, 4.1))
        figure.subplots_adjust(0.215, 0.115, 0.935, 0.93, hspace=0.06)
        _draw_panel(figure.subplots(2, 1, **_PANEL), group, labelled=True)
    return figure


def _draw_panel(axes: Any, group: Numbers, *, labelled: bool) -> None:
    _draw_accuracy(axes[0], group)
    _draw_histogram(axes[1], group)
    if labelled:
        axes[0].set_ylabel("accuracy")
        axes[1].set_ylabel("answers")


def _draw_accuracy(axes: Axes, group: Numbers) -> None:
    table = group["reliability"]
    filled = [bin_ for bin_ in _bins(table) if bin_["count"]]
    left = [bin_["left"] for bin_ in filled]
    width = [bin_["width"] for bin_ in filled]
    accuracy = [bin_["accuracy"] for bin_ in filled]
    gap = [bin_["confidence"] - bin_["accuracy"] for bin_ in filled]
    axes.bar(left, accuracy, width, align="edge", color=BLUE, edgecolor=PAPER, label="accuracy")
    axes.bar(
        left,
        gap,
        width,
        bottom=accuracy,
        align="edge",
        facecolor="none",
        edgecolor=ORANGE,
        hatch="////",
        linewidth=0,
        label="gap to confidence",
    )
    axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1.2, label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.tick_params(labelbottom=False)
    axes.set_title(_shortened(group["name"]))
    error = group["metrics"]["ece"]["estimate"]
    axes.text(0.04, 0.95, f"ECE {error:.3f}", transform=axes.transAxes, va="top")


def _draw_histogram(axes: Axes, group: Numbers) -> None:
    bins = _bins(group["reliability"])
    axes.bar(
        [bin_["left"] for bin_ in bins],
        [bin_["count"] for bin_ in bins],
        [bin_["width"] for bin_ in bins],
        align="edge",
        color=PALE,
        edgecolor=PAPER,
    )
    axes.set_xlabel("confidence")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _bins(table: Numbers) -> list[Numbers]:
    edges = table["edges"]
    return [
        {
            "left": edges[i],
            "width": edges[i + 1] - edges[i],
            "count": table["count"][i],
            "accuracy": table["accuracy"][i],
            "confidence": table["confidence"][i],
        }
        for i in range(len(edges) - 1)
    ]


def curves(kind: Numbers) -> dict[str, Figure]:
    """Everything but the reliability diagrams, by name."""
    groups = kind["groups"] or [kind["overall"]]
    drawn = {"risk_coverage": _risk_coverage(groups)}
    for wrong in PAYOFFS:
        drawn[f"payoff_{wrong:g}"] = _payoff(groups, wrong, kind["probability"])
    return drawn | _relations(kind)


def _risk_coverage(groups: list[Numbers]) -> Figure:
    """The share of wrong answers among those given, as more of the least confident are given."""
    with style():
        figure, axes = _frame(len(groups))
        for line, group in _lines(groups):
            curve = group["curve"]
            axes.plot(curve["coverage"], curve["risk"], **line)
        axes.set(xlim=(0, 1), xlabel="share of questions answered, the surest first")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("share of wrong answers among them")
        axes.set_title("Risk against coverage")
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.yaxis.set_major_formatter(_PERCENT)
        _legend(figure, axes, len(groups))
        return figure


def _payoff(groups: list[Numbers], wrong: float, probability: bool) -> Figure:
    """Points per question when answers below a threshold are withheld."""
    with style():
        figure, axes = _frame(len(groups))
        for line, group in _lines(groups):
            curve = group["curve"]
            payoff = [
                coverage * (1 - (1 + wrong) * risk)
                for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True)
            ]
            axes.plot(curve["threshold"], payoff, drawstyle="steps-pre", **line)
        axes.axhline(0, color=PALE, linewidth=1)
        axes.set_xlabel("threshold: answers with less confidence are withheld")
        axes.set_ylabel("points per question")
        axes.set_title(f"Payoff: right +1, wrong {MINUS}{wrong:g}, withheld 0")
        if probability:
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(_PERCENT)
        _legend(figure, axes, len(groups))
        return figure


def _lines(groups: list[Numbers]) -> Iterable[tuple[Numbers, Numbers]]:
    for index, group in enumerate(groups[:MOST_LINES]):
        yield (
            {
                "color": SERIES[index],
                "linestyle": DASHES[index % len(DASHES)],
                "linewidth": 1.7,
                "label": _shortened(group["name"]),
            },
            group,
        )


def _frame(count: int) -> tuple[Figure, Axes]:
    """A figure with room for the legend of some lines; matplotlib's own layout takes a second more."""
    legend = 0.2 * math.ceil(min(count, MOST_LINES) / 3) if count > 1 else 0  # inches
    height = 3.5 + legend
    figure = Figure(figsize=(4.3, height))
    figure.subplots_adjust(0.16, (0.54 + legend) / height, 0.94, 1 - 0.32 / height)
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    if count > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9)


def _relations(kind: Numbers) -> dict[str, Figure]:
    """Accuracy of every group against AUROC, and against its calibration error."""
    labels = {"auroc": "AUROC", "ece": "calibration error (ECE)"}
    return {
        f"accuracy_{name}": _relation(
            [
                (group["name"], group["macro"]["accuracy"], other)
                for group in kind["groups"]
                if (other := _other(group, name)) is not None
            ],
            labels[name],
            relation,
        )
        for name, relation in kind["relations"].items()
    }


def _other(group: Numbers, name: str) -> float | None:
    value: float | None = (
        group["macro"]["auroc"] if name == "auroc" else group["metrics"][name]["estimate"]
    )
    return value


def _relation(groups: list[tuple[str, float, float]], label: str, relation: Numbers) -> Figure:
    with style():
        figure, axes = _frame(1)
        names, accuracy, other = zip(*groups, strict=True)
        axes.scatter(accuracy, other, s=36, color=BLUE, edgecolor=PAPER, zorder=3)
        axes.margins(x=0.16, y=0.16)
        axes.set(xlabel="accuracy", ylabel=label)
        axes.xaxis.set_major_formatter(_PERCENT)
        r = "undefined" if relation["r"] is None else minus(f"{relation['r']:.2f}")
        axes.set_title(f"r = {r}, n = {relation['n']}")
        _name_points(axes, names, list(zip(accuracy, other, strict=True)))
        return figure


_SIDES = (("left", 6, 3), ("right", -6, 3), ("left", 6, -11), ("right", -6, -11))


def _name_points(axes: Axes, names: Iterable[str], points: list[tuple[float, float]]) -> None:
    """Writes names beside points, each where it hides least of points, names and the frame."""
    axes.autoscale_view()  # drawing would, but it is not drawn yet
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(points)]
    frame = axes.get_window_extent()
    for name, point in zip(names, points, strict=True):
        choices: list[tuple[int, int, Any, Bbox]] = []
        for side, dx, dy in _SIDES:
            label = axes.annotate(
                _shortened(name), point, (dx, dy), textcoords="offset points", ha=side, fontsize=8.5
            )
            box = label.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            choices.append((box.count_overlaps(taken) + (not inside), len(choices), label, box))
        best = min(choices, key=lambda choice: choice[:2])
        for choice in choices:
            if choice is not best:
                choice[2].remove()
        taken.append(best[3])


def _shortened(name: str, most: int = 26) -> str:
    """A name that fits; matplotlib takes dollars for formulas."""
    text = name if len(name) <= most else f"{name[: most - 1]}…"
    return text.replace("$", r"\$")
