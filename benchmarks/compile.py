"""Graphs, breaks and recompiles of what the tests compile, from cold: `python -m benchmarks.compile`.

The cases, and what they are compared with, are those of tests/integrations/compile_cases.py. A case that fails, or
whose loss or gradients are off, is a row with the reason and without counts. Nothing is timed, so that as many run at
a time as there are cores; the file is written after every row.
"""

import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from rich.progress import track
from tests.integrations.compile_cases import CASES, Case, cold_counts

from .step import machine

RESULTS = Path(__file__).parent / "results" / "compile.json"


def row(cache: str, case: Case) -> dict[str, Any]:
    """Return what, mode and backend with the counts, or why there are none."""
    try:
        return asdict(case) | asdict(cold_counts(case, cache))
    except Exception as error:  # whatever the compiler may raise
        return asdict(case) | {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    """Count every case and write results/compile.json."""
    where = machine() | {"transformers": transformers.__version__}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(os.cpu_count()) as threads:
        counted = threads.map(partial(row, cache), CASES)
        for found in track(counted, "compiling", total=len(CASES)):
            rows.append(found)
            RESULTS.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    print(RESULTS)


if __name__ == "__main__":
    main()
