"""The CPU benchmark: `make bench`, `python -m benchmarks`. Everything that a user could pick, side by side.

Writes results/cpu.json after every group of cases, and prints the verdicts on the targets (targets.py). It ends in
time: what ten minutes do not hold is a row that says so. How it measures: measure.py.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from levelhead.measure.methods import COMPILED, CPU_METHODS, CPU_STATISTICS, DENSE, OURS, STATISTICS

from . import training
from .measure import RESULTS, CpuClock, Group, Row, line, measure, unmeasured, write
from .shapes import OVER_TOKENS, OVER_VOCABULARY, SHAPES
from .step import Case, machine
from .targets import cpu_verdicts, said
from .training import Training

# Of the ten minutes of `make bench`: after these no new group begins.
SECONDS = 530
TOKENS, MODEL = 1024, "SmolLM2 135M"  # what every method and mode is measured on
VOCABULARIES, SEQUENCES = (16384, 65536, 262144), (128, 512, 2048)
TINY = {"n": 96, "d": 16, "v": 640}


def plan() -> list[Group]:
    """Return what is measured together, the most important first."""

    def some(*names: str) -> Any:
        return {name: CPU_METHODS[name] for name in names}

    def at(
        shape: str, *smoothings: float, n: int = TOKENS, **options: Any
    ) -> tuple[str, list[Case]]:
        v, d = SHAPES[shape]
        return shape, [Case(n, d, v, eps, **options) for eps in smoothings]

    vocabularies = [
        (OVER_VOCABULARY, [Case(512, 128, v)], some(DENSE, COMPILED, OURS)) for v in VOCABULARIES
    ]
    return [
        (*at(MODEL, 0.1, 0.0), CPU_METHODS),
        (*at(MODEL, 0.1, mode="frozen head"), some(DENSE, COMPILED, OURS)),
        (*at(MODEL, 0.1, mode="forward"), some(DENSE, COMPILED, OURS)),
        (*at(MODEL, 0.0, mode=STATISTICS), CPU_STATISTICS),
        *vocabularies,
        *((OVER_TOKENS, [Case(n, 256, 50257)], some(DENSE, OURS)) for n in SEQUENCES),
        (*at("Qwen2.5 0.5B", 0.1), some(DENSE, OURS)),
        (
            *at(MODEL, 0.1, 0.0, dtype="bfloat16", n=256),
            some(DENSE, "transformers, LabelSmoother", "TRL, fused head", OURS),
        ),
    ]


def tiny(groups: list[Group]) -> list[Group]:
    """Return the same in sizes that take no time, to see whether everything runs."""

    def smaller(shape: str, case: Case) -> Case:
        sizes = dict(TINY)
        if shape == OVER_VOCABULARY:
            sizes["v"] = case.v // 64
        if shape == OVER_TOKENS:
            sizes["n"] = case.n // 8
        return replace(case, **sizes)

    return [
        (shape, [smaller(shape, case) for case in cases], methods)
        for shape, cases, methods in groups
    ]


def run(groups: list[Group], trained: Training, path: Path, seconds: float) -> Row:
    """Measure groups and training steps for as long as the time allows, write and return the results."""
    start, clock = time.perf_counter(), CpuClock()
    results: Row = {"machine": machine(), "rows": [], "training": [], "verdicts": []}

    def keep(**found: list[Row]) -> None:
        for name, rows in found.items():
            results[name] += rows
        results["verdicts"] = cpu_verdicts(results["rows"])
        results["machine"]["seconds"] = round(time.perf_counter() - start, 1)
        write(path, results)

    try:
        for index, group in enumerate(groups):
            if time.perf_counter() - start < seconds:
                rows = measure(*group, clock)
            else:
                late = {"failure": f"not measured: the {seconds:g} seconds were over"}
                rows = [row | late for row in unmeasured(*group)]
            print("\n".join(map(line, rows)), flush=True)
            keep(rows=rows)
            if index == 0:  # next in importance
                keep(training=training.measure(trained, clock))
    finally:
        clock.close()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the verdicts and write cpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="sizes that take no time; needs --output"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of cpu.json")
    options = parser.parse_args(arguments)
    if options.tiny and options.output == RESULTS:
        parser.error("--tiny measures nothing that anybody should keep: give it another --output")
    # Compilers deprecate each other's parts; what methods say for their users is kept in the rows.
    warnings.simplefilter("ignore")
    groups, trained = plan(), Training()
    if options.tiny:
        groups, trained = tiny(groups), Training(v=640, d=16, n=64, longest=128)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "cpu.json"
    results = run(groups, trained, path, SECONDS)
    for verdict in results["verdicts"]:
        print(said(verdict))
    print(f"{path}, {results['machine']['seconds']:.0f} s\nnow: python -m benchmarks.render")
    return 0


if __name__ == "__main__":
    sys.exit(main())
