"""What Levelhead is to reach on an H200, and whether the rows of a GPU benchmark show it."""

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

TARGET_SHAPES = ("Llama-3 8B", "Gemma-2 2B")
PRODUCTS = "bare products"
OURS = "levelhead, triton"


@dataclass(frozen=True)
class Target:
    """A bound on a ratio: Levelhead's column, smoothed, over another's; of forward + backward in bfloat16."""

    what: str
    at_most: float
    method: str
    eps: float | None
    column: str = "ms_p50"
    of: str = "ms_p50"


_CUT = "Cut Cross-Entropy, exact"
_COMPILED = "F.cross_entropy, torch.compile"
TARGETS = [
    Target("time, bare products = 1", 1.15, PRODUCTS, None),
    Target("time, Liger-Kernel = 1", 1, "Liger-Kernel", 0.1),
    Target("time, Cut Cross-Entropy (exact, no smoothing) = 1", 1, _CUT, 0.0),
    Target("time, torch.compile of the dense loss = 1", 1, _COMPILED, 0.1),
    Target("extra memory, gradients = 1", 0.05, OURS, 0.1, "extra_bytes", "gradient_bytes"),
    Target("time, without smoothing = 1", 1.01, OURS, 0.0),
]


def verdicts(rows: list[Row]) -> list[Row]:
    """Return for every target what was measured, and whether it is met or by how much it is missed."""
    found = {
        (row["shape"], row["method"], row["eps"]): row
        for row in rows
        if (row["mode"], row["dtype"], row["autocast"]) == ("forward+backward", "bfloat16", False)
    }
    return [
        {"shape": shape, "target": target.what, "at_most": target.at_most}
        | _verdict(target, *(found.get((shape, *key), {}) for key in _rows_of(target)))
        for shape in TARGET_SHAPES
        for target in TARGETS
    ]


def _rows_of(target: Target) -> list[tuple[str, float | None]]:
    return [(OURS, 0.1), (target.method, target.eps)]


def _verdict(target: Target, ours: Row, other: Row) -> Row:
    for (method, _), row in zip(_rows_of(target), (ours, other), strict=True):
        if "ms_p50" not in row:
            reason = row.get("failure", "no such row")
            return {"value": None, "verdict": f"not measured: {method}: {reason}"}
    value = ours[target.column] / other[target.of]
    beyond = value - target.at_most
    return {"value": value, "verdict": "met" if beyond <= 0 else f"missed by {beyond:.2g}"}
