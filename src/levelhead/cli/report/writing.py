"""What a report leaves in its folder: the page, the numbers, the pictures."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..output import write_json
from . import figures
from .page import page
from .style import style, svg

Numbers = dict[str, Any]


def write(results: Numbers, folder: Path) -> None:
    """Draws, and writes everything."""
    kind = next(iter(results["scores"].values()))
    pictures = {name: _save(figure, folder, name) for name, figure in figures.curves(kind).items()}
    if kind["probability"]:
        rows = (kind["groups"] or [kind["overall"]])[: figures.MOST_PANELS]
        _save(figures.reliability_grid(rows), folder, "reliability")
    write_json(folder / "results.json", results)
    (folder / "report.html").write_text(page(results, pictures), encoding="utf-8")


def _save(figure: Figure, folder: Path, name: str) -> str:
    """Writes a picture as PNG and as SVG, and returns the latter."""
    text = svg(figure)
    (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    with style():
        figure.savefig(folder / f"{name}.png", dpi=160)
    return text
