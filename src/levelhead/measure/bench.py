"""Compare head and loss by several methods on the same tensors: check them, weigh them, then time them in turns."""

import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import footprint, memory
from .footprint import Problem
from .gate import SLICE, Gate
from .methods import DENSE, OURS, dense, fused, torch_fused
from .timing import Method, Step, interleaved, quantiles

LEVELHEAD, TORCH = OURS, "F.linear_cross_entropy"
TRAINED, FROZEN = "forward+backward", "frozen head"
OUT_OF_MEMORY, LEFT_OUT = "out of memory", "left out"  # how a failure begins that is no fault
_SECONDS = 45.0  # of a minute; Python and torch take the rest before and after
_ESTIMATED = 0.9  # the share of the time that estimates may fill
_ROUNDS = 9
_ROUNDS_SECONDS = 16.0
_ROWS = 4096  # different rows of the head
_SHORT = 0.5  # seconds; a shorter run is estimated from a second one
_WIDTH = 256  # of the smaller head that times are estimated from
_MOST, _USUAL, _LEAST = 8192, 64, 16  # tokens
_FEWEST_ROUNDS = 3  # that there must be time for before there are more tokens than usual

Key = tuple[str, str]  # method and mode


def _torch_fused(*arguments: Any) -> Tensor:
    with warnings.catch_warnings():  # with label smoothing it warns that it falls back
        warnings.filterwarnings("ignore", message=".*options.* ignored.*")
        return torch_fused("chunked", *arguments)


LOSSES: dict[str, Method] = {DENSE: dense, TORCH: _torch_fused, LEVELHEAD: fused(None)}
if not hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch < 2.13
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


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        problem: Shapes, dtype and device.
        tokens_are: Why it is so many tokens.
        smoothing: Label smoothing.
        device: The name of the device.
        rows: One for each method and mode.
    """

    problem: Problem
    tokens_are: str
    smoothing: float
    device: str
    rows: list[Outcome]

    @property
    def faults(self) -> list[str]:
        """Why Levelhead, which must run wherever it fits, has no numbers; empty if it has."""
        return [
            f"{row.mode}: {row.failure}"
            for row in self.rows
            if row.method == LEVELHEAD
            and row.failure
            and not row.failure.startswith((OUT_OF_MEMORY, LEFT_OUT))
        ]


def bench(
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int | None = None,
    smoothing: float = 0.1,
) -> Bench:
    """Measure time and peak memory of head and loss by every method of LOSSES, on random operands.

    Args:
        hidden: Width of the head's input, D.
        vocabulary: Rows of the head, V.
        dtype: Of weight and hidden states.
        tokens: N, however long it takes; None: what fits a minute and the memory.
        smoothing: Label smoothing, in [0, 1].

    Raises:
        ValueError: The head does not fit into the free memory, alone or with so many tokens.
    """
    end = time.monotonic() + _SECONDS
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    one = Problem(1, hidden, vocabulary, dtype, device=device.type)
    free = memory.free(device)
    if _operand_bytes(one) > free:
        raise ValueError(
            f"a head of {vocabulary} x {hidden} and its gradient need {_operand_bytes(one) / 2**30:.1f} GiB for this, "
            f"{free / 2**30:.1f} GiB are free; try --dtype bf16 or a smaller model"
        )
    methods: Collection[str] = LOSSES
    if tokens is None:
        tokens, methods, why = _choose(one, smoothing, free, _ESTIMATED * (end - time.monotonic()))
    else:
        why, end = "asked for", math.inf
    problem = replace(one, tokens=tokens)
    left = free - _operand_bytes(problem)
    if left <= 0:
        raise ValueError(
            f"{tokens} tokens and the head need {_operand_bytes(problem) / 2**30:.1f} GiB before any loss, "
            f"{free / 2**30:.1f} GiB are free; give fewer --tokens"
        )
    cpu = f"{device.type}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    rows = _compare(problem, smoothing, methods, free=left, end=end)
    return Bench(problem, why, smoothing, name, rows)


def _compare(
    problem: Problem, smoothing: float, methods: Collection[str], *, free: int, end: float
) -> list[Outcome]:
    """Return every method in both modes.

    Args:
        problem: Shapes, dtype and device; whether it is frozen does not matter.
        smoothing: Label smoothing.
        methods: Those of LOSSES for which there is time; the rows of the others say that there is none.
        free: Bytes that a method's peak may take; the row of one that would take more says so.
        end: When to be done, by time.monotonic: what would take longer is left out, and its row says so. Only
            Levelhead is checked in any case, with a trained head.
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


def _choose(
    one: Problem, smoothing: float, free: int, seconds: float
) -> tuple[int, Collection[str], str]:
    """Return the tokens to measure, a power of two; the methods for which there is time; and why not more tokens.

    Args:
        one: The head, with any number of tokens.
        smoothing: Label smoothing.
        free: Bytes.
        seconds: What all of it may take.
    """

    def estimated(tokens: int, methods: Collection[str]) -> dict[str, float]:
        some = replace(one, tokens=tokens)
        # On a CPU memory is measured with one thread.
        slowdown = torch.get_num_threads() if one.device == "cpu" else 1
        runs = 2 + slowdown + (_FEWEST_ROUNDS if tokens > _USUAL else 0)  # checks, peaks, rounds
        return {
            name: runs * taken for name, taken in _step_seconds(some, smoothing, methods).items()
        }

    least = estimated(_LEAST, LOSSES)
    # Torch's fused loss cuts a wide head into parts of few tokens, each of which goes through the whole weight.
    methods = [name for name in LOSSES if name != TORCH or least[name] <= seconds / 2]
    tokens, more = _LEAST, _USUAL
    taken = sum(least[name] for name in methods)
    while taken <= seconds and tokens < _MOST:
        some = replace(one, tokens=more)
        need = _operand_bytes(some) + max(_method_bytes(name, some, smoothing) for name in methods)
        if need > (free if more <= _USUAL else free / 2):
            return tokens, methods, "more would take too much of the free memory"
        taken = sum(estimated(more, methods).values())
        if taken <= seconds:
            tokens, more = more, 2 * more
    if tokens >= _MOST:
        return tokens, methods, "enough for steady times"
    few = "; times at so few say little of training" if tokens < _USUAL else ""
    return tokens, methods, f"more would take over a minute{few}"


def _operand_bytes(problem: Problem) -> int:
    """Return what operands and gradients take, and the check beside them."""
    numbers = (problem.tokens + problem.vocabulary) * problem.hidden
    return (2 * problem.dtype.itemsize + 8) * numbers + 40 * SLICE * problem.vocabulary


def _method_bytes(name: str, problem: Problem, smoothing: float) -> int:
    """Return what a method is expected to take at its peak, gradients included."""
    formula = footprint.dense if name == DENSE or smoothing else footprint.torch_chunked
    formula = footprint.levelhead_chunked if name == LEVELHEAD else formula
    return footprint.peak(footprint.Method(name, formula), problem).total


def _step_seconds(problem: Problem, smoothing: float, methods: Collection[str]) -> dict[str, float]:
    """Estimate the seconds that one run of some methods takes, in both modes together.

    From a head of the same proportions, smaller if this one is wide: methods cut a head into parts by its proportions,
    and the time of all of them grows with the product of its sizes.
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
    """Make a step for each mode and method, all on the same tensors, with logits of a few units."""
    device = torch.device(problem.device)
    random = torch.Generator(device).manual_seed(0)
    n, d, v, dtype = problem.tokens, problem.hidden, problem.vocabulary, problem.dtype
    x = torch.randn(n, d, dtype=dtype, generator=random, device=device).requires_grad_()
    # The same rows repeat: random numbers for a large head would take longer than its loss.
    rows = torch.randn(min(v, _ROWS), d, dtype=dtype, generator=random, device=device)
    weight = rows.mul_(3 / d**0.5)[torch.arange(v, device=device) % len(rows)]
    target = torch.randint(v, (n,), generator=random, device=device)
    return {
        (name, mode): Step(loss, x, head, target, smoothing)
        for mode, head in ((TRAINED, weight.detach().requires_grad_()), (FROZEN, weight))
        for name, loss in LOSSES.items()
    }


def _excluded(name: str, mode: str, problem: Problem, smoothing: float, free: int) -> str:
    """Return why a method cannot run; empty if it can."""
    need = _method_bytes(name, replace(problem, frozen=mode == FROZEN), smoothing)
    if need <= free:
        return ""
    return f"{OUT_OF_MEMORY}: needs about {need / 2**30:.2f} GiB, {free / 2**30:.2f} are free"


def _check(steps: dict[Key, Step], rows: dict[Key, Outcome], end: float) -> dict[Key, float]:
    """Fill in the error of each method, or why it is not timed; return the seconds that its run took."""
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
    """Fill in the peak of each method that has seconds, or why there is none."""
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
    """Return the extra bytes of those methods and modes for which there is time; None: they cannot be measured.

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
