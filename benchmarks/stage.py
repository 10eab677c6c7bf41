"""A stage of `make gpu`: tasks under a clock, and rows that are on disk as soon as they are measured.

A GPU is often lent for minutes, and may go at any of them. So a stage starts nothing after eight minutes, ends within
nine, and writes its file after every row. The same line again goes on: what is done is kept, what is left or failed is
done, if device, versions and code are the same; else the file starts anew.
"""

import gc
import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from levelhead.measure import memory

from .measure import Row, reason, write
from .step import Case, Step, machine

SECONDS, LAST_SECONDS = 480, 530  # after which no task begins, and after which the process is ended
STEPS = 2  # timed together: a steady state, and still short
SAME = ("device", "driver", "torch", "triton", "packages", "code")  # or a stage starts anew

T = TypeVar("T")
Task = tuple[str, Callable[[], Iterable[Row]]]  # a name of its own, and what measures


class CudaClock:
    """Device events around some runs."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one run in a row of them, as in training.

        One goes before: while the device is busy with it, the launches of the next are queued, and what the host
        does in Python counts only if the device has to wait for it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(STEPS):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / STEPS

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        """Return the peaks of torch's allocator; workspaces of libraries are older than the steps, and left out."""
        return [self._extra_bytes(step) for step in steps]

    def _extra_bytes(self, step: Step) -> int | str:
        try:
            return step.extra_bytes()
        except Exception as error:  # out of memory, of all things
            return reason(error)


class RehearsalClock(CudaClock):
    """Wall time and resident memory on a CPU."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the time of one run."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def extra_bytes(self, steps: Sequence[Step]) -> list[int | str]:
        """Return the peaks of this process, which is never the same again."""
        memory.prepare(torch.device("cpu"))
        return super().extra_bytes(steps)


class Stage:
    """The tasks of a stage, its clock and its file, `name`.json in `folder`.

    Where it is `tiny`, it rehearses: the same lines on a CPU, at toy sizes, kernels in Triton's interpreter.
    """

    def __init__(self, folder: Path, name: str, *, tiny: bool = False) -> None:
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.clock = RehearsalClock() if tiny else CudaClock()
        self.path = folder / f"{name}.json"
        self.summary: Callable[[list[Row]], Row] = lambda _: {}  # what else the file holds
        self.end = time.monotonic() + SECONDS
        folder.mkdir(parents=True, exist_ok=True)
        here = where(self.device) | {"code": code()}
        self.results: Row = {"machine": here, "done": [], "left": [], "rows": []}
        before = json.loads(self.path.read_text()) if self.path.exists() else self.results
        if all(before["machine"].get(key) == self.machine.get(key) for key in SAME):
            self.results = before
        else:
            print(f"{self.path} starts anew: it is of another device, version or code")
        self.done_before: list[str] = list(self.results["done"])

    @property
    def machine(self) -> Row:
        """Where and with what the rows were measured."""
        found: Row = self.results["machine"]
        return found

    @property
    def rows(self) -> list[Row]:
        """All rows so far, each with its task."""
        found: list[Row] = self.results["rows"]
        return found

    def fit(self, case: Case) -> Case:
        """Return the case, in a rehearsal a small one like it, which Triton's interpreter can do."""
        if not self.tiny:
            return case
        dtype = "float16" if case.dtype == "bfloat16" else case.dtype
        return replace(case, n=5, d=6, v=23, dtype=dtype, device="cpu")

    def some(self, values: Sequence[T]) -> Sequence[T]:
        """Return all values, in a rehearsal the first: the others run the same lines."""
        return values[:1] if self.tiny else values

    def begin(self, names: Iterable[str]) -> None:
        """Say what there is to do."""
        self.results["left"] = [name for name in names if name not in self.results["done"]]
        self._write()

    def add(self, task: str, row: Row) -> None:
        """Write a row."""
        self.rows.append({"task": task} | row)
        self._write()

    def forget(self, task: str) -> None:
        """Drop the rows of a task that did not end well."""
        self.results["rows"] = [row for row in self.rows if row["task"] != task]

    def finish(self, task: str) -> None:
        """Say that a task is done."""
        self.results["done"].append(task)
        self.results["left"].remove(task)
        self._write()

    def _write(self) -> None:
        write(self.path, self.results | self.summary(self.rows))

    def run(self, tasks: list[Task]) -> int:
        """Do what is left, first what did not fail before; return the exit code, 1 if something failed."""
        self.begin(name for name, _ in tasks)
        failed_before = {row["task"] for row in self.rows} & set(self.results["left"])
        failed = False
        for name, work in sorted(tasks, key=lambda task: task[0] in failed_before):
            if name in self.results["done"]:
                continue
            if time.monotonic() >= self.end:
                break
            start = time.monotonic()
            self.forget(name)
            try:
                for row in work():
                    self.add(name, row)
                    print(f"{name}: {shown(row)}", flush=True)
                self.finish(name)
            except Exception as error:  # a compiler's, a driver's
                failed = True
                self.add(name, {"failure": reason(error)})
                print(f"{name}: failed: {reason(error)}", flush=True)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
            if not alive(self.device):
                print("the device is lost to this process")
                break
            gc.collect()
            torch.cuda.empty_cache()
        self.say()
        return int(failed)

    def say(self) -> None:
        """Print what is done and what is left."""
        left = self.results["left"]
        print(f"{self.path}: {len(self.results['done'])} done, {len(left)} left")
        if left:
            print("left, for the same line again:", *left, sep="\n  ")


def shown(row: Row) -> str:
    """Return a row as it is printed, without its single times."""
    parts = [(name, value) for name, value in row.items() if not isinstance(value, list)]
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in parts)


def alive(device: torch.device) -> bool:
    """Return whether a device still works: after an illegal access it fails whatever this process asks of it."""
    try:
        return torch.zeros(1, device=device).item() == 0
    except RuntimeError:
        return False


def where(device: torch.device) -> Row:
    """Return where and with what the rows are measured."""
    import triton

    name, driver = "cpu: a rehearsal", ["none"]
    if device.type != "cpu":
        name, driver = torch.cuda.get_device_name(), []
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError):  # AMD
            run = subprocess.run(query, capture_output=True, text=True, check=False)
            driver = run.stdout.split()
    found = {"device": name, "driver": (driver or ["unknown"])[0], "triton": triton.__version__}
    return machine() | found


def code() -> str:
    """Return a name for what is measured and what measures it: a copy need not have its repository."""
    root = Path(__file__).parents[1]
    folders = ("src/levelhead/ops", "benchmarks", "tests")
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    files += sorted((root / "src/levelhead/ops").rglob("*.json"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
