"""Run a worker script in several processes on the CPU, and read what its ranks report.

Starting Python with torch and transformers takes seconds, so one launch runs many scenarios:

    # worker.py
    if __name__ == "__main__":
        torch.distributed.init_process_group("gloo", timeout=TIMEOUT)
        run_scenarios({"first": first, "second": second})  # functions without arguments

    # test_it.py, which `--dist loadfile` keeps on one worker: one launch
    @pytest.fixture(scope="module")
    def results():
        return launch(Path(__file__).with_name("worker.py"), "first", "second")

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_it(results, name):
        for rank, value in enumerate(outcome(results, name)): ...
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# Of a collective, so that a rank that went another way is an error and not a hang; more than one
# rank takes longer than the other to compile, on a busy machine.
TIMEOUT = datetime.timedelta(seconds=120)
_RESULTS = "LEVELHEAD_TEST_RESULTS"


@dataclass
class Job:
    """How a launch ended.

    Attributes:
        returncode: of the launcher; 0 if all ranks ended well.
        results: what each rank gave to `report` last; None for a rank that did not.
        output: stdout and stderr of all ranks.
        seconds: wall time.
    """

    returncode: int
    results: list[Any]
    output: str
    seconds: float


def launch(
    worker: Path,
    *args: str,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> list[Any]:
    """Run the script `worker` in `processes` ranks; what each gave to `report`, by rank.

    Args:
        worker: a script; it can import `tests`.
        args: its arguments, the same on every rank.
        processes: how many ranks.
        env: environment variables on top of this process's.
        timeout: seconds, after which the job is ended and the test fails.
    """
    job = run(worker, *args, processes=processes, env=env, timeout=timeout)
    if job.returncode != 0:
        pytest.fail(f"{worker.name} exited with {job.returncode}:\n{job.output}", pytrace=False)
    return job.results


def run(
    worker: Path,
    *args: str,
    processes: int = 2,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    launcher: Sequence[str] = (),
) -> Job:
    """`launch` for jobs that may fail. Only running out of time fails the test here.

    `launcher` holds the arguments of Python in place of those that start torchrun.
    """
    # --standalone: a rendezvous of its own at a free port, so that parallel tests do not meet.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun += ["--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher or torchrun), str(worker), *args]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        variables = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the same test on a machine with GPUs
            _RESULTS: folder,
        }
        start = time.monotonic()
        # A file: a pipe would stay open, and block, as long as any orphan holds it.
        with log.open("w") as sink:
            agent = subprocess.Popen(
                command, env=variables | dict(env or {}), stdout=sink, stderr=sink, cwd=ROOT
            )
            try:
                returncode = agent.wait(timeout)
            except subprocess.TimeoutExpired:
                agent.terminate()  # the agent ends its workers, by force after 30 s
                try:
                    agent.wait(40)
                finally:
                    agent.kill()
                pytest.fail(
                    f"{worker.name} hung for {timeout} s:\n{_read(log)}",
                    pytrace=False,
                )
        seconds = time.monotonic() - start
        files = [Path(folder, f"{rank}.pt") for rank in range(processes)]
        results = [torch.load(file) if file.exists() else None for file in files]
        return Job(returncode, results, _read(log), seconds)


def _read(log: Path) -> str:
    return log.read_text(errors="replace")[-20_000:]


def outcome(results: list[Any], name: str) -> list[Any]:
    """What each rank returned from scenario `name`; a scenario that raised fails the test."""
    for rank, scenarios in enumerate(results):
        status, value = scenarios.get(name, ("not run", "an earlier scenario failed"))
        if status != "returned":
            pytest.fail(f"rank {rank}, {name}: {status}\n{value}", pytrace=False)
    return [scenarios[name][1] for scenarios in results]


# What follows runs in the workers.


def report(value: Any) -> None:
    """Leave `value` (tensors, numbers, strings and containers of them) for `launch` to return."""
    file = Path(os.environ[_RESULTS], f"{os.environ['RANK']}.pt")
    torch.save(value, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def run_scenarios(scenarios: Mapping[str, Callable[[], Any]]) -> None:
    """Run the scenarios named on the command line and report what each returns or raises.

    The first that raises is the last one run: the ranks may have lost each other. The process then
    exits at once, because threads of DeepSpeed and gloo have been seen to abort a regular exit.
    """
    faulthandler.register(signal.SIGTERM, chain=True)  # where it hangs, when the launcher ends it
    results: dict[str, tuple[str, Any]] = {}
    for name in sys.argv[1:]:
        try:
            results[name] = ("returned", scenarios[name]())
        except Exception:
            results[name] = ("raised", traceback.format_exc())
            break
        finally:
            report(results)
    else:
        with contextlib.suppress(RuntimeError):  # the others may still need this rank to answer
            torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
