"""Time and peak memory of a loss and its backward, for `levelhead bench` and the benchmarks."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from . import memory

# Of hidden states (N, D), the head's weight (V, D), targets (N,), label smoothing and reduction, "mean" or "none".
Method = Callable[[Tensor, Tensor, Tensor, float, str], Tensor]

KeyT = TypeVar("KeyT", bound=Hashable)


class Step:
    """A loss and its backward, ready to be repeated.

    Args:
        loss: What to run.
        x: Hidden states (N, D); these and the weight get gradients if they require them.
        weight: Of the head (V, D).
        target: Vocabulary ids (N,).
        smoothing: Label smoothing.
    """

    def __init__(
        self, loss: Method, x: Tensor, weight: Tensor, target: Tensor, smoothing: float
    ) -> None:
        self.loss, self.x, self.weight = loss, x, weight
        self.target, self.smoothing = target, smoothing

    def __call__(self) -> Tensor:
        """Runs it, and returns the loss; the gradients of the last run are gone first."""
        self.clear()
        loss = self.loss(self.x, self.weight, self.target, self.smoothing, "mean")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def clear(self) -> None:
        """Lets the gradients go."""
        self.x.grad = self.weight.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of the last run."""
        return [tensor.grad for tensor in (self.x, self.weight) if tensor.grad is not None]

    def timed(self) -> tuple[Tensor, float]:
        """The loss of one run and its wall time, until the device has done it."""
        self.clear()
        self._wait()
        start = time.perf_counter()
        loss = self()
        self._wait()
        return loss, time.perf_counter() - start

    def extra_bytes(self) -> int:
        """The peak of one run beyond what stood before it and the gradients that it leaves; see `memory.prepare`.

        So what a method keeps from forward to backward counts, unless it becomes the gradient itself: a gradient kept
        in float32 until it is rounded to float16 counts whole.
        """
        self.clear()
        before = memory.reset_peak(self.x.device)
        self()
        left = sum(gradient.nbytes for gradient in self.gradients())
        return max(0, memory.peak(self.x.device) - before - left)

    def _wait(self) -> None:
        if self.x.device.type != "cpu":
            torch.accelerator.synchronize(self.x.device)


def interleaved(
    steps: Mapping[KeyT, Step], *, rounds: int, seconds: float, round_seconds: float
) -> dict[KeyT, list[float]]:
    """The times of every step: they take turns, so that a machine's bad moment hits all of them.

    Args:
        steps: What to time.
        rounds: How often at most.
        seconds: What all rounds may take; none begins that would take longer than what is left of them.
        round_seconds: What the first round will take; of the others the one before says it.
    """
    times: dict[KeyT, list[float]] = {key: [] for key in steps}
    end = time.monotonic() + seconds
    for _ in range(rounds):
        start = time.monotonic()
        if start + round_seconds > end:
            break
        for key, step in steps.items():
            times[key].append(step.timed()[1])
        round_seconds = time.monotonic() - start
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median of some times and their 20th and 80th percentile, in milliseconds."""
    if len(seconds) == 1:
        seconds = seconds * 2
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    low, middle, high = deciles[1], statistics.median(seconds), deciles[7]
    return {"ms_p20": 1e3 * low, "ms_p50": 1e3 * middle, "ms_p80": 1e3 * high}
