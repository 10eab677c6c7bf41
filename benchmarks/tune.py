"""Times launch configurations on this GPU and pins the fastest: the stage `tune` of `make gpu`.

Only the kernels that matter: state, gradient and softmax, at the two shapes that have targets. A candidate must agree
with the oracle in float64 before it is timed; one that does not compile, or asks for more than the device has, is left
out and says so. The best candidates take turns. The sum over the shapes decides, and goes into a configurations.json
beside the results, with the device, versions, commit and date; it is used when it is copied to levelhead/ops/triton.
Constants of the host code are timed too: they are no matter of one device. Nothing of this happens when Levelhead runs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import product
from operator import itemgetter
from statistics import median

import torch
from torch import Tensor

from levelhead.measure.methods import dense, fused
from levelhead.ops import chunked, reference
from levelhead.ops.loss import token_loss_backward
from levelhead.ops.sizes import changed
from levelhead.ops.statistics import LogitStats
from levelhead.ops.triton import launch

from .gpu_bench import TOKENS
from .measure import Clock, Row, reason
from .shapes import SHAPES
from .stage import Stage, Task
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
SIZES = [  # of levelhead.ops.sizes: name, values, and the mode of a step that it matters in
    ("logits_tokens", (256, 512, 1024, 2048), "forward+backward"),
    ("gradient_tokens", (2048, 4096, 8192), "forward+backward"),
    ("gradient_share", (1 / 32, 1 / 16, 1 / 8), "reduction none"),
]
ROUNDS = 5
_TOO_SLOW = 1.2  # times the fastest in its first run: not worth the rounds
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

    @cached_property
    def stats(self) -> LogitStats:
        """Those of another implementation: the gradient's candidates must not depend on the state kernel."""
        head = (self.x, self.weight, self.target[:, None], None, None, 1.0)
        return chunked.linear_logit_stats(*head)

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


@lru_cache(maxsize=1)  # of the kernel at work: those of the others would fill the device
def subjects(kernel: str, *cases: Case) -> list[Subject]:
    """Return a kernel at work on some cases."""
    return [Subject(kernel, case) for case in cases]


def first(row: Row, cases: list[Case], options: Options, clock: Clock) -> Iterator[Row]:
    """Yield what a candidate for a row takes in its first run, or why there will be no other."""
    what = {name: row[name] for name in ("kernel", "architecture")} | {"options": options}
    try:
        with pinned(row["kernel"], row["architecture"], cases[0].dtype, options):
            some = subjects(row["kernel"], *cases)
            wrong = next(filter(None, (subject.wrong() for subject in some)), None)
            found = {"left out": wrong} if wrong else {"ms": 1e3 * sum(map(clock.seconds, some))}
    except Exception as error:  # a compiler's, a driver's
        found = {"left out": reason(error)}
    yield what | found


def turns(row: Row, cases: list[Case], firsts: list[Row], clock: Clock) -> Ranked:
    """Return the candidates that were not far behind in their first runs, with their times, the fastest first."""
    limit = _TOO_SLOW * min((found["ms"] for found in firsts if "ms" in found), default=0)
    kept = [found["options"] for found in firsts if found.get("ms", limit + 1) <= limit]
    times: list[list[float]] = [[] for _ in kept]
    some = subjects(row["kernel"], *cases)
    for _ in range(ROUNDS):
        for options, seconds in zip(kept, times, strict=True):
            with pinned(row["kernel"], row["architecture"], cases[0].dtype, options):
                seconds.append(sum(map(clock.seconds, some)))
    ranked = [(1e3 * median(ms), options) for ms, options in zip(times, kept, strict=True)]
    return sorted(ranked, key=itemgetter(0))


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


def size(stage: Stage, case: Case, name: str, value: float) -> Iterator[Row]:
    """Yield the time and memory of a step with another of the sizes."""
    with changed(**{name: value}):
        step = Step(stage.fit(case), fused("triton"))
        step()  # compiles
        (extra,) = stage.clock.extra_bytes([step])
        yield {"extra_bytes": extra, "ms": 1e3 * stage.clock.seconds(step)}


def pin(stage: Stage, row: Row, cases: list[Case]) -> Iterator[Row]:
    """Yield the best candidates for a row, the fastest first, and write the configurations with it."""
    firsts = [found for found in stage.rows if found["task"].startswith(f"{_name(row)}, ")]
    for ms, options in turns(row, cases, firsts, stage.clock):
        yield {"kernel": row["kernel"], "options": options, "ms": ms}
    rows = json.loads(launch.CONFIGURATIONS.read_text())
    for old in list(rows):
        found = [new for new in stage.rows if new["task"] == f"{_name(old)}: in turns"]
        ranked = [(new["ms"], new["options"]) for new in found if "ms" in new]
        if ranked and old["architecture"] == row["architecture"]:
            rows = replaced(rows, old, ranked[0][1], provenance(stage.machine, ranked))
    stage.path.with_name("configurations.json").write_text(text(rows))


def _name(row: Row) -> str:
    return f"{row['kernel']} {row['dtypes'][0]}"


def tasks(stage: Stage) -> list[Task]:
    """Return a task a candidate, one a row where the best take turns, and one a size; bfloat16 first."""
    shapes = [SHAPES[shape] for shape in stage.some(TARGET_SHAPES)]
    narrow = [Case(TOKENS, d, v, dtype="bfloat16", device="cuda") for v, d in shapes]
    found: list[Task] = []
    wide: list[Task] = []
    for row in json.loads(launch.CONFIGURATIONS.read_text()):
        if row["architecture"] != launch.architecture(stage.device):
            continue
        if row["kernel"] not in KERNELS or row["dtypes"] == ["float64"]:
            continue
        cases = [stage.fit(replace(case, dtype=row["dtypes"][0])) for case in narrow]
        some = found if cases[0].dtype == stage.fit(narrow[0]).dtype else wide
        for options in stage.some(candidates(row)):
            name = f"{_name(row)}, {' '.join(map(str, options.values()))}"
            some.append((name, partial(first, row, cases, options, stage.clock)))
        some.append((f"{_name(row)}: in turns", partial(pin, stage, row, cases)))
    for name, values, mode in SIZES:
        for value, case in product(stage.some(values), narrow):
            work = partial(size, stage, replace(case, mode=mode), name, value)
            found.append((f"{name} = {value:g}, V = {case.v}", work))
    return [*found, *wide]


def run(stage: Stage) -> int:
    """Tune every row of this device's architecture, float64 aside."""
    if launch.architecture(stage.device) == "other":
        print("configurations.json has no rows for this architecture: copy those of 'other' first")
        return 2
    return stage.run(tasks(stage))
