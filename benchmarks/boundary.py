"""What lies around a kernel, layer by layer, in microseconds: `python -m benchmarks.boundary`.

The problem is tiny, so that nearly all of the time is what a call costs before, between and after its products: the
public function's checks and sums, torch.library's dispatch, autograd. The layers take turns, a few calls at a time, so
that a machine's bad moment hits all of them. The time is that of the one thread which does it all, as its processor
counts it: wall time would be that of whatever else the machine runs.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import levelhead
from levelhead.ops import LogitStats, chunked
from levelhead.ops.statistics import StatsGradient

from .step import machine

RESULTS = Path(__file__).parent / "results"
N, D, V = 4, 8, 16
EPS = 0.1
ROUNDS, CALLS = 300, 10
LAYERS = (
    "implementation, called directly",
    "operator, no gradient needed",
    "operator",
    "public function",
    "public function, torch.compile",
    "F.linear, F.cross_entropy",
    "F.linear, F.cross_entropy, torch.compile",
)
FUNCTIONS = ("linear_cross_entropy", "linear_logit_stats")
DIRECTIONS = ("forward", "forward+backward")
Call = Callable[[], Any]
Key = tuple[str, str, str]  # function, layer, direction


class Problem:
    """Tensors of a tiny problem, and every layer as something to call on them."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.x, self.w = (torch.randn(n, D, generator=random) for n in (N, V))
        self.target = torch.randint(0, V, (N,), generator=random)
        self.eps, self.token = torch.full((N,), EPS), torch.full((N,), 1 / N)
        self.leaves = [t.clone().requires_grad_() for t in (self.x, self.w)]

    def fused(self, x: Tensor, w: Tensor) -> Tensor:
        """The public loss."""
        return levelhead.linear_cross_entropy(x, w, self.target, label_smoothing=EPS)

    def stats(self, x: Tensor, w: Tensor) -> Tensor:
        """The public statistics, of which one is differentiated."""
        return levelhead.linear_logit_stats(x, w, self.target).logsumexp

    def dense(self, x: Tensor, w: Tensor) -> Tensor:
        """PyTorch's loss."""
        return F.cross_entropy(F.linear(x, w), self.target, label_smoothing=EPS)

    def fused_operator(self, x: Tensor, w: Tensor) -> Tensor:
        """The operator inside the loss; its gradients are part of the forward pass."""
        loss: Tensor = torch.ops.levelhead.linear_cross_entropy(
            x, w, self.target, None, self.token, self.eps, 0.0, None, 1.0, [True, True, False], None
        )[0]
        return loss

    def stats_operator(self, x: Tensor, w: Tensor) -> Tensor:
        """The operator inside the statistics."""
        stats = torch.ops.levelhead.linear_logit_stats(
            x, w, self.target[:, None], None, None, 1.0, None
        )
        return LogitStats(*stats).logsumexp

    def fused_implementation(self) -> Any:
        """The function inside that operator."""
        dtypes = (torch.float32, torch.float32, None)
        return chunked.linear_cross_entropy(
            self.x, self.w, self.target, None, self.token, self.eps, 0.0, None, 1.0, dtypes
        )

    def stats_implementation(self) -> Any:
        """The function inside that operator."""
        return chunked.linear_logit_stats(self.x, self.w, self.target[:, None], None, None, 1.0)

    def stats_implementation_and_backward(self) -> Any:
        """Both functions, as a loss of one statistic needs them."""
        stats = self.stats_implementation()
        gradient = StatsGradient(self.token, None, None, None)
        dtypes = (torch.float32, torch.float32, None)
        return chunked.linear_logit_stats_backward(
            gradient, self.token != 0, self.x, self.w, self.target[:, None], None,
            stats.relative_logsumexp, stats.relative_expected, stats.max, None, 1.0, dtypes,
        )  # fmt: skip

    def forward(self, function: Callable[..., Tensor]) -> Call:
        """The forward pass where gradients are needed."""
        return lambda: function(*self.leaves)

    def both(self, function: Callable[..., Tensor]) -> Call:
        """Forward and backward; gradients are returned, not accumulated."""

        def step() -> Any:
            value = function(*self.leaves)
            upstream = self.token if value.dim() else None
            return torch.autograd.grad(value, self.leaves, upstream)

        return step


def calls() -> dict[Key, Call]:
    """Return what is timed."""
    problem, (loss, stats) = Problem(), FUNCTIONS
    direct, no_gradient, operator, public, compiled, dense, dense_compiled = LAYERS

    def compiled_whole(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True)

    with_gradients = {
        (loss, operator): problem.fused_operator,
        (loss, public): problem.fused,
        (loss, compiled): compiled_whole(problem.fused),
        (loss, dense): problem.dense,
        (loss, dense_compiled): compiled_whole(problem.dense),
        (stats, operator): problem.stats_operator,
        (stats, public): problem.stats,
        (stats, compiled): compiled_whole(problem.stats),
    }
    forward, both = DIRECTIONS
    return {
        (loss, direct, forward): problem.fused_implementation,
        (stats, direct, forward): problem.stats_implementation,
        (stats, direct, both): problem.stats_implementation_and_backward,
        (loss, no_gradient, forward): lambda: problem.fused_operator(problem.x, problem.w),
        (stats, no_gradient, forward): lambda: problem.stats_operator(problem.x, problem.w),
        **{(*key, forward): problem.forward(f) for key, f in with_gradients.items()},
        **{(*key, both): problem.both(f) for key, f in with_gradients.items()},
    }


def measure(timed: dict[Key, Call], rounds: int) -> list[dict[str, Any]]:
    """Return a row for everything that is timed."""
    for call in timed.values():
        for _ in range(3 * CALLS):  # compiles, and settles caches
            call()
    seconds: dict[Key, list[float]] = {key: [] for key in timed}
    gc.collect()
    gc.disable()
    try:
        for _ in track(range(rounds), "measuring"):
            for key, call in timed.items():
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                seconds[key].append((time.thread_time() - start) / CALLS)
    finally:
        gc.enable()
    rows = []
    for (function, layer, direction), found in seconds.items():
        deciles = statistics.quantiles(found, n=10, method="inclusive")
        times = (deciles[1], statistics.median(found), deciles[7])
        row = {"function": function, "layer": layer, "direction": direction}
        names = ("us_p20", "us_p50", "us_p80")
        rows.append(row | {name: 1e6 * t for name, t in zip(names, times, strict=True)})
    return rows


class Operators(TorchDispatchMode):
    """Counts calls of the operators that the package registers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "levelhead"
        return func(*args, **(kwargs or {}))


def operators() -> dict[str, dict[str, int]]:
    """Return how many of them run in each direction."""
    problem, found = Problem(), {}
    x, w = problem.leaves
    for reduction in ("mean", "sum", "none"):
        with Operators() as forward:
            loss = levelhead.linear_cross_entropy(x, w, problem.target, reduction=reduction)
        with Operators() as backward:
            loss.sum().backward()
        found[reduction] = {"forward": forward.count, "backward": backward.count}
    return found


def main() -> None:
    """Measure every layer and write results/boundary.json."""
    torch.set_num_threads(1)
    results = {
        "machine": machine(),
        "problem": {"n": N, "d": D, "v": V, "dtype": "float32", "eps": EPS, "threads": 1},
        "rounds": ROUNDS,
        "calls": CALLS,
        "operators": operators(),
        "rows": measure(calls(), ROUNDS),
    }
    path = RESULTS / "boundary.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
