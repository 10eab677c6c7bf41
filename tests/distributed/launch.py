"""Run things in several processes on the CPU.

Scenarios of a worker module run in ranks that are forks of a process with all imports made, and that wait to be told
which one is next. So only what a test asks for is run, once:

    # worker.py
    def start():
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)

    SCENARIOS = {"first": first, "second": second}  # functions, of strings if of anything

    # test_it.py: one start of the ranks, for as many of its tests as a worker runs
    @pytest.fixture(scope="module")
    def results():
        with ranks(worker) as started:
            yield started

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_it(results, name):
        for rank, value in enumerate(outcome(results, name)): ...

Scripts are run by `run`, through torchrun or another launcher, as their users start them.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import forked

ROOT = Path(__file__).parents[2]
# Of a collective, so that a rank that went another way is an error and not a hang; more than one
# rank takes longer than the other to compile, on a busy machine.
TIMEOUT = datetime.timedelta(seconds=120)
_RESULTS = "LEVELHEAD_TEST_RESULTS"


def cases(names: Iterable[str], *quick: str) -> list[Any]:
    """Scenarios to parametrise a test with: all but the quick ones are left to `make test-all`."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n not in quick)) for n in names]


class Ranks:
    """Ranks that wait for the name of a scenario, and what they have returned so far."""

    def __init__(self, connections: list[Connection], log: Path, timeout: float) -> None:
        self._connections, self._log, self._timeout = connections, log, timeout
        self._returned: dict[tuple[str, ...], list[Any]] = {}
        self._failed = ""

    def outcome(self, name: str, *args: str) -> list[Any]:
        """What each rank returns from a scenario, which runs once; if one raises, the test fails.

        It is the last one then: the ranks may have lost each other.
        """
        if (name, *args) not in self._returned and not self._failed:
            self._run(name, *args)
        if (name, *args) not in self._returned:
            pytest.fail(f"{name}: {self._failed}", pytrace=False)
        return self._returned[name, *args]

    def _run(self, name: str, *args: str) -> None:
        self._failed = f"the earlier scenario {name} failed"
        end = time.monotonic() + self._timeout
        for connection in self._connections:
            connection.send((name, args))
        values = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(0, end - time.monotonic())):
                why = f"no answer for {self._timeout} s"
            else:
                try:
                    status, value = torch.load(io.BytesIO(connection.recv_bytes()))
                except (EOFError, ConnectionError):
                    status, value = "died", _read(self._log)
                if status == "returned":
                    values.append(value)
                    continue
                why = f"{status}\n{value}"
            pytest.fail(f"{name}, rank {rank}: {why}\n{_read(self._log)}", pytrace=False)
        self._failed = ""
        self._returned[name, *args] = values


@contextlib.contextmanager
def ranks(
    worker: ModuleType | str,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> Iterator[Ranks]:
    """Start the ranks that run the scenarios of a worker.

    Args:
        worker: a module, or its name, with `start` and `SCENARIOS`.
        processes: how many ranks.
        env: environment variables on top of this process's.
        timeout: seconds that a scenario may take.
    """
    name = worker if isinstance(worker, str) else worker.__name__
    # As torchrun does it: ranks meet at a store that is there before them, at a port that is free.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",  # the same test on a machine with GPUs
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(processes),
    }
    context = forked.context()
    connections, started = [], []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(name, theirs, environment | own, log), daemon=True
            )
            process.start()
            theirs.close()
            connections.append(ours)
            started.append(process)
        try:
            yield Ranks(connections, log, timeout)
        finally:
            for connection in connections:
                connection.close()
            for process in started:
                process.join(10)
                process.kill()


def outcome(started: Ranks, name: str, *args: str) -> list[Any]:
    """What each rank returned from scenario `name`; a scenario that raised fails the test."""
    return started.outcome(name, *args)


def _serve(worker: str, connection: Connection, environment: dict[str, str], log: Path) -> None:
    """A rank: it returns what scenarios return, until the test closes the connection.

    It exits at once then, because threads of DeepSpeed and gloo have been seen to abort a regular exit.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with log.open("a") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    faulthandler.register(signal.SIGTERM, chain=True)  # where it hangs
    torch.set_num_threads(1)
    module = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            name, args = connection.recv()
            try:
                if module is None:
                    module = importlib.import_module(worker)
                    module.start()
                answer = ("returned", module.SCENARIOS[name](*args))
            except Exception:
                answer = ("raised", traceback.format_exc())
            content = io.BytesIO()
            torch.save(answer, content)
            connection.send_bytes(content.getvalue())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@dataclass
class Job:
    """How a script ended.

    Attributes:
        returncode: of the launcher; 0 if all ranks ended well.
        results: what each rank gave to `report` last; None for a rank that did not.
        output: stdout and stderr of all ranks.
    """

    returncode: int
    results: list[Any]
    output: str


def run(
    script: Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    launcher: Sequence[str] = (),
) -> Job:
    """Run a script in two ranks; it may fail. Only running out of time fails the test here.

    Args:
        script: it can import `tests`.
        args: its arguments, the same on every rank.
        env: environment variables on top of this process's.
        timeout: seconds, after which the job is ended and the test fails.
        launcher: the arguments of Python in place of those that start torchrun.
    """
    # --standalone: a rendezvous of its own at a free port, so that parallel tests do not meet.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [sys.executable, *(launcher or (*torchrun, "--nproc-per-node", "2"))]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            _RESULTS: folder,
        }
        # A file: a pipe would stay open, and block, as long as any orphan holds it.
        with log.open("w") as sink:
            agent = subprocess.Popen(
                [*command, str(script), *args],
                env=variables | dict(env or {}), stdout=sink, stderr=sink, cwd=ROOT,
            )  # fmt: skip
            try:
                returncode = agent.wait(timeout)
            except subprocess.TimeoutExpired:
                agent.terminate()  # the agent ends its workers, by force after 30 s
                try:
                    agent.wait(40)
                finally:
                    agent.kill()
                pytest.fail(
                    f"{script.name} hung for {timeout} s:\n{_read(log)}",
                    pytrace=False,
                )
        files = [Path(folder, f"{rank}.pt") for rank in range(2)]
        results = [torch.load(file) if file.exists() else None for file in files]
        return Job(returncode, results, _read(log))


def report(value: Any) -> None:
    """In a script: leave `value` (tensors, numbers, strings and containers of them) for `run` to return."""
    file = Path(os.environ[_RESULTS], f"{os.environ['RANK']}.pt")
    torch.save(value, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def _read(log: Path) -> str:
    return log.read_text(errors="replace")[-20_000:] if log.exists() else ""
