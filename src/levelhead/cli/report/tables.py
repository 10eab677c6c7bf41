"""The tables, as text; the terminal and the page show the same ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .words import MINUS, decimals, minus, percent, points, signed

Numbers = dict[str, Any]
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and what stands under it in small."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: Of every column.
        rows: The first cell of each is its name.
        total: Whether the last row sums up the others.
    """

    head: list[Cell]
    rows: list[list[Cell]]
    total: bool = False


_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", percent),
    "mean_confidence": ("mean confidence", percent),
    "gap": ("over-confidence, points", signed),
    "ece": ("ECE", decimals),
    "smooth_ece": ("smooth ECE", decimals),
    "rms": ("RMS error", decimals),
    "mce": ("largest gap", decimals),
    "brier": ("Brier", decimals),
    "nll": ("NLL, nats", decimals),
    "auroc": ("AUROC", decimals),
    "aurc": ("AURC", decimals),
}


def main_table(kinds: dict[str, Numbers], by: str | None) -> Table:
    """A row for each group, the measures that matter; other kinds of score add their AUROC."""
    (_, first), *others = kinds.items()
    rows = [*first["groups"], first["overall"]]
    named = [{r["name"]: r for r in [*kind["groups"], kind["overall"]]} for _, kind in others]
    head = [Cell(by or ""), Cell("accuracy")]
    head += (
        [Cell("confid.", f"{MINUS} accur."), Cell("ECE", "95% interval")]
        if first["probability"]
        else []
    )
    head += [Cell("AUROC"), Cell("signif.", "p < 0.0001")]
    head += [Cell("AUROC", name) for name, _ in others] + [Cell("answers")]
    body = [
        [
            Cell(row["name"]),
            _accuracy(row),
            *(_calibration(row) if first["probability"] else []),
            _auroc(row),
            _significant(row),
            *(_other(kind.get(row["name"])) for kind in named),
            Cell(f"{row['answers']:,}"),
        ]
        for row in rows
    ]
    return Table(head, body, total=bool(first["groups"]))


def payoff_table(kind: Numbers, by: str | None) -> Table | None:
    """What withholding unsure answers earns, by the cost of a wrong one; None if nothing is known."""
    rows = kind["groups"] or [kind["overall"]]
    found = [row for row in rows if None not in row["abstention"]]
    if not found:
        return None
    head = [Cell(by or "")]
    for one in found[0]["abstention"]:
        head += [
            Cell(f"wrong {MINUS}{one['wrong']:g}", "answer all"),
            Cell("withhold", "unsure ones"),
            Cell("withheld"),
        ]
    body = [
        [Cell(row["name"]), *(cell for one in row["abstention"] for cell in _payoff(one))]
        for row in found
    ]
    return Table(head, body)


def _accuracy(row: Numbers) -> Cell:
    macro = row["macro"]
    if macro["strata"] > 1:
        return Cell(percent(macro["accuracy"]))
    return Cell(percent(macro["accuracy"]), interval(row["metrics"]["accuracy"], percent))


def _calibration(row: Numbers) -> list[Cell]:
    confidence, error = (row["metrics"][name] for name in ("mean_confidence", "ece"))
    return [
        Cell(percent(confidence["estimate"]), signed(row["metrics"]["gap"]["estimate"])),
        Cell(decimals(error["estimate"]), interval(error, decimals)),
    ]


def _auroc(row: Numbers) -> Cell:
    macro = row["macro"]
    if macro["auroc"] is None:
        return Cell(ABSENT)
    if macro["strata"] > 1:
        return Cell(decimals(macro["auroc"]))
    return Cell(decimals(macro["auroc"]), interval(row["metrics"]["auroc"], decimals))


def _significant(row: Numbers) -> Cell:
    macro = row["macro"]
    return Cell(f"{macro['significant']} of {macro['ranked']}")


def _other(row: Numbers | None) -> Cell:
    if row is None or row["macro"]["auroc"] is None:
        return Cell(ABSENT)
    macro = row["macro"]
    return Cell(decimals(macro["auroc"]), f"{macro['significant']} of {macro['ranked']}")


def _payoff(found: Numbers) -> list[Cell]:
    spread = f"[{points(found['lowest'])}, {points(found['highest'])}]"
    return [
        Cell(points(found["answer_all"])),
        Cell(points(found["with_threshold"]), spread),
        Cell(percent(found["withheld"])),
    ]


def interval(metric: Numbers, write: Callable[[float], str]) -> str:
    """[low, high], or nothing where there is none."""
    if metric["low"] is None or metric["high"] is None:
        return ""
    return f"[{write(metric['low'])}, {write(metric['high'])}]"


def measures_table(kind: Numbers, by: str | None) -> Table:
    """Every measure of every group over its pooled answers, with intervals."""
    rows = [*kind["groups"], kind["overall"]]
    names = [name for name in _MEASURES if name in kind["overall"]["metrics"]]
    head = [Cell(by or ""), *(Cell(_MEASURES[name][0], "") for name in names)]
    body = [
        [
            Cell(row["name"]),
            *(_metric(row["metrics"].get(name), _MEASURES[name][1]) for name in names),
        ]
        for row in rows
    ]
    return Table(head, body, total=bool(kind["groups"]))


def _metric(metric: Numbers | None, write: Callable[[float], str]) -> Cell:
    if metric is None or metric["estimate"] is None:
        return Cell(ABSENT)
    return Cell(write(metric["estimate"]), interval(metric, write))


def strata_table(kind: Numbers, by: str | None) -> Table | None:
    """The strata of all groups; None if there are none."""
    rows = [row for row in (kind["groups"] or [kind["overall"]]) if row["strata"]]
    if not rows:
        return None
    names = list(rows[0]["strata"][0]["groups"])
    head = [Cell(by or ""), *map(Cell, names), *map(Cell, ("answers", "accuracy", "AUROC", "p"))]
    body = [[Cell(row["name"]), *_stratum(stratum)] for row in rows for stratum in row["strata"]]
    return Table(head, body)


def _stratum(stratum: Numbers) -> list[Cell]:
    return [
        *(Cell(value) for value in stratum["groups"].values()),
        Cell(f"{stratum['answers']:,}"),
        Cell(percent(stratum["accuracy"])),
        Cell(ABSENT if stratum["auroc"] is None else decimals(stratum["auroc"])),
        Cell(ABSENT if stratum["p"] is None else probability(stratum["p"])),
    ]


def probability(p: float) -> str:
    """A p-value."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def comparison_table(comparison: Numbers) -> Table:
    """Both runs and their difference, with its interval."""
    head = [
        Cell("measure"),
        Cell(comparison["first"]),
        Cell(comparison["second"]),
        Cell("difference", f"second {MINUS} first"),
    ]
    body = []
    for name, (label, write) in _MEASURES.items():
        if (found := comparison["metrics"].get(name)) is not None:
            scale = 100 if write is percent or write is signed else 1
            body.append(
                [
                    Cell(label),
                    _metric(found["first"], write),
                    _metric(found["second"], write),
                    _difference(found["difference"], scale),
                ]
            )
    return Table(head, body)


def _difference(metric: Numbers, scale: float) -> Cell:
    def write(value: float) -> str:
        return signed(value) if scale == 100 else minus(f"{value:+.3f}")

    return _metric(metric, write)
