"""Two runs compared by `levelhead report`."""

import json

import numpy
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from levelhead.cli import main


@pytest.fixture
def compare(tmp_path, capsys):
    """Writes two runs, compares them, and returns the comparison."""

    def run(first, second, *options):
        for name, rows in (("before", first), ("after", second)):
            (tmp_path / f"{name}.csv").write_text(
                "question_id,confidence,correct\n"
                + "".join(f"{question},{c!r},{int(y)}\n" for question, c, y in rows)
            )
        paths = [str(tmp_path / f"{name}.csv") for name in ("before", "after")]
        assert main(["report", "--json", *paths, *options]) == 0
        return json.loads(capsys.readouterr().out)["comparison"]

    return run


@pytest.fixture
def rows():
    rng = numpy.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 300)
    return [(f"q{i}", float(c), rng.random() < c) for i, c in enumerate(confidence)]


def test_the_same_questions_are_paired_in_any_order(compare, rows):
    changed = [(question, confidence / 2, correct) for question, confidence, correct in rows]
    found = compare(rows, changed[::-1])
    assert found["how"] == "Paired: both runs answered the same 300 questions."
    assert (found["first"], found["second"]) == ("before", "after")
    accuracy = found["metrics"]["accuracy"]["difference"]
    assert accuracy == {"estimate": 0, "low": 0, "high": 0}  # question by question
    halved = sum(confidence for _, confidence, _ in rows) / 300 / 2
    assert found["metrics"]["mean_confidence"]["difference"]["estimate"] == pytest.approx(-halved)
    for metric in found["metrics"].values():
        change = metric["second"]["estimate"] - metric["first"]["estimate"]
        assert metric["difference"]["estimate"] == pytest.approx(change)


def test_the_order_of_the_names_is_that_of_the_difference(compare, rows):
    changed = [(question, confidence / 2, correct) for question, confidence, correct in rows]
    there = compare(rows, changed)["metrics"]["gap"]["difference"]["estimate"]
    back = compare(rows, changed, "--compare", "after", "before")
    assert back["metrics"]["gap"]["difference"]["estimate"] == pytest.approx(-there)


def test_other_questions_are_not_paired(compare, rows):
    found = compare(rows, [(f"other {question}", c, y) for question, c, y in rows])
    assert found["how"].startswith("Not paired: the runs answered different questions")
    accuracy = found["metrics"]["accuracy"]["difference"]
    assert accuracy["estimate"] == 0
    assert accuracy["low"] < 0 < accuracy["high"]


def test_repeated_questions_are_not_paired(compare, rows):
    found = compare([*rows, rows[0]], rows)
    assert found["how"] == "Not paired: a question comes more than once in a run."


def test_runs_without_questions_are_not_paired(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("confidence,correct\n" + "0.9,1\n0.2,0\n" * 20)
    assert main(["report", "--json", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["how"].startswith("Not paired: no column says which question")


def test_two_groups_of_one_file(tmp_path, capsys):
    path = tmp_path / "answers.csv"
    path.write_text("confidence,correct,seed\n" + "0.9,1,1\n0.8,0,2\n0.7,1,3\n" * 20)
    options = ["--by", "seed", "--compare", "3", "1"]
    assert main(["report", "--json", str(path), *options]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert found["metrics"]["mean_confidence"]["difference"]["estimate"] == pytest.approx(0.2)
