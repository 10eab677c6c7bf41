"""The report as one HTML page: no scripts, nothing loaded from elsewhere."""

from html import escape
from typing import Any

from . import figures
from .css import CSS
from .style import inline, svg
from .tables import Table, comparison_table, main_table, measures_table, payoff_table, strata_table
from .words import findings

Numbers = dict[str, Any]


def page(results: Numbers, drawn: dict[str, str]) -> str:
    """The whole page, with the SVG of every figure of `figures.curves`."""
    title = escape(results["title"])
    body = "\n".join(part for part in _sections(results, drawn) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(results: Numbers, drawn: dict[str, str]) -> list[str]:
    by, kinds = results["by"], results["scores"]
    first = next(iter(kinds.values()))
    rows = first["groups"] or [first["overall"]]
    return [
        f"<header><h1>{escape(results['title'])}</h1>\n"
        f'<p class="lead">{escape(results["subtitle"])}</p></header>',
        _findings(first, by),
        _table(main_table(kinds, by)),
        *(f'<p class="note">{escape(note)}</p>' for note in results["notes"]),
        _comparison(results["comparison"]),
        _reliability(rows) if first["probability"] else "",
        _curves(first, by, drawn),
        _relations(drawn),
        _details(results),
        _definitions(results),
        _footer(results),
    ]


def _findings(kind: Numbers, by: str | None) -> str:
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in findings(kind, by))
    return f'<ul class="findings">\n{items}\n</ul>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_content(cell)}</th>' for cell in table.head)
    body = []
    for index, row in enumerate(table.rows):
        total = ' class="total"' if table.total and index == len(table.rows) - 1 else ""
        name, *cells = row
        body.append(
            f'<tr{total}><th scope="row">{_content(name)}</th>'
            + "".join(f"<td>{_content(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    rows = "\n".join(body)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _content(cell: Any) -> str:
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    return escape(cell.text) + small


def _figure(text: str, name: str, description: str) -> str:
    return f"<figure>{inline(text, name, description)}</figure>"


def _reliability(rows: list[Numbers]) -> str:
    shown = rows[: figures.MOST_PANELS]
    panels = "\n".join(
        _figure(
            svg(figures.reliability_panel(row)),
            f"reliability{index}",
            f"Reliability diagram of {row['name']}",
        )
        for index, row in enumerate(shown)
    )
    return (
        "<h2>Does confidence mean what it says?</h2>\n"
        "<p>Where confidence is honest, bars reach the dotted line: of the answers given with 80% "
        "confidence, 80% are right. The hatched part is the gap; below the dotted line the model is "
        f"over-confident.{_left_out(rows, len(shown))}</p>\n"
        f'<div class="panels">\n{panels}\n</div>'
    )


def _left_out(rows: list[Numbers], shown: int) -> str:
    return "" if shown == len(rows) else f" The first {shown} of {len(rows)} are drawn."


def _curves(kind: Numbers, by: str | None, drawn: dict[str, str]) -> str:
    rows = kind["groups"] or [kind["overall"]]
    shown = min(len(rows), figures.MOST_LINES)
    curves = {name: figure for name, figure in drawn.items() if not name.startswith("accuracy")}
    table = payoff_table(kind, by)
    return (
        "<h2>Can it be used to withhold unsure answers?</h2>\n"
        "<p>If only the surest answers are given, how many of them are wrong? And what does a "
        f"threshold on confidence earn, in points per question?{_left_out(rows, shown)}</p>\n"
        + _gallery(curves)
        + ("" if table is None else _table(table))
    )


def _relations(drawn: dict[str, str]) -> str:
    pictures = {name: figure for name, figure in drawn.items() if name.startswith("accuracy")}
    return f"<h2>Do better groups know better?</h2>\n{_gallery(pictures)}" if pictures else ""


def _gallery(pictures: dict[str, str]) -> str:
    items = "\n".join(
        _figure(text, name, name.replace("_", " ").capitalize()) for name, text in pictures.items()
    )
    return f'<div class="gallery">\n{items}\n</div>\n'


def _comparison(comparison: Numbers | None) -> str:
    if comparison is None:
        return ""
    title = f"{comparison['first']} and {comparison['second']} compared"
    return f"<h2>{escape(title)}</h2>\n<p>{escape(comparison['how'])}</p>\n" + _table(
        comparison_table(comparison)
    )


def _details(results: Numbers) -> str:
    parts = []
    for name, kind in results["scores"].items():
        of = f" of {name}" if len(results["scores"]) > 1 else ""
        parts.append(
            f"<h2>All measures{escape(of)}</h2>\n"
            '<p class="note">Over the pooled answers of each row, with 95% bootstrap intervals.</p>\n'
            + _table(measures_table(kind, results["by"]))
        )
        if (strata := strata_table(kind, results["by"])) is not None:
            parts.append(
                f"<details><summary>All {len(strata.rows)} strata{escape(of)}</summary>\n"
                f"{_table(strata)}</details>"
            )
    return "\n".join(parts)


def _definitions(results: Numbers) -> str:
    items = "\n".join(
        f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>"
        for term, meaning in results["definitions"].items()
    )
    return f"<h2>What the words mean</h2>\n<dl>\n{items}\n</dl>"


def _footer(results: Numbers) -> str:
    names = ", ".join(results["files"])
    return (
        f"<footer>levelhead {escape(results['levelhead'])}; read from {escape(names)}; "
        f"seed {results['settings']['seed']}.</footer>"
    )
