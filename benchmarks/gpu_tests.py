"""The tests marked `gpu`, in parallel: the stage `test` of `make gpu`, and the plugin that keeps its time.

What needs more memory than eight processes have is left out, or takes turns. A test that passed is not run again. Past
the stage's time the others are skipped, and stay left.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .stage import Stage, alive

TESTS = ["-m", "gpu", "tests/ops", "tests/laws", "tests/triton", "tests/benchmarks"]
TESTS += ["--ignore=tests/triton/test_large_offsets.py"]  # up to 24 GiB each
TINY = ["tests/benchmarks/test_gpu.py", "-k", "floor"]
LARGE = "[wide-"  # 13 GB of float64 on the host each: one at a time
WORKERS = 8
LEFT = "the stage's time is over"


def run(stage: Stage) -> int:
    """Run the tests that are left."""
    cores = os.cpu_count() or 1
    workers = min(WORKERS, cores)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # their warnings would be errors
    options = ["-q", "-p", "no:cacheprovider", "-p", "xdist", "-p", "benchmarks.gpu_tests"]
    # This module is imported already, and asserts nothing.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options += ["-n", str(workers), "--continue-on-collection-errors"]
    code = pytest.main([*options, *(TINY if stage.tiny else TESTS)], plugins=[Controller(stage)])
    stage.say()
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


class Controller:
    """In the process that hands out the tests: tells the others what the stage knows, and writes what they report."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def pytest_configure_node(self, node: Any) -> None:
        """Tell a new worker what is done, when the time is over, and what device must live."""
        stage = self.stage
        told = {"done": stage.done_before, "end": stage.end, "device": stage.device.type}
        node.workerinput["stage"] = told

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Say what there is to do; every worker finds the same."""
        self.stage.begin(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write how a test ended: by its call, or by what failed or was skipped around it."""
        name = report.nodeid
        if report.when == "setup":
            self.stage.forget(name)
        if (report.passed and report.when != "call") or LEFT in report.longreprtext:
            return
        row = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            row["why"] = report.longreprtext[-2000:]
        self.stage.add(name, row)
        if not report.failed:
            self.stage.finish(name)


# The rest runs in the workers, where this module is a plugin.
_failed: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed before."""
    done = set(_told(config)["done"])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin too late."""
    if time.monotonic() >= _told(item.config)["end"]:
        pytest.skip(LEFT)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what failed."""
    if report.failed:
        _failed.append(report.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Let large tests take turns, and end a worker whose device is lost: another takes its place.

    Or all its other tests would fail, too.
    """
    with Path(__file__).open() as file:
        if LARGE in item.nodeid:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    if item.nodeid in _failed and not alive(torch.device(_told(item.config)["device"])):
        os._exit(1)


def _told(config: Any) -> Any:
    return config.workerinput["stage"]
