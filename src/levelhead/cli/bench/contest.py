"""Head and loss by several methods on the same tensors: first right, then weighed, then timed in turns."""

import math
import multiprocessing
import time
import warnings
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import levelhead

from .. import memory
from ..plan import footprint
from ..plan.footprint import Problem
from .gate import SLICE, Gate
from .measure import Loss, Step, interleaved, quantiles

LEVELHEAD, DENSE, TORCH = "levelhead", "F.cross_entropy", "F.linear_cross_entropy"
TRAINED, FROZEN = "forward+backward", "frozen head"
OUT_OF_MEMORY, LEFT_OUT = "out of memory", "left out"  # how a failure that is no fault begins
_ROUNDS = 9
_ROUNDS_SECONDS = 16.0
_ROWS = 4096  # of the head that differ
_SHORT = 0.5  # seconds of a run that is foretold from a second one
_WIDTH = 256  # of the head by which times are foretold

Key = tuple[str, str]  # method and mode


def _dense(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target, label_smoothing=smoothing)


def _torch_fused(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    with warnings.catch_warnings():  # with label smoothing it says that it falls back
        warnings.filterwarnings("ignore", message=".*options.* ignored.*")
        return F.linear_cross_entropy(x, weight, target, label_smoothing=smoothing, options=options)


def _levelhead(x: Tensor, weight: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return levelhead.linear_cross_entropy(x, weight, target, label_smoothing=smoothing)


LOSSES: dict[str, Loss] = {DENSE: _dense, TORCH: _torch_fused, LEVELHEAD: _levelhead}
if not hasattr(F, "linear_cross_entropy"):  # torch < 2.13
    del LOSSES[TORCH]


@dataclass(frozen=True)
class Outcome:
    """What one method took in one mode, or why it has no numbers.

    Attributes:
        method: Its name.
        mode: "forward+backward", or "frozen head" where the weight has no gradient.
        ms_p20: 20th percentile of its times, in milliseconds; ms_p50 the median, ms_p80 the 80th.
        rounds: How many times there are.
        extra_bytes: Peak beyond inputs and gradients.
        error: Its largest error as a share of what it may be.
        failure: Why there are no numbers; empty if there are.
        unweighed: Why there are times and no peak; empty if there is one.
    """

    method: str
    mode: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    rounds: int = 0
    extra_bytes: int | None = None
    error: float | None = None
    failure: str = ""
    unweighed: str = ""


def compete(
    problem: Problem, smoothing: float, methods: Collection[str], *, free: int, end: float
) -> list[Outcome]:
    """Every method in both modes, on random operands.

    Args:
        problem: Shapes, dtype and device; whether it is frozen does not matter.
        smoothing: Label smoothing.
        methods: Those of LOSSES for which there is time; of the others a row says that there is none.
        free: Bytes that a method's peak may take; one that would take more is a row that says so.
        end: When to be done, by time.monotonic: what would take longer is left out, and a row says so. Only Levelhead
            is checked in any case, with a trained head.
    """
    steps = _steps(problem, smoothing)
    rows = {
        (name, mode): Outcome(name, mode, failure=_excluded(name, mode, problem, smoothing, free))
        for name, mode in steps
    }
    for key in rows:
        if key[0] not in methods:
            rows[key] = replace(rows[key], failure=f"{LEFT_OUT}: a run of it would take too long")
    first = _check(steps, rows, end)
    sound = {key: steps[key] for key, row in rows.items() if not row.failure}

    def rounds(most: int, seconds: float, whole: float) -> dict[Key, list[float]]:
        left = min(seconds, end - time.monotonic())
        return interleaved(sound, rounds=most, seconds=left, round_seconds=whole)

    # The checked runs paid for memory that the process did not have yet: a round knows better what the next ones take.
    once = rounds(1, math.inf, sum(first[key] for key in sound))
    seconds = {key: (once[key] or [first[key]])[0] for key in sound}
    _weigh(rows, problem, smoothing, seconds, end)
    more = rounds(_ROUNDS - 1, _ROUNDS_SECONDS, sum(seconds.values()))
    for key in sound:
        taken = [*once[key], *more[key]] or [first[key]]
        low, middle, high = quantiles(taken).values()
        rows[key] = replace(rows[key], ms_p20=low, ms_p50=middle, ms_p80=high, rounds=len(taken))
    return list(rows.values())


def operand_bytes(problem: Problem) -> int:
    """What operands and gradients take, and the check beside them."""
    numbers = (problem.tokens + problem.vocabulary) * problem.hidden
    return (2 * problem.dtype.itemsize + 8) * numbers + 40 * SLICE * problem.vocabulary


def method_bytes(name: str, problem: Problem, smoothing: float) -> int:
    """What a method is expected to take at its peak, its gradients included."""
    formula = footprint.dense if name == DENSE or smoothing else footprint.torch_chunked
    formula = footprint.levelhead_chunked if name == LEVELHEAD else formula
    return footprint.peak(footprint.Method(name, formula), problem).total


def step_seconds(problem: Problem, smoothing: float, methods: Collection[str]) -> dict[str, float]:
    """Seconds that one run of some methods takes, in both modes together.

    Measured on a head of the same proportions, smaller where this one is wide: methods cut a head into parts by
    these, and all of them take time by the product of the sizes.
    """
    factor = min(4, max(1, problem.hidden // _WIDTH))
    small = replace(
        problem,
        hidden=-(-problem.hidden // factor),
        vocabulary=-(-problem.vocabulary // factor),
    )
    larger = problem.weight_numbers / small.weight_numbers
    seconds = dict.fromkeys(methods, 0.0)
    for (name, _), step in _steps(small, smoothing).items():
        if name in methods:
            taken = step.timed()[1]
            if taken < _SHORT:  # the first run may have been slower
                taken = min(taken, step.timed()[1])
            seconds[name] += larger * taken
            step.clear()
    return seconds


def _steps(problem: Problem, smoothing: float) -> dict[Key, Step]:
    """A step for each mode and method, all on the same tensors, with logits of a few units."""
    device = torch.device(problem.device)
    random = torch.Generator(device).manual_seed(0)
    n, d, v, dtype = problem.tokens, problem.hidden, problem.vocabulary, problem.dtype
    x = torch.randn(n, d, dtype=dtype, generator=random, device=device).requires_grad_()
    # Some rows again and again: random numbers for a large head would take longer than its loss.
    rows = torch.randn(min(v, _ROWS), d, dtype=dtype, generator=random, device=device)
    weight = rows.mul_(3 / d**0.5)[torch.arange(v, device=device) % len(rows)]
    target = torch.randint(v, (n,), generator=random, device=device)
    return {
        (name, mode): Step(loss, x, head, target, smoothing)
        for mode, head in ((TRAINED, weight.detach().requires_grad_()), (FROZEN, weight))
        for name, loss in LOSSES.items()
    }


def _excluded(name: str, mode: str, problem: Problem, smoothing: float, free: int) -> str:
    """Why a method cannot run; empty if it can."""
    need = method_bytes(name, replace(problem, frozen=mode == FROZEN), smoothing)
    if need <= free:
        return ""
    return f"{OUT_OF_MEMORY}: needs about {need / 2**30:.2f} GiB, {free / 2**30:.2f} are free"


def _check(steps: dict[Key, Step], rows: dict[Key, Outcome], end: float) -> dict[Key, float]:
    """Fills in the error of each method, or why it is not to be timed; returns the seconds that its run took."""
    gate = Gate(steps[LEVELHEAD, TRAINED])
    seconds: dict[Key, float] = {}
    errors: dict[Key, list[float]] = {}
    # Levelhead goes first, and says what time the others may need.
    for key in sorted(steps, key=lambda key: (key[1] == FROZEN, key[0] != LEVELHEAD)):
        row, step = rows[key], steps[key]
        if row.failure:
            continue
        need = seconds.get((row.method, TRAINED), max(seconds.values(), default=0.0))
        if key != (LEVELHEAD, TRAINED) and time.monotonic() + need > end:
            rows[key] = replace(row, failure=f"{LEFT_OUT}: no time left")
            continue
        try:
            loss, seconds[key] = step.timed()
            errors[key] = gate.errors([loss, *step.gradients()])
        except Exception as error:  # whatever it is, the other methods are of interest still
            rows[key] = replace(row, failure=_reason(error))
        finally:
            step.clear()
    gate.measure(errors.get((DENSE, TRAINED)) or errors.get((DENSE, FROZEN)) or [])
    for key, found in errors.items():
        share = gate.share(found)
        wrong = "" if share <= 1 else f"wrong: its error is {share:.3g} times what it may be"
        # JSON has no NaN.
        rows[key] = replace(rows[key], error=None if share != share else share, failure=wrong)
    return seconds


def _reason(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    short = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return f"{OUT_OF_MEMORY}: {line}" if short else line


def _weigh(
    rows: dict[Key, Outcome],
    problem: Problem,
    smoothing: float,
    seconds: dict[Key, float],
    end: float,
) -> None:
    """Fills in the peak of each method that has seconds, or why there is none."""
    peaks: dict[Key, int] | None
    if problem.device != "cpu":
        peaks = _peaks(problem, smoothing, seconds, 1, end)
    else:  # a fresh process: in one that has run before, memory that was kept would hide a part
        threads = torch.get_num_threads()  # there is one there
        soonest = time.monotonic() + threads * min(seconds.values(), default=0.0)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            try:
                peaks = (
                    {}
                    if soonest > end
                    else child.submit(_peaks, problem, smoothing, seconds, threads, end).result()
                )
            except BrokenProcessPool:  # killed, most likely for want of memory
                peaks = None
    for key in seconds:
        size = None if peaks is None else peaks.get(key)
        why = "not measurable here" if peaks is None else "no time left" if size is None else ""
        rows[key] = replace(rows[key], extra_bytes=size, unweighed=why)


def _peaks(
    problem: Problem, smoothing: float, seconds: dict[Key, float], slowdown: float, end: float
) -> dict[Key, int] | None:
    """The extra bytes of those methods and modes for which there is time; None: they cannot be measured.

    A run takes its seconds times `slowdown`, until the first one has shown how much longer it takes here.
    """
    if not memory.prepare(torch.device(problem.device)):
        return None
    few = replace(problem, tokens=1, vocabulary=min(problem.vocabulary, _ROWS))
    for step in _steps(few, smoothing).values():
        step()  # libraries allocate for good on their first call
    steps, peaks = _steps(problem, smoothing), {}
    for key, taken in seconds.items():
        start = time.monotonic()
        if start + slowdown * taken <= end:
            peaks[key] = steps[key].extra_bytes()
            steps[key].clear()
            slowdown = (time.monotonic() - start) / taken
    return peaks
