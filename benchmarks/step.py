"""One loss, and its backward, on given tensors: what is timed, whose memory is taken, and on what machine."""

import copy
import datetime
import os
import platform
import re
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import levelhead
from levelhead.measure import timing
from levelhead.measure.methods import STATISTICS
from levelhead.measure.timing import Method


@dataclass(frozen=True)
class Case:
    """What is measured: `mode` is "forward+backward", "frozen head", "forward", "reduction none" or STATISTICS.

    Under autocast the input is of `dtype`, as a model's body leaves it, and the weight of float32.
    """

    n: int = 2048
    d: int = 512
    v: int = 32000
    eps: float = 0.1
    mode: str = "forward+backward"
    dtype: str = "float32"
    autocast: bool = False
    device: str = "cpu"


class Step(timing.Step):
    """One loss, and its backward if the case has one, ready to be repeated."""

    def __init__(self, case: Case, loss: Method) -> None:
        random = torch.Generator(case.device).manual_seed(0)
        dtype = getattr(torch, case.dtype)
        trainable = case.mode in ("forward+backward", "reduction none")
        x = torch.randn(case.n, case.d, generator=random, device=case.device)
        weight = torch.randn(case.v, case.d, generator=random, device=case.device) * 3 / case.d**0.5
        x = x.to(dtype).requires_grad_(case.mode not in ("forward", STATISTICS))
        weight = weight.to(torch.float32 if case.autocast else dtype).requires_grad_(trainable)
        target = torch.randint(0, case.v, (case.n,), generator=random, device=case.device)
        super().__init__(loss, x, weight, target, case.eps)
        self.upstream = None  # a scalar's gradient is 1
        if case.mode == "reduction none":  # every token's its own
            self.upstream = torch.linspace(0.5, 1.5, case.n, device=case.device) / case.n
        self.case = case

    def using(self, loss: Method, eps: float) -> "Step":
        """Return the step with another loss and smoothing on the same tensors, whose gradients they share."""
        other = copy.copy(self)
        other.loss, other.smoothing, other.case = loss, eps, replace(self.case, eps=eps)
        return other

    def __call__(self) -> Tensor:
        """Run it; the gradients of the last run are gone first."""
        self.clear()
        reduction = "mean" if self.upstream is None else "none"
        autocast = torch.autocast(self.x.device.type, self.x.dtype) if self.case.autocast else None
        with autocast or nullcontext():
            loss = self.loss(self.x, self.weight, self.target, self.case.eps, reduction)
        if loss.requires_grad:
            loss.backward(self.upstream)
        return loss.detach()


def extra_bytes(case: Case, method: Method) -> int:
    """Return a method's extra_bytes on a CPU. Needs a process that memory.prepare has prepared."""
    torch.compiler.reset()  # past its eighth program of a function it would run the rest uncompiled
    from torch._dynamo.utils import counters  # slow to import

    counters.clear()
    Step(
        replace(case, n=min(case.n, 64)), method
    )()  # libraries allocate for good on their first call
    step = Step(case, method)
    if counters["stats"]:  # it compiles, and does so for this size
        step()
    return step.extra_bytes()


def quantiles(seconds: list[float]) -> dict[str, Any]:
    """Return the columns of a row that describe its times, in milliseconds; in `ms` those of every round."""
    return timing.quantiles(seconds) | {"ms": [round(1e3 * second, 3) for second in seconds]}


PACKAGES = ("transformers", "trl", "liger-kernel", "cut-cross-entropy")


def machine() -> dict[str, Any]:
    """Return where and with what the rows were measured."""
    return {
        "device": "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: version(name) for name in PACKAGES},
        "levelhead": levelhead.__version__,
        "commit": commit(),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the model of the processor, or at least its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1] if model else platform.machine()


def version(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the commit of the working tree; of a copy without a repository, what the variable COMMIT says.

    It is dirty where a file differs that has a part in what is measured: results of other benchmarks have none.
    """
    root = Path(__file__).parents[1]
    sources = ("--", ".", ":!benchmarks/results", ":!docs", ":!README.md")
    try:
        found = _git(root, "rev-parse", "--short", "HEAD").stdout.strip()
        changed = _git(root, "diff", "--quiet", "HEAD", *sources).returncode
    except OSError:  # no git
        found, changed = "", 0
    if not found:
        return os.environ.get("COMMIT") or "unknown"
    return f"{found}-dirty" if changed else found


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
