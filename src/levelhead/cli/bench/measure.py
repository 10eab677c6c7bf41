"""Time and peak memory of a loss and its backward: what `levelhead bench` and the benchmarks both measure."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .. import memory

# Hidden states (N, D), the head's weight (V, D), targets (N,) and label smoothing.
Operands = tuple[Tensor, Tensor, Tensor, float]
Loss = Callable[[*Operands], Tensor]


class Step:
    """A loss and its backward, ready to be repeated.

    Args:
        loss: What to run.
        operands: Hidden states, weight, targets and label smoothing; those with requires_grad get gradients.
    """

    def __init__(self, loss: Loss, *operands: *Operands) -> None:
        self._loss = loss
        self.operands: Operands = operands

    def __call__(self) -> Tensor:
        """Runs it, and returns the loss; the gradients of the last run are gone first."""
        self.clear()
        loss = self._loss(*self.operands)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def clear(self) -> None:
        """Lets the gradients go."""
        for operand in self.operands[:2]:
            operand.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients of the last run."""
        return [operand.grad for operand in self.operands[:2] if operand.grad is not None]

    def seconds(self) -> float:
        """The wall time of one run, until the device has done it."""
        self._wait()
        start = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - start

    def extra_bytes(self) -> int:
        """The peak of one run beyond what stood before it and the gradients that it leaves; see `memory.prepare`."""
        self.clear()
        device = self.operands[0].device
        before = memory.reset_peak(device)
        self()
        left = sum(gradient.nbytes for gradient in self.gradients())
        return max(0, memory.peak(device) - before - left)

    def _wait(self) -> None:
        device = self.operands[0].device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def interleaved(
    steps: Mapping[str, Step], *, rounds: int, seconds: float = float("inf"), least: int = 3
) -> dict[str, list[float]]:
    """The times of every step: they take turns, so that a machine's bad moment hits all of them.

    Args:
        steps: What to time, by name.
        rounds: How often at most.
        seconds: After so many no new round begins,
        least: unless there were fewer rounds than this.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            times[name].append(step.seconds())
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median of some times and their 20th and 80th percentile, in milliseconds."""
    if len(seconds) == 1:
        seconds = seconds * 2
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    low, middle, high = deciles[1], statistics.median(seconds), deciles[7]
    return {"ms_p20": 1e3 * low, "ms_p50": 1e3 * middle, "ms_p80": 1e3 * high}
