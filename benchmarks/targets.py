"""What Levelhead is to reach, and whether the rows of a benchmark show it: met, or missed by how much."""

import statistics
from dataclasses import dataclass
from typing import Any

from levelhead.measure.methods import DENSE
from levelhead.measure.methods import OURS as CPU_OURS

from .measure import PRODUCTS

Row = dict[str, Any]

TARGET_SHAPES = ("Llama-3 8B", "Gemma-2 2B")
OURS = "levelhead, triton"


@dataclass(frozen=True)
class Target:
    """A bound on a ratio: Levelhead's column, smoothed, over another's; of forward + backward."""

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
CPU_TARGETS = [
    Target("time, dense = 1", 1.05, DENSE, 0.1),
    Target("extra memory, dense = 1", 1 / 8, DENSE, 0.1, "extra_bytes", "extra_bytes"),
    Target("time, without smoothing = 1", 1.01, CPU_OURS, 0.0),
]


def verdicts(rows: list[Row]) -> list[Row]:
    """Return for every target on a GPU, in bfloat16, what was measured and the verdict."""
    found = {
        (row["shape"], row["method"], row["eps"]): row
        for row in rows
        if (row["mode"], row["dtype"], row["autocast"]) == ("forward+backward", "bfloat16", False)
    }
    return [
        {"shape": shape, "target": target.what, "at_most": target.at_most}
        | _verdict(target, OURS, *(found.get((shape, *key), {}) for key in _rows_of(target, OURS)))
        for shape in TARGET_SHAPES
        for target in TARGETS
    ]


def cpu_verdicts(rows: list[Row]) -> list[Row]:
    """Return for every target on a CPU, at every size that was benchmarked with that smoothing, likewise."""
    training = [row for row in rows if row["mode"] == "forward+backward"]
    found = {(_place(row), row["method"], row["eps"]): row for row in training}
    return [
        dict(zip(("shape", "n", "d", "v", "dtype"), place, strict=True))
        | {"target": target.what, "at_most": target.at_most}
        | _verdict(target, CPU_OURS, *(found.get((place, *key), {}) for key in keys))
        for place in dict.fromkeys(map(_place, training))
        for target in CPU_TARGETS
        for keys in [_rows_of(target, CPU_OURS)]
        if all((place, *key) in found for key in keys)
    ]


def said(verdict: Row) -> str:
    """Return a verdict as it is printed."""
    where = verdict["shape"]
    if "n" in verdict:
        where += f", N = {verdict['n']}, D = {verdict['d']}, V = {verdict['v']}, {verdict['dtype']}"
    value = "" if verdict["value"] is None else f"{verdict['value']:.3f}: "
    return (
        f"{where}: {verdict['target']}, at most {verdict['at_most']:g}: {value}{verdict['verdict']}"
    )


def ratio(row: Row, other: Row, column: str = "ms_p50", of: str = "ms_p50") -> float:
    """Return how a row compares with another; in time by the median over the rounds, where both took turns."""
    paired = column == of == "ms_p50" and "ms" in row and "ms" in other
    if paired and len(row["ms"]) == len(other["ms"]):
        return statistics.median(a / b for a, b in zip(row["ms"], other["ms"], strict=True))
    value: float = row[column] / other[of]
    return value


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("shape", "n", "d", "v", "dtype"))


def _rows_of(target: Target, ours: str) -> list[tuple[str, float | None]]:
    return [(ours, 0.1), (target.method, target.eps)]


def _verdict(target: Target, ours: str, row: Row, other: Row) -> Row:
    for (method, _), found in zip(_rows_of(target, ours), (row, other), strict=True):
        if "ms_p50" not in found:
            reason = found.get("failure", "no such row")
            return {"value": None, "verdict": f"not measured: {method}: {reason}"}
    value = ratio(row, other, target.column, target.of)
    beyond = value - target.at_most
    return {"value": value, "verdict": "met" if beyond <= 0 else f"missed by {beyond:.2g}"}
