"""How rows are measured, on any device: correctness first, then times, taken in turns.

A method whose loss or gradients are off, or that does not run, is a row with the reason and without times. The others
take turns, smoothed and not, so that a machine's bad minute hits all of them. So do the bare products, the floor: the
three multiplications of forward and backward (6 NVD, NVD being one multiply-add per token, vocabulary entry and hidden
unit) with nothing between them.
"""

import gc
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from levelhead.measure import memory
from levelhead.measure.methods import STATISTICS, baseline
from levelhead.measure.timing import Method

from .gate import Gate
from .step import Case, Step, extra_bytes, quantiles

Row = dict[str, Any]
Group = tuple[str, list[Case], dict[str, Method]]  # shape, cases that differ in eps alone, methods

RESULTS = Path(__file__).parent / "results"
PRODUCTS = "bare products"
# As many rounds as these seconds hold, within these bounds.
FEWEST, MOST, ROUNDS_SECONDS = 3, 7, 12.0
# A peer may accumulate its gradients in bfloat16, over tens of chunks. Leaving out the smoothing would be 5 budgets:
# a tenth of the largest gradient beside two and a half roundings of bfloat16, 2^-7 each.
PEERS_BUDGETS = 4


class Clock(Protocol):
    """What measures a run."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one run."""
        ...

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        """Return the peak of each beyond what stood before and the gradients that it leaves, or why there is none."""
        ...


class CpuClock:
    """Wall time here, and peaks of resident memory in two other processes."""

    def __init__(self) -> None:
        self._processes = _processes(2)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the wall time of one run."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        """Return the peaks of resident memory."""
        return self.elsewhere(extra_bytes, [(step.case, step.loss) for step in steps])

    def elsewhere(
        self, function: Callable[..., Any], arguments: list[tuple[Any, ...]]
    ) -> list[Any]:
        """Return what a function gives in a prepared process, or why it gives nothing, as a string."""
        futures = [self._processes.submit(function, *given) for given in arguments]
        results, broken = [], False
        for future, given in zip(futures, arguments, strict=True):
            try:
                results.append(future.result())
            except BrokenProcessPool:  # by this one or by another
                broken = True
                results.append(_alone(function, given))
            except Exception as error:  # whatever a peer may raise
                results.append(reason(error))
        if broken:
            self._processes = _processes(2)
        return results

    def close(self) -> None:
        """End the processes."""
        self._processes.shutdown()


def _processes(count: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, initializer=_prepare)


def _alone(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return what a function gives where no other can end its process, or why it gives nothing."""
    with _processes(1) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool:
            return "killed, as what takes too much memory is"
        except Exception as error:
            return reason(error)


def _prepare() -> None:
    warnings.simplefilter("ignore")  # they were heard in the first process
    if not memory.prepare(torch.device("cpu")):
        raise RuntimeError("peak memory is read from /proc: benchmarks need Linux with glibc")


def measure(shape: str, cases: list[Case], methods: dict[str, Method], clock: Clock) -> list[Row]:
    """Return a row for every method and case, and one for the bare products; the cases differ in eps alone."""
    torch.compiler.reset()  # past its eighth program of a function it would run the rest uncompiled
    rows = unmeasured(shape, cases, methods)
    try:
        times = _times(rows, cases, methods, clock)
    except RuntimeError as error:
        # An error of its own class on a GPU; on a CPU one that says so.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        failure = {"failure": "out of memory for the tensors of the case, or its float64 truth"}
        return [row | failure for row in rows]
    for row, seconds in zip(rows, times, strict=True):
        row |= quantiles(seconds) if seconds else {}
    for row in rows:
        if "ms_p50" in row:
            row["of_products"] = row["ms_p50"] / rows[-1]["ms_p50"]
    return rows


def unmeasured(shape: str, cases: list[Case], methods: dict[str, Method]) -> list[Row]:
    """Return the rows without what is measured."""
    op = "linear_logit_stats" if cases[0].mode == STATISTICS else "linear_cross_entropy"
    named = [(case, name) for case in cases for name in methods]
    rows = [{"op": op, "shape": shape, "method": name, **asdict(case)} for case, name in named]
    return [*rows, {"op": op, "shape": shape, "method": PRODUCTS, **asdict(cases[0]), "eps": None}]


def _times(
    rows: list[Row], cases: list[Case], methods: dict[str, Method], clock: Clock
) -> list[list[float]]:
    """Return the seconds of each row's runs, none for a method that fails, and fill in the rest of the row."""
    base = Step(cases[0], baseline(cases[0].mode))
    steps: list[Step] = []
    for case in cases:
        gate = Gate(base.using(base.loss, case.eps))
        for name, method in methods.items():
            step = base.using(method, case.eps)
            rows[len(steps)] |= admit(name, step, gate)
            steps.append(step)
        del gate  # its truth is four times a bfloat16 weight
    sound = [index for index in range(len(steps)) if "failure" not in rows[index]]
    peaks = clock.extra_bytes([steps[index] for index in sound])
    for index, peak in zip(sound, peaks, strict=True):
        rows[index]["failure" if isinstance(peak, str) else "extra_bytes"] = peak
    return take_turns(rows, [*steps, products(base)], clock)


def take_turns(
    rows: list[Row], runs: Sequence[Callable[[], object]], clock: Clock
) -> list[list[float]]:
    """Return the seconds of the runs whose rows have no failure, in rounds."""
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for turn in range(MOST):
        if turn >= FEWEST and time.perf_counter() - start > ROUNDS_SECONDS:
            break
        for row, run, seconds in zip(rows, runs, times, strict=True):
            if "failure" not in row:
                seconds.append(clock.seconds(run))
    return times


def admit(name: str, step: Step, gate: Gate) -> Row:
    """Run a method once and return its error, or why it is not timed."""
    limit = 1 if name.startswith("levelhead") else PEERS_BUDGETS
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            errors = gate.errors(step)
        if not errors["error"] <= limit:
            raise ArithmeticError(f"its error is {errors['error']:.2g} times the budget")
        gradients = sum(gradient.nbytes for gradient in step.gradients())
        said = [str(w.message) for w in caught if w.category is UserWarning]
        return errors | {"gradient_bytes": gradients} | ({"warns": said[0]} if said else {})
    except Exception as error:  # whatever a peer may raise; out of memory too
        failure = reason(error)
    step.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return {"failure": failure}


def reason(error: BaseException) -> str:
    """Return an error as rows hold it: its type and the first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def products(step: Step) -> Callable[[], None]:
    """Return the products that a step cannot avoid, in the dtype of the input: one, two or all three."""
    x, weight = step.x.detach(), step.weight.detach().to(step.x.dtype)
    count = {"forward": 1, STATISTICS: 1, "frozen head": 2}.get(step.case.mode, 3)
    dz = x.new_empty(len(x), len(weight))  # of all tokens: nothing to accumulate
    dx, dw = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.T, out=dz)
        if count > 1:
            torch.mm(dz, weight, out=dx)
        if count > 2:
            torch.mm(dz.T, x, out=dw)

    return run


def line(row: Row) -> str:
    """Return a row as it is printed."""
    eps = "" if row["eps"] is None else f"eps {row['eps']:g}"
    dtype = row["dtype"] + (", autocast" if row["autocast"] else "")
    size = f"{row['shape']}, N = {row['n']}"
    head = f"{size:32}{row['mode']:17}{dtype:19}{eps:8}{row['method']:45}"
    if "failure" in row:
        return head + row["failure"]
    extra = f"{row['extra_bytes'] / 2**20:8.0f} MiB" if "extra_bytes" in row else ""
    return f"{head}{row['ms_p50']:9.2f} ms {row['of_products']:6.2f} x{extra}"


def write(path: Path, results: Row) -> None:
    """Write results as JSON, a row a line; the file is whole at any moment."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            value = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            value = json.dumps(value, indent=1)
        parts.append(f'"{name}": {value}')
    part = path.with_name(f"{path.name}.part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    part.replace(path)
