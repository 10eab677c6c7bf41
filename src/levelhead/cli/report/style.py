"""How pictures look: colours that the colour-blind tell apart, also in print and on a dark page."""

import io
import re
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette, the blue and the green a little lighter for dark pages.
BLUE, ORANGE = "#2b7fb8", "#d55e00"
SERIES = (BLUE, ORANGE, "#12a07a", "#cc79a7", "#b58900", "#56b4e9", "#7a6fb5", "#8c8c8c")
DASHES = ("-", "--", "-.", ":")
# Stand-ins that a page replaces by variables of its style sheet, so that it can go dark.
INK, PALE, PAPER = "#1b1e23", "#b9bec7", "#fffffe"
_VARIABLES = {INK: "var(--ink)", PALE: "var(--pale)", PAPER: "var(--paper)"}

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "levelhead",
}


def style() -> Any:
    """A context in which figures are drawn and saved."""
    return matplotlib.rc_context(_STYLE)


def svg(figure: Figure) -> str:
    """The figure as the text of an SVG file, the same for the same figure."""
    file = io.StringIO()
    with style():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def inline(svg: str, name: str, description: str) -> str:
    """An SVG as an element of a page, with the page's colours.

    Args:
        svg: From `svg`.
        name: Unique on the page; identifiers in the SVG begin with it.
        description: What it shows, for those who cannot see it.
    """
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    points = float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    size = f'style="max-width: {1.5 * points:.0f}px"'
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" {size} ', 1)
