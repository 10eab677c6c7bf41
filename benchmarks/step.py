"""One loss, and its backward, on given tensors: what is timed and whose memory is taken."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from levelhead.cli import memory

from .methods import METHODS, Loss


@dataclass(frozen=True)
class Case:
    """What is measured: `mode` is "forward+backward", "frozen head" or "forward"."""

    n: int = 2048
    d: int = 512
    v: int = 32000
    eps: float = 0.1
    mode: str = "forward+backward"
    dtype: str = "float32"


class Step:
    """One loss, and its backward if the case has one, ready to be repeated."""

    def __init__(self, case: Case, loss: Loss) -> None:
        random = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)
        backward = case.mode != "forward"
        x = torch.randn(case.n, case.d, generator=random)
        weight = torch.randn(case.v, case.d, generator=random) * 3 / case.d**0.5
        self.x = x.to(dtype).requires_grad_(backward)
        self.weight = weight.to(dtype).requires_grad_(case.mode == "forward+backward")
        self.target = torch.randint(0, case.v, (case.n,), generator=random)
        self.case, self.loss = case, loss

    def __call__(self) -> Tensor:
        """Run it; the gradients of the last run are gone first."""
        self.x.grad = self.weight.grad = None
        loss = self.loss(self.x, self.weight, self.target, self.case.eps)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the last run."""
        return [t.grad for t in (self.x, self.weight) if t.grad is not None]

    def seconds(self) -> float:
        """Return the wall time of one run."""
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def extra_bytes(case: Case, method: str) -> int:
    """Return the peak of one run beyond what stood before it and the gradients it leaves. Needs a fresh process."""
    if not memory.prepare(torch.device("cpu")):
        raise RuntimeError("peak memory is read from /proc: benchmarks need Linux with glibc")
    step = Step(case, METHODS[method])
    step()  # libraries allocate for good on their first call
    step.x.grad = step.weight.grad = None
    before = memory.reset_peak(step.x.device)
    step()
    return memory.peak(step.x.device) - before - sum(g.nbytes for g in step.gradients())
