"""The stages of `make gpu` without a GPU: what they write and when, their clock, and every line at toy sizes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu, stage
from benchmarks.stage import Stage

ROOT = Path(__file__).parents[2]


def held(folder: Path) -> Any:
    return json.loads((folder / "some.json").read_text())


def fails() -> Iterator[Any]:
    yield {"ms": 1}
    raise RuntimeError("a driver's\nsecond line")


def one() -> Iterator[Any]:
    yield {"ms": 2}


def test_every_row_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    seen = []

    def work() -> Iterator[Any]:
        for i in range(3):
            seen.append([row["i"] for row in held(tmp_path)["rows"]])
            yield {"i": i}

    assert Stage(tmp_path, "some", tiny=True).run([("first", work), ("second", one)]) == 0
    assert seen == [[], [0], [0, 1]]
    assert held(tmp_path)["done"] == ["first", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["some.json"]


def test_past_its_time_nothing_begins_and_it_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow() -> Iterator[Any]:
        monkeypatch.setattr(stage.time, "monotonic", lambda: started.end)
        yield {"ms": 3}

    started = Stage(tmp_path, "some", tiny=True)
    assert started.run([("slow", slow), ("next", one), ("last", one)]) == 0
    assert held(tmp_path)["left"] == ["next", "last"]
    said = "1 done, 2 left\nleft, for the same line again:\n  next\n  last\n"
    assert capsys.readouterr().out.endswith(said)


def test_the_same_line_goes_on_and_does_last_what_failed(tmp_path: Path) -> None:
    tasks = [("done", one), ("fails", fails)]
    assert Stage(tmp_path, "some", tiny=True).run(tasks) == 1
    before = held(tmp_path)
    assert [row.get("failure") for row in before["rows"]] == [
        None,
        None,
        "RuntimeError: a driver's",
    ]
    assert (before["done"], before["left"]) == (["done"], ["fails"])

    def never() -> Iterator[Any]:
        raise AssertionError("it was done")

    again = [("done", never), ("fails", one), ("new", one)]
    assert Stage(tmp_path, "some", tiny=True).run(again) == 0
    after = held(tmp_path)
    assert after["done"] == ["done", "new", "fails"]
    assert after["rows"] == [{"task": name, "ms": 2} for name in after["done"]]
    assert after["left"] == []


def test_of_other_code_it_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stage(tmp_path, "some", tiny=True).run([("old", one)])
    monkeypatch.setattr(stage, "code", lambda: "other")
    Stage(tmp_path, "some", tiny=True).run([("new", one)])
    assert held(tmp_path)["done"] == ["new"]
    assert [row["task"] for row in held(tmp_path)["rows"]] == ["new"]


def test_where_the_device_is_lost_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "alive", lambda _: False)
    assert Stage(tmp_path, "some", tiny=True).run([("fails", fails), ("next", one)]) == 1
    assert held(tmp_path)["left"] == ["fails", "next"]


def test_a_rehearsal_does_not_overwrite_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["decide", "--tiny"])
    assert "--tiny measures nothing that anybody should keep" in capsys.readouterr().err


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


_REHEARSAL = """
import sys
from benchmarks import gpu, measure

measure.FEWEST = measure.MOST = 1
sys.exit(max(gpu.main([name, "--tiny", "--output", sys.argv[1]]) for name in sys.argv[2:]))
"""


@pytest.mark.slow
def test_what_is_measured_on_a_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    names = [name for name in gpu.STAGES if name != "test"]
    run = python(_REHEARSAL, str(tmp_path), *names)
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of this Triton (3.6) does not run on this NumPy (2.4)")
    assert run.returncode == 0, run.stdout + run.stderr
    for name in names:
        results = json.loads((tmp_path / f"{gpu.STAGES[name][1]}.json").read_text())
        assert results["machine"]["device"] == "cpu: a rehearsal"
        assert results["left"] == []
        assert len(results["done"]) > 5
        for row in results["rows"]:
            assert not {"failure", "left out"} & row.keys(), row
    different = json.loads((tmp_path / "gpu_decide.json").read_text())["rows"]
    assert [row["different"] for row in different if "different" in row] == [0, 0, 0]
    provenance = {
        row["provenance"] for row in json.loads((tmp_path / "configurations.json").read_text())
    }
    assert sum(text.startswith("measured on cpu: a rehearsal") for text in provenance) == 3


_TESTS = """
import pytest

@pytest.mark.parametrize("size", ["wide-1", "wide-2", "small"])
def test_passes(size):
    pass

def test_fails():
    raise AssertionError("of the kernel")

def test_passed_before():
    raise AssertionError("it ran again")

def test_is_skipped():
    pytest.skip("for a reason")
"""
_NO_DEVICE_LIVES = """
from benchmarks import gpu_tests

gpu_tests.alive = lambda _: False
"""
_TEST_STAGE = """
import sys
from pathlib import Path
from benchmarks import gpu_tests, stage

gpu_tests.TINY, gpu_tests.WORKERS = ["--rootdir", *sys.argv[1:3]], 1
stage.SECONDS = -1
some = stage.Stage(Path(sys.argv[1]), "some", tiny=True)
some.begin(["test_some.py::test_passed_before"])
some.finish("test_some.py::test_passed_before")
some.done_before = some.results["done"]
assert gpu_tests.run(some) == 0
print("the second time")
stage.SECONDS = 480
assert gpu_tests.run(stage.Stage(some.path.parent, "some", tiny=True)) == 1
"""


@pytest.mark.slow
def test_the_tests_that_are_left_are_run_and_each_result_is_written(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(_TESTS)
    (tmp_path / "conftest.py").write_text(_NO_DEVICE_LIVES)
    run = python(_TEST_STAGE, str(tmp_path), str(file))
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.split("the second time")
    assert "5 skipped" in before, "past its time it runs nothing"
    assert "1 done, 5 left" in before
    assert "3 passed, 1 skipped" in after, "what passed is not run again"
    results = held(tmp_path)
    outcomes = [(row["task"].partition("::")[2], row["outcome"]) for row in results["rows"]]
    assert sorted(outcomes) == [
        ("test_fails", "failed"),
        ("test_fails", "failed"),
        ("test_is_skipped", "skipped"),
        ("test_passes[small]", "passed"),
        ("test_passes[wide-1]", "passed"),
        ("test_passes[wide-2]", "passed"),
    ]
    failed, ended = (row["why"] for row in results["rows"] if row["outcome"] == "failed")
    assert "of the kernel" in failed
    assert "crashed while running" in ended, "a process whose device is lost runs no other test"
    assert [name.partition("::")[2] for name in results["left"]] == ["test_fails"]
