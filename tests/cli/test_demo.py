"""`levelhead demo` from end to end, on a few rows of made-up data."""

import contextlib
import io
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from levelhead.cli import main

FRUITS = ["apple", "pear", "plum", "fig"]
NAMES = ("dense", "fused")


@dataclass(frozen=True)
class Demo:
    """A finished run."""

    code: int
    output: Path
    printed: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run over 60 rows and two seeds; every second answer has three tokens more."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [
        {"prompt": f"box {i}, shelf {i % 7}", "completion": FRUITS[i % 4] + " [x]" * (i % 2)}
        for i in range(60)
    ]
    data, output = folder / "boxes.jsonl", folder / "new" / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["demo", "--data", str(data), "--seeds", "2", "--output", str(output)])
    results = json.loads((output / "results.json").read_text())
    return Demo(code, output, printed.getvalue(), results)


def test_it_succeeds_and_names_what_it_wrote(demo):
    assert demo.code == 0
    assert str(demo.output / "reliability.png") in demo.printed
    assert str(demo.output / "results.json") in demo.printed


def test_results_say_what_was_run(demo):
    results = demo.results
    assert results["data"] == {
        "source": str(demo.output.parent.parent / "boxes.jsonl"),
        "rows": 60,
        "training": 48,
        "held_out": 12,
        # Three special tokens, box , shelf [ x ], four fruits, and the numbers from 0 to 59.
        "vocabulary": 3 + 6 + 4 + 60,
    }
    assert results["settings"]["smoothing"] == 0.1
    assert [seed["seed"] for seed in results["seeds"]] == [0, 1]
    assert {"levelhead", "torch", "transformers", "python", "cpu_count", "threads"} <= set(results)


def test_measures_follow_from_the_reliability_tables(demo):
    for seed in demo.results["seeds"]:
        for numbers in (seed[name] for name in NAMES):
            bins = [
                (count, confidence, accuracy)
                for count, confidence, accuracy in zip(
                    *(numbers["reliability"][key] for key in ("count", "confidence", "accuracy")),
                    strict=True,
                )
                if count
            ]
            n = sum(count for count, _, _ in bins)
            assert 12 <= n <= 48
            assert len(numbers["reliability"]["edges"]) == 11
            assert numbers["accuracy"] == pytest.approx(sum(c * a for c, _, a in bins) / n)
            assert numbers["confidence"] == pytest.approx(sum(c * p for c, p, _ in bins) / n)
            assert numbers["ece"] == pytest.approx(sum(c * abs(a - p) for c, p, a in bins) / n)
            assert math.isfinite(numbers["nll"])
            assert numbers["step_seconds"] > 0


def test_both_models_were_asked_the_same(demo):
    for seed in demo.results["seeds"]:
        dense, fused = (sum(seed[name]["reliability"]["count"]) for name in NAMES)
        assert dense == fused


def test_table_shows_the_means_of_the_results(demo):
    lines = {line.split("│")[1].strip(): line for line in demo.printed.splitlines() if "│" in line}
    rows = {"accuracy": "accuracy", "NLL (nats)": "nll", "ECE": "ece"}
    for label, key in rows.items():
        cells = [cell.strip() for cell in lines[label].split("│")[2:4]]
        for cell, name in zip(cells, NAMES, strict=True):
            mean = sum(seed[name][key] for seed in demo.results["seeds"]) / 2
            assert cell.split(" ± ")[0] == f"{mean:.3f}"


def test_memory_of_the_loss_is_measured_or_said_not_to_be(demo):
    peaks = demo.results["loss_peak_bytes"]
    assert set(peaks) == set(NAMES)
    assert ("not measured" in demo.printed) == (None in peaks.values())


def test_picture_is_a_png_of_some_size(demo):
    content = (demo.output / "reliability.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1440, 864)


def test_bad_data_exits_with_2_and_leaves_nothing(tmp_path, capsys):
    data, output = tmp_path / "bad.jsonl", tmp_path / "out"
    data.write_text('{"prompt": "p"}\n')
    assert main(["demo", "--data", str(data), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("levelhead demo: error: 1 of 1 lines of ")
    assert '  line 1: "completion" is missing\n' in error
    assert not output.exists()


def test_an_output_that_is_a_file_exits_with_2_before_training(tmp_path, capsys):
    output = tmp_path / "out"
    output.touch()
    assert main(["demo", "--output", str(output)]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
