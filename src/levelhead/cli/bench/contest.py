"""Head and loss by several methods on the same tensors: first right, then timed in turns, then weighed."""

import multiprocessing
import time
import warnings
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
_ROUNDS = 9
_ROWS = 4096
_SECONDS = 8.0  # of rounds, for each mode


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
        extra_bytes: Peak beyond inputs and gradients; None where it cannot be measured.
        error: Its largest error as a share of what it may be.
        failure: Why there are no numbers; empty if there are.
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


def compete(problem: Problem, smoothing: float, free: int) -> list[Outcome]:
    """Every method in both modes, on random operands.

    Args:
        problem: Shapes, dtype and device; whether it is frozen does not matter.
        smoothing: Label smoothing.
        free: Bytes that a method's peak may take; one that would take more is a row that says so.
    """
    outcomes: list[Outcome] = []
    for frozen, mode in ((False, "forward+backward"), (True, "frozen head")):
        outcomes += _timed(replace(problem, frozen=frozen), smoothing, mode, free)
    return _weighed(outcomes, problem, smoothing)


def operand_bytes(problem: Problem) -> int:
    """What operands and gradients take, and the check against float32 beside them."""
    numbers = (problem.tokens + problem.vocabulary) * problem.hidden
    return (2 * problem.dtype.itemsize + 8) * numbers + 12 * SLICE * problem.vocabulary


def method_bytes(name: str, problem: Problem, smoothing: float) -> int:
    """What a method is expected to take at its peak, its gradients included."""
    formula = footprint.dense if name == DENSE or smoothing else footprint.torch_chunked
    formula = footprint.levelhead_chunked if name == LEVELHEAD else formula
    return footprint.peak(footprint.Method(name, formula), problem).total


def product_seconds(problem: Problem) -> float:
    """Seconds that a product of 2 NVD takes here, by 64 tokens of it; for fewer, reading the weight sets the pace."""
    few = replace(problem, tokens=min(problem.tokens, 64))
    x, weight, *_ = _steps(few, [LEVELHEAD], 0)[LEVELHEAD].operands
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        F.linear(x, weight).sum().item()
        taken.append(time.perf_counter() - start)
    return min(taken) * problem.tokens / few.tokens


def _steps(problem: Problem, names: list[str], smoothing: float) -> dict[str, Step]:
    """A step for each method, all on the same tensors, with logits of a few units."""
    device = torch.device(problem.device)
    random = torch.Generator(device).manual_seed(0)
    n, d, v, dtype = problem.tokens, problem.hidden, problem.vocabulary, problem.dtype
    x = torch.randn(n, d, dtype=dtype, generator=random, device=device).requires_grad_()
    # Some rows again and again: random numbers for a large head would take longer than its loss.
    rows = torch.randn(min(v, _ROWS), d, dtype=dtype, generator=random, device=device)
    weight = rows.mul_(3 / d**0.5)[torch.arange(v, device=device) % len(rows)]
    weight.requires_grad_(not problem.frozen)
    target = torch.randint(v, (n,), generator=random, device=device)
    return {name: Step(LOSSES[name], x, weight, target, smoothing) for name in names}


def _timed(problem: Problem, smoothing: float, mode: str, free: int) -> list[Outcome]:
    """The rows of one mode, without peaks."""
    failures, shares = dict.fromkeys(LOSSES, ""), dict.fromkeys(LOSSES, float("nan"))
    for name in LOSSES:
        need = method_bytes(name, problem, smoothing)
        if need > free:
            failures[name] = (
                f"out of memory: needs about {need / 2**30:.2f} GiB, {free / 2**30:.2f} are free"
            )
    able = [name for name in LOSSES if not failures[name]]
    steps = _steps(problem, able, smoothing)
    if steps:
        gate = Gate(steps[able[-1]], steps.get(DENSE))
        for name, step in steps.items():
            failures[name], shares[name] = _checked(gate, step)
    sound = {name: step for name, step in steps.items() if not failures[name]}
    times = interleaved(sound, rounds=_ROUNDS, seconds=_SECONDS, least=1)
    return [
        _outcome(name, mode, times.get(name, []), shares[name], failures[name]) for name in LOSSES
    ]


def _checked(gate: Gate, step: Step) -> tuple[str, float]:
    """Why a method is not to be timed, empty if it is; and its error."""
    try:
        share = gate.share(step)
    except Exception as error:  # whatever it is, the other methods are of interest still
        return _reason(error), float("nan")
    return ("" if share <= 1 else f"wrong: its error is {share:.3g} times what it may be"), share


def _reason(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    short = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return f"out of memory: {line}" if short else line


def _outcome(name: str, mode: str, times: list[float], share: float, failure: str) -> Outcome:
    error = share if share == share else None  # JSON has no NaN
    row = Outcome(name, mode, rounds=len(times), error=error, failure=failure)
    if not times:
        return row
    low, middle, high = quantiles(times).values()
    return replace(row, ms_p20=low, ms_p50=middle, ms_p80=high)


def _weighed(outcomes: list[Outcome], problem: Problem, smoothing: float) -> list[Outcome]:
    """The rows with their peaks."""
    jobs = [(row.method, row.mode) for row in outcomes if not row.failure]
    if problem.device != "cpu":
        peaks = _peaks(problem, smoothing, jobs)
    else:  # a fresh process: in one that has run before, memory that was kept would hide a part
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            try:
                peaks = child.submit(_peaks, problem, smoothing, jobs).result()
            except BrokenProcessPool:  # killed, most likely for want of memory
                peaks = {}
    return [replace(row, extra_bytes=peaks.get((row.method, row.mode))) for row in outcomes]


def _peaks(
    problem: Problem, smoothing: float, jobs: list[tuple[str, str]]
) -> dict[tuple[str, str], int]:
    """The extra bytes of some methods and modes; empty where they cannot be measured."""
    if not memory.prepare(torch.device(problem.device)):
        return {}
    peaks = {}
    for frozen in (False, True):
        names = [name for name, mode in jobs if (mode == "frozen head") == frozen]
        few = replace(problem, frozen=frozen, tokens=1)
        for step in _steps(few, names, smoothing).values():
            step()  # libraries allocate for good on their first call
        for name, step in _steps(replace(problem, frozen=frozen), names, smoothing).items():
            mode = "frozen head" if frozen else "forward+backward"
            peaks[name, mode] = step.extra_bytes()
            step.clear()
    return peaks
