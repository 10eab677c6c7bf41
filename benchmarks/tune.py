"""Times launch configurations on this GPU and pins the fastest: `make tune`, `python -m benchmarks.tune`.

Only the kernels that matter: state, gradient and softmax, at the two shapes that have targets. A candidate must agree
with the oracle in float64 before it is timed; one that does not compile, or asks for more than the device has, is left
out and says so. The candidates take turns. The sum over the shapes decides, and goes into configurations.json with the
device, versions, commit and date. Constants of the host code are timed too, and only printed: they are no matter of one
device. Nothing of this happens when Levelhead runs.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from levelhead.ops import chunked, reference
from levelhead.ops.loss import token_loss_backward
from levelhead.ops.triton import launch

from .gpu import TOKENS, CudaClock, accelerator, missing
from .measure import Clock, Row
from .methods import dense, fused
from .shapes import SHAPES
from .step import Case, Step
from .targets import TARGET_SHAPES

Options = dict[str, int]
Ranked = list[tuple[float, Options]]  # milliseconds, the fastest first

_TILES = ("BLOCK_N", "BLOCK_V", "BLOCK_D", "GROUP", "num_warps", "num_stages")
_NARROW = [
    (128, 256, 64, 16, 8, 3),
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 32, 8, 3),
    (128, 256, 64, 16, 8, 4),
    (128, 256, 32, 16, 8, 4),
    (256, 128, 64, 16, 8, 3),
    (256, 128, 64, 16, 8, 4),
    (128, 128, 64, 16, 8, 4),
    (128, 128, 64, 16, 4, 3),
    (128, 128, 64, 16, 4, 4),
    (128, 128, 128, 16, 8, 3),
    (64, 256, 64, 16, 4, 4),
]
_WIDE = [
    (128, 128, 16, 8, 8, 4),
    (128, 128, 16, 8, 8, 3),
    (128, 128, 16, 8, 8, 2),
    (128, 128, 16, 16, 8, 4),
    (128, 128, 32, 8, 8, 2),
    (128, 128, 8, 8, 8, 4),
    (128, 64, 16, 8, 4, 3),
    (64, 128, 16, 8, 4, 3),
    (128, 64, 32, 8, 8, 3),
    (64, 64, 32, 8, 8, 2),
    (64, 64, 16, 8, 4, 4),
]
_ROWS = [(block, warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16)]
KERNELS = ("state", "gradient", "softmax")
CONSTANTS = [  # of levelhead.ops.triton: module, name, values, and the mode of a step that it matters in
    ("softmax", "_LOGITS_TOKENS", (256, 512, 1024, 2048), "forward+backward"),
    ("softmax", "_GRADIENT_TOKENS", (2048, 4096, 8192), "forward+backward"),
    ("backward", "_BUDGET_SHARE", (1 / 32, 1 / 16, 1 / 8), "reduction none"),
]
ROUNDS = 5
_TOO_SLOW = 1.5  # times the fastest so far in its first run: not worth the rounds
_SAMPLE = 64  # tokens compared with the oracle, of the first and of the last each


def candidates(row: Row) -> list[Options]:
    """Return the options to compare for a row of configurations.json, the pinned ones first."""
    if row["kernel"] == "softmax":
        options = [dict(zip(("BLOCK_V", "num_warps"), values, strict=True)) for values in _ROWS]
    else:
        table = _WIDE if "float32" in row["dtypes"] else _NARROW
        options = [dict(zip(_TILES, values, strict=True)) for values in table]
    return [row["options"], *(other for other in options if other != row["options"])]


class Subject:
    """A kernel at work on one case, through the function that launches it."""

    def __init__(self, kernel: str, case: Case) -> None:
        # What the softmax kernel does does not depend on D: little of it, and the time is the kernel's.
        self.kernel, step = (
            kernel,
            Step(replace(case, d=64) if kernel == "softmax" else case, dense),
        )
        self.x, self.weight, self.target = step.x.detach(), step.weight.detach(), step.target
        self.token_weight = torch.full(step.target.shape, 1 / case.n, device=case.device)
        self.smoothing = torch.full_like(self.token_weight, 0.1)
        # By another implementation: the gradient's candidates must not depend on the state kernel.
        head = (self.x, self.weight, self.target[:, None], None, None, 1.0)
        self.stats = chunked.linear_logit_stats(*head)
        self.logsumexp = self.stats.logsumexp

    def __call__(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """Run it; return the logsumexp, or the gradient of the input in `dtype`, if there is one."""
        from levelhead.ops import triton

        picks, model = self.target[:, None], (None, 1.0)
        if self.kernel == "state":
            head = (self.x, self.weight, picks, None)
            return triton.linear_logit_stats(*head, *model).logsumexp
        dtypes = (dtype, None, None)
        if self.kernel == "softmax":
            tensors = (self.x, self.weight, self.target, None, self.token_weight, self.smoothing)
            return triton.linear_cross_entropy(*tensors, 0.0, *model, dtypes)[1][0]
        lse, expected = self.stats.relative_logsumexp, self.stats.relative_expected
        largest, keep = self.stats.max, self.token_weight != 0
        gradient = token_loss_backward(self.token_weight, largest, lse, self.smoothing, 0.0)
        head = (self.x, self.weight, picks, None, lse, expected, largest)
        return triton.linear_logit_stats_backward(gradient, keep, *head, *model, dtypes)[0]

    def wrong(self) -> str | None:
        """Return how far the result is from the oracle's, None if it is near enough."""
        result = self(self.x.dtype)
        n = len(self.x)
        few = torch.arange(n, device=self.x.device)
        few = few[(few < _SAMPLE) | (few >= n - _SAMPLE)]
        tensors = (self.x[few].double(), self.weight.double(), self.target[few])
        if self.kernel == "state":
            x, weight, target = tensors
            true = reference.linear_logit_stats(
                x, weight, target[:, None], None, None, 1.0
            ).logsumexp
        else:
            of_token = (self.token_weight[few].double(), self.smoothing[few].double())
            dtypes = (torch.float64, None, None)
            _, (true, *_) = reference.linear_cross_entropy(
                *tensors, None, *of_token, 0.0, None, 1.0, dtypes
            )
        error = ((result[few].double() - true).norm() / true.norm()).item()
        # In norm: sums in float32 stay far below 1e-4, TF32 would give 3e-4; a few roundings of bfloat16 are 1e-2.
        limit = 1e-4 if result.dtype == torch.float32 else 2e-2
        return None if error <= limit else f"wrong: error {error:.2g}, at most {limit:g}"


@contextmanager
def pinned(kernel: str, architecture: str, dtype: str, options: Options) -> Iterator[None]:
    """Launch a kernel with other options."""
    table, key = launch._configurations(), (kernel, architecture, dtype)
    before, table[key] = table[key], options
    try:
        yield
    finally:
        table[key] = before


def rank(row: Row, cases: list[Case], clock: Clock, say: Callable[[str], object] = print) -> Ranked:
    """Return the candidates for a row that run, give the right result and are not far behind, with their times."""
    key = (row["kernel"], row["architecture"], cases[0].dtype)
    subjects = [Subject(row["kernel"], case) for case in cases]
    times: list[tuple[Options, list[float]]] = []
    best = float("inf")
    for options in candidates(row):
        with pinned(*key, options):
            first = _first(subjects, clock)
        if isinstance(first, float) and first <= _TOO_SLOW * best:
            best = min(best, first)
            times.append((options, []))
        else:
            reason = first if isinstance(first, str) else f"{1e3 * first:.2f} ms, too slow"
            say(f"{key} {options} left out: {reason}")
    for _ in range(ROUNDS):
        for options, seconds in times:
            with pinned(*key, options):
                seconds.append(sum(map(clock.seconds, subjects)))
    ranked = [(1e3 * median(seconds), options) for options, seconds in times]
    ranked.sort(key=itemgetter(0))
    for ms, options in ranked:
        say(f"{key} {options}: {ms:.2f} ms")
    return ranked


def _first(subjects: list[Subject], clock: Clock) -> float | str:
    """Return the seconds of a first run, or why there will be no other."""
    try:
        for subject in subjects:
            wrong = subject.wrong()
            if wrong is not None:
                return wrong
        return sum(map(clock.seconds, subjects))
    except Exception as error:  # a compiler's, a driver's
        return f"{type(error).__name__}: {error}".splitlines()[0]


def provenance(machine: Row, ranked: Ranked) -> str:
    """Return what the pinned options were measured on, and by how much they won."""
    (ms, _), *others = ranked
    runner_up = f" (runner-up {others[0][0]:.2f} ms)" if others else ""
    return (
        f"measured on {machine['device']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"commit {machine['commit']}, {machine['utc'][:10]}: {ms:.2f} ms{runner_up}"
    )


def replaced(rows: list[Row], row: Row, options: Options, source: str) -> list[Row]:
    """Return the rows with other options and provenance in one of them; the others are as they were."""
    index = rows.index(row)
    return [*rows[:index], row | {"options": options, "provenance": source}, *rows[index + 1 :]]


def text(rows: list[Row]) -> str:
    """Return the rows as configurations.json holds them: two lines each, the provenance on the second."""
    lines = []
    for row in rows:
        what = json.dumps({name: value for name, value in row.items() if name != "provenance"})
        source = json.dumps(row["provenance"], ensure_ascii=False)
        lines.append(f'{what[:-1]},\n  "provenance": {source}}}')
    return "[\n" + ",\n".join(lines) + "\n]\n"


def suggest(cases: list[Case], clock: Clock) -> None:
    """Print the time and memory of a step for several values of each constant of the host code."""
    from levelhead.ops import triton

    for module, name, values, mode in CONSTANTS:
        for value in values:
            with mock.patch.object(getattr(triton, module), name, value):
                for case in cases:
                    step = Step(replace(case, mode=mode), fused("triton"))
                    step()  # compiles
                    extra, ms = step.extra_bytes(), 1e3 * clock.seconds(step)
                    shown = f"{ms:.2f} ms, {extra / 2**20:.0f} MiB beyond the gradients"
                    print(f"V = {case.v}, {mode}, {module}.{name} = {value:g}: {shown}")


def main() -> int:
    """Tune every row of this device's architecture, float64 aside, and write it as soon as it is known."""
    reason = missing()
    if reason is None and launch.architecture(torch.device("cuda")) == "other":
        reason = (
            "configurations.json has no rows for this architecture: copy those of 'other' first"
        )
    if reason is not None:
        print(f"the tuner cannot run here: {reason}", file=sys.stderr)
        return 2
    architecture, machine = launch.architecture(torch.device("cuda")), accelerator()
    shapes = [SHAPES[shape] for shape in TARGET_SHAPES]
    cases = [Case(TOKENS, d, v, dtype="bfloat16", device="cuda") for v, d in shapes]
    rows = json.loads(launch.CONFIGURATIONS.read_text())
    for row in list(rows):
        mine = row["kernel"] in KERNELS and row["architecture"] == architecture
        if not mine or "float64" in row["dtypes"]:
            continue
        ranked = rank(row, [replace(case, dtype=row["dtypes"][0]) for case in cases], CudaClock())
        if ranked:
            rows = replaced(rows, row, ranked[0][1], provenance(machine, ranked))
            launch.CONFIGURATIONS.write_text(text(rows))
    launch._configurations.cache_clear()
    suggest(cases, CudaClock())
    return 0


if __name__ == "__main__":
    sys.exit(main())
