"""What a large report costs: time of a hundred thousand rows, memory of a million more."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
from pyarrow import csv, parquet

# Reports, and prints the seconds of computing and the peak of memory in MiB.
_MEASURE = """
    import contextlib, io, json, re, sys, time
    from pathlib import Path
    from levelhead.cli import main
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["report", *sys.argv[1:]]) == 0
    seconds = time.process_time() - begin
    # Not getrusage's: its peak counts from before exec, when this was a copy of the tests.
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps([seconds, int(peak[1]) / 1024]))
"""


def _write(path, rows):
    rng = numpy.random.default_rng(0)
    confidence = rng.beta(4, 1.5, rows)
    table = pa.table(
        {
            "question_id": pa.array([f"q{i}" for i in range(rows)]),
            "group": pa.array(rng.choice(["arc", "hellaswag", "mmlu"], rows)),
            "confidence": pa.array(confidence),
            "correct": pa.array(rng.random(rows) < confidence),
        }
    )
    if path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)


def _measured(path, *options):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), str(path), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def test_a_hundred_thousand_rows_with_pictures(tmp_path):
    """Under five seconds in all on a quiet machine, imports included; here other tests run too, which only add."""
    _write(tmp_path / "answers.csv", 100_000)
    runs = (
        _measured(tmp_path / "answers.csv", "--output", str(tmp_path / f"{i}")) for i in range(3)
    )
    assert any(seconds < 6 for seconds, _ in runs)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory as Linux tells it")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_row_more_is_a_few_bytes_more(suffix, tmp_path):
    few, many = 200_000, 1_400_000
    peaks = []
    for rows in (few, many):
        path = tmp_path / f"answers{rows}{suffix}"
        _write(path, rows)
        peaks.append(_measured(path, "--json")[1])
    # Nine for the answer, some ten for measuring it, and up to 60 MiB that malloc does not give back.
    assert (peaks[1] - peaks[0]) * 2**20 / (many - few) < 80
