"""Times and peak memory of every method on every case, paired: `python -m benchmarks`.

Correctness first: a method whose loss or gradients differ from the dense ones is a row without times. The methods
take turns, so that a machine's bad minute hits all of them. Memory is the peak beyond inputs and gradients.
"""

import json
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from .methods import METHODS
from .step import Case, Step, extra_bytes, machine, quantiles

RESULTS = Path(__file__).parent / "results"
ROUNDS = 7


CASES = [
    Case(),
    Case(eps=0.0),
    Case(mode="frozen head"),
    Case(mode="forward"),
]


def check(step: Step, truth: Step) -> str | None:
    """Return why a method is not comparable, None if it is."""
    # Float32 sums over the vocabulary and over tokens, in other orders: a few hundred roundings at most.
    try:
        torch.testing.assert_close(step(), truth(), rtol=1e-5, atol=1e-6)
        for got, want in zip(step.gradients(), truth.gradients(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def measure(case: Case) -> list[dict[str, Any]]:
    """Return a row for every method."""
    truth = Step(case, METHODS["F.cross_entropy"])
    steps = {name: Step(case, loss) for name, loss in METHODS.items()}
    failures = {name: check(step, truth) for name, step in steps.items()}
    sound = {name: step for name, step in steps.items() if failures[name] is None}
    times: dict[str, list[float]] = {name: [] for name in sound}
    for _ in range(ROUNDS):
        for name, step in sound.items():
            times[name].append(step.seconds())
    rows = []
    for name in METHODS:
        row: dict[str, Any] = {"method": name, **asdict(case)}
        if name in sound:
            row |= quantiles(times[name])
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                row["extra_bytes"] = child.submit(extra_bytes, case, name).result()
        else:
            row["failure"] = failures[name]
        rows.append(row)
    return rows


def main() -> None:
    """Measure every case and write results/cpu.json."""
    warnings.filterwarnings(
        "ignore", message=".*options.* ignored.*"
    )  # torch_chunked, with smoothing
    rows = [row for case in track(CASES, "measuring") for row in measure(case)]
    path = RESULTS / "cpu.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"{path}\nnow: python -m benchmarks.render")


if __name__ == "__main__":
    main()
